"""Plans: what a series is and costs, without training, and the first nanochat miniseries."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from program_helpers import Refused

import miniseries
from analysis.planned_series import (
    PlannedModel,
    chain_saving,
    plan_cost,
    plan_depths,
    plan_doubling,
)
from ars.models import miniseries_config
from common.errors import UsageError
from corpus import prepare_corpus
from corpus.tokenizer import vocabulary_of
from trainer.arguments import parse_arguments
from trainer.series_plan import plans_of, shape_of
from trainer.series_report import settings_table
from trainer.settings import PEAK_FLOPS

CONFIGS = Path(miniseries.__file__).parent / "configs"


@pytest.fixture(autouse=True)
def _folder(own_folder: None, tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("out*")), "planning writes nothing"


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert miniseries.main(["plan", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def rows(text: str) -> dict[str, list[str]]:
    """First cell of each row of the tables -> the others."""
    split = (re.split(r"  +", line) for line in text.splitlines() if "  " in line)
    return {first: others for first, *others in split}


def test_the_plan_of_the_demonstration_is_what_is_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = planned([], capsys)
    table = rows(text)
    config = parse_arguments([]).config
    plans = plans_of(config, 256)
    assert {name for name in table if "-" in name} == {plan.name for plan in plans}
    for plan in plans:
        cells = table[plan.name]
        assert cells[:3] == [f"{plan.share:g}", str(plan.trunk), str(plan.cooldown)]
        assert cells[3] == f"{plan.steps * 4 * 128:,}"
        assert cells[-1] == f"{plan.lineage_flops:.2e}"
    own = {plan.name: plan.flops + plan.fisher_flops + plan.growth_flops for plan in plans}
    measured = sum(
        branch.cooldown * branch.flops_per_step for plan in plans for branch in plan.branch_plans
    )
    total = sum(own.values()) + measured
    assert f"All of it: {total:.2e} FLOPs, {measured:.2e} of them for cooled branches" in text
    twins = sum(flops for name, flops in own.items() if name.endswith("-scratch+ars"))
    chain = sum(flops for name, flops in own.items() if name.endswith("-grown+ars"))
    assert (
        f"grown+ars: {chain:.2e} FLOPs for the whole series, {chain / twins:.2f} of its twins'"
        in text
    )
    assert "hours" not in table["model"]


def test_the_settings_of_every_depth_by_rule(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(CONFIGS / "d10-d20.yaml")]
    table = rows(planned(words, capsys))
    assert [name for name in table if re.fullmatch(r"d\d+", name)] == [
        f"d{depth}" for depth in range(10, 21)
    ]
    shape = shape_of(miniseries_config(12, vocab_size=32768, sequence_len=2048))
    assert table["d12"] == [
        "12", "768", "12", f"{shape.params:,}", f"{shape.scaling_params:,}", "x 1.24", "256",
        "524,288", "0.0006", "0.02", "0.008", "0.1",
    ]  # fmt: skip
    assert table["d20"][6:] == [
        "512", "1,048,576", "0.000657", "0.0283", "0.00876", "0.0358",
    ]  # fmt: skip
    # From scratch each size has its own ratio of tokens, to a step.
    assert abs(int(table["d12-scratch"][3].replace(",", "")) - 10.5 * shape.scaling_params) <= 2**18


def test_settings_named_by_the_user_stay() -> None:
    config = parse_arguments(["--lr", "1e-3", "--batch-size", "6"]).config
    table = settings_table(plans_of(config, 256), config.sequence_len)
    for cells in list(rows(table).values())[1:]:
        assert (cells[6], cells[8]) == ("6", "0.001")


def test_hours_and_price(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--peak-flops", "1e9", "--devices", "2", "--mfu", "0.5", "--price", "3"]
    text = planned(words, capsys)
    flops = float(re.search(r"All of it: (\S+) FLOPs", text)[1])  # type: ignore[index]
    hours = float(re.search(r"(\S+) h on 2 x 1e\+09 FLOP/s at 50% MFU", text)[1])  # type: ignore[index]
    price = float(re.search(r"(\S+) at 3 a device hour", text)[1])  # type: ignore[index]
    assert hours == pytest.approx(flops / 1e9 / 3600, rel=0.01)
    assert price == pytest.approx(hours * 2 * 3, rel=0.01)
    table = rows(text)
    assert table["model"][-3:] == ["hours", "cumulative", "price"]
    assert float(list(table.values())[-1][-2]) < hours  # without the branches that are measured


def test_the_first_nanochat_miniseries(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--series", "nanochat", "--peak-flops", "h100", "--devices", "8", "--mfu", "0.4"]
    text = planned(words, capsys)
    assert "All of it: 4.64e+19 FLOPs, 4.07 h on 8 x 9.89e+14 FLOP/s at 40% MFU." in text
    assert len(rows(text)) == 12
    # The trainer's own model has the parameters that the paper plan gives it.
    for model, depth in zip(plan_depths((10, 20)), (10, 20), strict=True):
        shape = shape_of(miniseries_config(depth, vocab_size=32768, sequence_len=2048))
        assert (shape.params, shape.scaling_params) == (model.params, model.scaling_params)
        assert shape.flops_per_token * model.tokens == model.flops


def test_parameters_that_double(capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(planned(["--series", "doubling"], capsys))
    names = list(table)[1:]
    assert (names[0], names[-1], len(names)) == ("7.0M", "7.2B", 11)
    assert table["7.2B"] == ["7,168,000,000", "7,168,000,000", "143,360,000,000", "6.17e+21"]


def test_the_vocabulary_is_known_without_the_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the rat sat on the cat. " * 200)
    corpus = prepare_corpus(str(text), tokenizer="bpe:270", cache=tmp_path / "c", sequence_len=8)
    corpus.tokenizer.save(tmp_path / "tokenizer.json")
    assert vocabulary_of("bytes") == 256
    assert vocabulary_of("bpe:32768") == 32768
    assert vocabulary_of(str(tmp_path / "tokenizer.json")) == corpus.vocab_size
    with pytest.raises(UsageError, match="does not exist"):
        vocabulary_of("missing.json")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--series", "double"], "is not one of 'own', 'nanochat', 'doubling'; did you mean"),
        (["--mfu", "1.5", "--peak-flops", "h100"], "up to 1"),
        (["--mfu", "0.5"], "--mfu: it takes --peak-flops"),
        (["--price=3"], "--price: it takes --peak-flops"),
        (["--devices", "0"], "whole number from 1"),
        (["--tokenizer", "missing.json"], "--tokenizer missing.json does not exist"),
        (["--steps", "3"], "the 3 steps of a model from scratch"),
        (["--device-batch-size", "3"], "--device-batch-size 3 does not divide the 4 sequences"),
        (["--series", "nanochat", "--depths", "2-3"], "argument --depths: --series nanochat is on"),
        (["--series=doubling", "--quick"], "argument --quick: --series doubling is on paper"),
        (["--colour"], "there is no --colour"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str, refused: Refused) -> None:
    assert says in refused(miniseries.main, ["plan", *words])


def test_the_first_nanochat_miniseries_on_paper() -> None:
    plan = plan_depths()
    assert [model.name for model in plan] == [f"d{depth}" for depth in range(10, 21)]
    millions = [91.1, 111.6, 135.3, 162.5, 193.6, 228.8, 268.4, 312.8, 362.2, 416.8, 477.1]
    assert [round(model.params / 1e6, 1) for model in plan] == millions
    assert [round(m.tokens / 1e9, 2) for m in plan][::5] == [0.73, 1.83, 3.82]
    assert plan[-1].flops == pytest.approx(1.24e19, rel=5e-3)
    cost = plan_cost(plan, peak_flops=PEAK_FLOPS["h100"], devices=8, mfu=0.4, price_per_hour=3.0)
    assert f"{cost['flops']:.3g}" == "4.64e+19"
    assert cost["hours"] == pytest.approx(4.07, abs=0.01)
    assert 90 < cost["price"] < 110
    assert cost["models"][-1]["cumulative_flops"] == sum(m["flops"] for m in cost["models"])
    assert cost["price"] == pytest.approx(sum(m["price"] for m in cost["models"]))


def test_the_doubling_series() -> None:
    plan = plan_doubling()
    assert len(plan) == 11
    assert (plan[0].params, plan[-1].params) == (7_000_000, 7_168_000_000)
    assert (plan[0].name, plan[-1].name) == ("7.0M", "7.2B")
    assert all(b.params == 2 * a.params for a, b in pairwise(plan))
    assert plan[3].tokens == 20 * plan[3].params
    assert plan[3].flops == 6 * plan[3].params * plan[3].tokens


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: plan_cost(plan_depths(), mfu=1.5), "mfu"),
        (lambda: plan_cost(plan_depths(), devices=0), "devices"),
    ],
)
def test_unfit_plans_are_refused(call: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        call()


def test_the_ladder_of_the_transfer_efficiency() -> None:
    assert [round(100 * chain_saving(e)) for e in (0, 0.25, 0.5, 0.75, 1)] == [0, 19, 38, 57, 75]
    # Two models of 10 and 20 tokens, 1 and 4 parts of the cost: 9 of the second's 20 are inherited.
    plan = [PlannedModel("a", 1, 1, 10, 10), PlannedModel("b", 2, 2, 20, 40)]
    assert chain_saving(0.5, plan) == pytest.approx(0.5 * 9 / 20 * 4 / 5)
    assert chain_saving(0.5, plan, cooldown=0.2) == pytest.approx(0.5 * 8 / 20 * 4 / 5)
    assert chain_saving(1.0, plan[:1]) == 0.0
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="efficiency"):
            chain_saving(bad)
