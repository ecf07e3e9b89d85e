"""Arms by their words, and what the size decides where nobody names it."""

import dataclasses
import re

import pytest

from ars.models import GPTConfig, miniseries_config
from common.errors import UsageError
from trainer.arms import parse_arm
from trainer.series_plan import plans_of, settings_of, shape_of
from trainer.settings import SeriesConfig


def test_an_arm_is_what_its_word_says() -> None:
    arm = parse_arm("grown+ars+distill+ewc=0.25")
    assert arm.name == "grown+ewc=0.25+distill+ars"
    assert parse_arm(arm.name) == arm
    assert arm.grown
    assert arm.controller == "ars"
    assert [arm.has(part) for part in ("ewc", "subspace", "distill", "muon")] == [
        True, False, True, False,
    ]  # fmt: skip
    assert arm.strength("ewc", 3.0) == 0.25
    assert arm.strength("distill", 3.0) == 3.0
    assert arm.root.name == "scratch+ars"
    assert parse_arm("scratch+muon+paper").root.name == "scratch+muon+paper"
    assert parse_arm("grown+ars+distill=2+muon").name == "grown+muon+distill=2+ars"
    assert parse_arm("grown+muon+distill=2+ars").root.name == "scratch+muon+ars"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("scrach", "there is no 'scrach'; did you mean scratch?"),
        ("grown+ewx", "there is no 'ewx'; did you mean ewc?"),
        ("grown+9", "there is no '9'; use muon, ewc, subspace, distill, ars, paper"),
        ("grown+ewc+muon", "ewc is a penalty of AdamW's step, which leaves the blocks to muon"),
        ("grown+muon+subspace=1", "subspace is a penalty of AdamW's step"),
        ("scratch+ewc", "ewc goes with grown only, not with scratch"),
        ("grown+ewc+ewc=1", "ewc stands there twice"),
        ("grown+ars+paper", "one controller at a time; drop paper"),
        ("grown+ewc=x", "ewc takes a strength from 0 to 1e+12, not 'x'"),
        ("grown+ewc=-1", "ewc takes a strength from 0 to 1e+12, not '-1'"),
        ("grown+ewc=nan", "ewc takes a strength"),
        ("scratch+muon=2", "muon takes none, not '2'"),
        ("grown+ars=2", "ars takes none, not '2'"),
        ("", "there is no ''"),
    ],
)
def test_what_is_no_arm_is_refused(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        parse_arm(word)
    assert str(error.value).startswith(f"--arms {word}: ")
    assert "\n" not in str(error.value)


def model(depth: int) -> GPTConfig:
    return miniseries_config(depth, vocab_size=32768, sequence_len=2048)


def test_named_rates_fall_with_the_size_by_the_exponent() -> None:
    config = SeriesConfig(depths=("2x16", "4x16", "4x32"), lr=0.01, muon_lr="rule", head_dim=8,
                          muon_adamw_lr=0.02, rate_exponent=0.5, arms=("scratch",))  # fmt: skip
    found = {plan.size: plan for plan in plans_of(config, 64)}
    first = shape_of(found["2x16"].model).scaling_params
    for plan in found.values():
        growth = shape_of(plan.model).scaling_params / first
        assert plan.settings.lr == pytest.approx(0.01 / growth**0.5)
        assert plan.settings.muon_adamw_lr == pytest.approx(0.02 / growth**0.5)
        by_rule = settings_of(plan.model, config)
        assert plan.settings.muon_lr == by_rule.muon_lr
        assert plan.settings.weight_decay == config.weight_decay
    assert found["2x16"].settings.lr == 0.01 > found["4x16"].settings.lr > found["4x32"].settings.lr
    one_rate = dataclasses.replace(config, rate_exponent=0.0)
    assert {plan.settings.lr for plan in plans_of(one_rate, 64)} == {0.01}


def test_the_rule_is_nanochats_and_follows_a_named_batch() -> None:
    rule = SeriesConfig(
        batch_size="rule",
        lr="rule",
        muon_lr="rule",
        muon_adamw_lr="rule",
        weight_decay="rule",
        sequence_len=2048,
    )
    found = {depth: settings_of(model(depth), rule) for depth in (8, 10, 12, 16, 18, 20)}
    # The batch follows the tokens of the training, which are in proportion to the parameters.
    assert {depth: chosen.batch_size * 2048 for depth, chosen in found.items()} == {
        8: 2**18, 10: 2**19, 12: 2**19, 16: 2**19, 18: 2**20, 20: 2**20,
    }  # fmt: skip
    d8, d12, d20 = found[8], found[12], found[20]
    assert (d12.lr, d12.muon_lr, d12.muon_adamw_lr, d12.weight_decay) == (6e-4, 0.02, 0.008, 0.1)
    products = {depth: shape_of(model(depth)).scaling_params for depth in (8, 12, 20)}
    for chosen, share, depth in ((d8, 0.5, 8), (d20, 2.0, 20)):
        assert chosen.lr == pytest.approx(6e-4 * share**0.5 * (12 / depth) ** 0.5)
        assert chosen.muon_lr == pytest.approx(0.02 * share**0.5)
        assert chosen.muon_adamw_lr == pytest.approx(0.008 * share**0.5 * (12 / depth) ** 0.5)
        assert chosen.weight_decay == pytest.approx(
            0.1 * share**0.5 * products[12] / products[depth]
        )
    assert d20.weight_decay == pytest.approx(0.0358, rel=1e-3)
    # Rates follow the width, and the depth only through the parameters.
    wide = miniseries_config(8, width=768, vocab_size=32768, sequence_len=2048)
    named = settings_of(wide, SeriesConfig(batch_size=64, lr="rule", sequence_len=2048))
    assert named.lr == pytest.approx(3e-4)
    assert (named.batch_size, named.muon_lr) == (64, SeriesConfig().muon_lr)
