"""The optimizer of an arm: its parts step together or not at all."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_series import Series
from torch.utils._pytree import tree_leaves

from ars.models import GPT, miniseries_config
from trainer.arm_optimizer import Optimizer, build_optimizer
from trainer.arms import parse_arm
from trainer.series_plan import Settings
from trainer.settings import SeriesConfig
from trainer.step_log import read_log

SCALE = 4.0


def optimizer_of(word: str) -> tuple[GPT, Optimizer]:
    model = GPT(miniseries_config(1, vocab_size=16, sequence_len=8))
    settings = Settings(2, lr=0.01, muon_lr=0.02, muon_adamw_lr=0.03, weight_decay=0.1)
    return model, build_optimizer(model, parse_arm(word), settings, SeriesConfig())


def numbers(optimizer: Optimizer) -> list[Any]:
    """A copy of all that its state consists of, but for words."""
    leaves = tree_leaves(copy.deepcopy(optimizer.state_dict()))
    return [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, str)]


def update(
    model: GPT, optimizer: Optimizer, scaler: torch.amp.GradScaler, bad: dict[str, float]
) -> None:
    """Take a step of gradients of 1, but for one element of the weights that ``bad`` names."""
    scaler.scale(torch.ones(()))  # makes the scale, as the loss does
    for name, weight in model.named_parameters():
        weight.grad = torch.full_like(weight, SCALE)
        weight.grad[0, 0] = bad.get(name, SCALE)
    optimizer.step(torch.ones(()), scaler)
    scaler.update(SCALE)


@pytest.mark.parametrize("word", ["scratch", "scratch+muon", "scratch+muon+ars"])
@pytest.mark.parametrize("name", ["lm_head.weight", "wte.weight", "blocks.0.mlp.fc.weight"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_gradient_that_is_not_finite_stops_every_part(
    word: str, name: str, value: float
) -> None:
    model, optimizer = optimizer_of(word)
    assert name in dict(model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    update(model, optimizer, scaler, {})  # so that there are moments
    before = copy.deepcopy(model.state_dict()), numbers(optimizer)
    update(model, optimizer, scaler, {name: value})
    torch.testing.assert_close(
        (model.state_dict(), numbers(optimizer)), before, rtol=0, atol=0, equal_nan=True
    )
    update(model, optimizer, scaler, {})
    for weight, old in zip(model.parameters(), before[0].values(), strict=True):
        assert weight.isfinite().all()
        assert not torch.equal(weight, old)


def test_a_scale_changes_no_bit_of_a_step() -> None:
    for word in ("scratch", "scratch+muon+ars"):
        (scaled, first), (plain, second) = optimizer_of(word), optimizer_of(word)
        plain.load_state_dict(scaled.state_dict())
        update(scaled, first, torch.amp.GradScaler("cpu", init_scale=SCALE), {})
        for weight in plain.parameters():
            weight.grad = torch.ones_like(weight)
        second.step(torch.ones(()))
        torch.testing.assert_close(scaled.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_the_rate_shown_is_that_of_adamw() -> None:
    for word, peak in (("scratch+ars", 0.01), ("scratch+muon", 0.03)):
        _, optimizer = optimizer_of(word)
        assert optimizer.rate == peak
        optimizer.set_rate(0.5)
        assert optimizer.rate == 0.5 * peak


def test_records_and_logs_name_the_rates_that_were_used(series: Series, tmp_path: Path) -> None:
    words = ("--lr", "0.001", "--muon-lr", "0.02", "--muon-adamw-lr", "0.004")
    series(tmp_path, None, "--arms", "scratch,scratch+muon", *words)
    records = {r["name"]: r for r in json.loads((tmp_path / "metrics.json").read_text())}
    for name, lr, muon_lr in (("d1-scratch", 0.001, None), ("d1-scratch+muon", 0.004, 0.02)):
        record = records[name]
        assert record["lr"] == max(r["lr"] for r in read_log(tmp_path / f"log_{name}.csv")[1:])
        assert (record["lr"], record["muon_lr"]) == (lr, muon_lr)
        assert record["muon_adamw_lr"] == (None if muon_lr is None else lr)
