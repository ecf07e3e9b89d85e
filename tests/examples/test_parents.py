"""Chains of models: which parents they have, and where in the data each reads on."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_series import Series, Stop, results

from ars.models import GPT, GPTConfig, grow
from ars.regularizers import ProgressiveInheritance
from common.errors import RunInterruptedError
from trainer import series_plan, train_series, training_loop, training_state
from trainer.arms import parse_arm
from trainer.series_plan import ModelPlan, Settings, settings_of
from trainer.settings import SeriesConfig
from trainer.step_log import read_log


@pytest.mark.parametrize("stop", [15, 27])
def test_chosen_parents_are_trained_from_and_resumed(
    series: Series, tmp_path: Path, stop: int
) -> None:
    words = ("--depths", "1,2,3", "--parents", "1", "--arms", "grown+distill", "--shares", "0.8")
    series(tmp_path / "straight", None, *words)
    straight = results(tmp_path / "straight")
    assert {record["name"]: record["parent"] for record in straight["records"]} == {
        "d1-scratch": None,
        "d2-grown+distill": "d1-scratch",
        "d3-grown+distill": "d1-scratch",
    }
    with pytest.raises(RunInterruptedError):
        series(tmp_path / "stopped", Stop(stop), *words)
    assert not (tmp_path / "stopped/checkpoints/d3-grown+distill.pt").exists()
    series(tmp_path / "stopped", None, *words)
    assert results(tmp_path / "stopped") == straight


@pytest.mark.parametrize("grow_at", [1.0, 0.5])
def test_no_model_reads_what_the_trunks_before_it_have_read(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grow_at: float
) -> None:
    sizes = {1: 4, 2: 6, 3: 5}  # no two of which divide each other

    def sized(model: GPTConfig, config: SeriesConfig, growth: float) -> Settings:
        return replace(settings_of(model, config, growth), batch_size=sizes[model.n_layer])

    read: dict[str, list[list[tuple[int, ...]]]] = {}  # by step, of each model
    draw, train = training_loop.batch, train_series.train

    def drawn(*tokens: Any, **where: Any) -> Any:
        inputs, targets = draw(*tokens, **where)
        newest = next(reversed(read))
        read[newest].append([tuple(row) for row in inputs.tolist()])
        return inputs, targets

    def trained(state: Any, plan: ModelPlan, *others: Any, **more: Any) -> float:
        read[plan.name] = []
        return train(state, plan, *others, **more)

    monkeypatch.setattr(series_plan, "settings_of", sized)
    monkeypatch.setattr(training_loop, "batch", drawn)
    monkeypatch.setattr(train_series, "train", trained)
    words = ("--depths", "1,2,3", "--steps", "10,20,15", "--cooldown", "0.1", "--arms", "grown")
    series(tmp_path, None, *words, "--grow-at", str(grow_at))
    assert {name: len(batches) for name, batches in read.items()} == {
        "d1-scratch": 10, "d2-grown": 16, "d2-grown@0.5": 2, "d3-grown": 12, "d3-grown@0.5": 2,
    }  # fmt: skip
    # Trunks of 9 and 14 steps, of which the children begin at the end or in the middle.
    lineage = [*read["d1-scratch"][: round(9 * grow_at)], *read["d2-grown"][: round(14 * grow_at)]]
    seen = [row for rows in (*lineage, *read["d3-grown"]) for row in rows]
    assert len(set(seen)) == len(seen)
    # A branch reads what the trunk that it leaves reads next.
    assert read["d2-grown@0.5"] == read["d2-grown"][8:10]


def test_a_subspace_without_new_columns_is_said_and_leaves_the_rest(
    series: Series, tmp_path: Path
) -> None:
    words = ("--depths", "1x16,2x16", "--checkpoint-seconds", "0")
    words += ("--arms", "grown+subspace,grown+ewc,grown+ewc+subspace")
    with pytest.raises(RunInterruptedError):
        series(tmp_path, Stop(38), *words)
    series(tmp_path, None, *words)
    found = {r["arm"]: r for r in json.loads((tmp_path / "metrics.json").read_text())}
    said = ["subspace restrains nothing: the parent is as wide"]
    assert found["grown+subspace"]["warnings"] == said
    assert found["grown+subspace"]["pulls"] == found["scratch"]["pulls"] == {}
    ewc, both = found["grown+ewc"], found["grown+ewc+subspace"]
    assert (ewc["warnings"], both["warnings"]) == ([], said)
    assert (ewc["val_bpb"], ewc["pulls"]) == (both["val_bpb"], both["pulls"])
    assert ewc["pulls"]["step"][-1] == ewc["steps"]
    assert all(norm > 0 for norm in ewc["pulls"]["blocks.0"][1:])


def test_what_growing_warns_of_is_said_when_training_begins(
    series: Series,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def warn(*words: Any) -> Any:
        warnings.warn("the importance is 0 everywhere", stacklevel=2)
        return inherit_penalties(*words)

    inherit_penalties = training_state.inherit_penalties
    monkeypatch.setattr(training_state, "inherit_penalties", warn)
    series(tmp_path, None, "--arms", "grown+ewc", "--curve-points", "2")
    said = "warning: d2-grown+ewc: the importance is 0 everywhere"
    assert capsys.readouterr().err.count(said) == 1
    first, *rows = read_log(tmp_path / "log_d2-grown+ewc.csv")[1:]
    assert first["penalty"] == 0  # the anchor is where it starts
    assert all(row["penalty"] > 0 for row in rows)


def test_the_states_of_muon_and_of_the_adamw_beside_it_grow(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def inherit(plan: ModelPlan, run: Any, parent: Any) -> Any:
        state = training_state.inherit(plan, run, parent)
        for optimizer in (parent.optimizer, state.optimizer):
            found.append([copy.deepcopy(part.state_dict()["state"]) for part in optimizer.parts])
        return state

    monkeypatch.setattr(train_series, "inherit", inherit)
    series(tmp_path, None, "--arms", "grown+muon+ars")
    (old_adamw, old_muon), (adamw, muon) = found
    table = adamw[0]  # wte.weight, whose scale is 1: 16 channels, and then 32
    assert table["step"] == old_adamw[0]["step"] == 8
    assert torch.equal(table["exp_avg"][:, :16], old_adamw[0]["exp_avg"])
    assert table["exp_avg"][:, :16].any()
    queries = muon[0]["momentum_buffer"]  # of the first block
    assert torch.equal(queries[:16, :16], old_muon[0]["momentum_buffer"])
    assert queries[:16, :16].any()
    assert not queries[16:].any()
    assert not queries[:, 16:].any()
    assert len(muon) == len(old_muon) == 6  # the new block's matrices have no momentum yet


@pytest.mark.parametrize("blocks", ["appended", "inserted"])
def test_penalties_hold_the_parents_part_wherever_its_blocks_are(blocks: str) -> None:
    """Old coordinates by the EWC, new columns of old tensors by the subspace, new blocks not."""
    parent = GPT(GPTConfig(16, 8, n_layer=2, n_head=1, n_embd=8))
    config = GPTConfig(16, 8, n_layer=3, n_head=2, n_embd=16)
    growth = grow(parent, config, torch.Generator().manual_seed(0), blocks=blocks)
    importance = {name: torch.ones_like(weight) for name, weight in parent.named_parameters()}
    arm = parse_arm("grown+ewc=1+subspace=1")
    kept = training_state.inherit_penalties(growth, arm, SeriesConfig(), importance)
    penalty = kept.penalty
    assert isinstance(penalty, ProgressiveInheritance)
    assert not any(part.detach() for part in penalty.parts().values())
    assert not any(kept.pulls().values())
    assert training_state.Inheritance().pulls() == {}
    old = set(growth.names.values())
    assert len(old) == 14
    for name, weight in growth.model.named_parameters():
        for place, part in (((0, 0), "ewc"), ((0, -1), "subspace")):
            with torch.no_grad():
                weight[place] += 1.0
            moved = {key for key, value in penalty.parts().items() if value.detach() > 0.01}
            assert moved == ({part} if name in old else set()), name
            if part == "ewc" and name in old:
                pulls = kept.pulls()
                layer = name.removesuffix(".weight").split(".attn")[0].split(".mlp")[0]
                strength = penalty.strength * penalty.ewc.importance[name][place].item()
                assert {key for key, norm in pulls.items() if norm > 0.01} == {layer}
                assert pulls[layer] == pytest.approx(strength)
            with torch.no_grad():
                weight[place] -= 1.0
