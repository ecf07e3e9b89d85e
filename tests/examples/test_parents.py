"""Chains of models: which parents they have, and where in the data each reads on."""

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
from trainer import series_plan, training_loop, training_state
from trainer.arms import parse_arm
from trainer.series_plan import settings_of
from trainer.settings import SeriesConfig


@pytest.mark.parametrize("stop", [15, 25])
def test_chosen_parents_are_trained_from_and_resumed(
    series: Series, tmp_path: Path, stop: int
) -> None:
    words = ("--depths", "1,2,3", "--parents", "1", "--arms", "grown+distill")
    series(tmp_path / "straight", None, *words)
    straight = results(tmp_path / "straight")
    assert {record["name"]: record["parent"] for record in straight["records"]} == {
        "d1-scratch": None,
        "d2-grown+distill": "d1-scratch",
        "d3-grown+distill": "d1-scratch",
    }
    assert [name for name in straight["models"] if "trunk" in name] == ["d1-scratch-trunk.pt"]
    with pytest.raises(RunInterruptedError):
        series(tmp_path / "stopped", Stop(stop), *words)
    assert not (tmp_path / "stopped/checkpoints/d3-grown+distill.pt").exists()
    series(tmp_path / "stopped", None, *words)
    assert results(tmp_path / "stopped") == straight


def test_no_model_reads_what_the_trunks_before_it_have_read(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {1: 4, 2: 6, 3: 5}  # no two of which divide each other

    def sized(depth: int, *others: Any) -> Any:
        return replace(settings_of(depth, *others), batch_size=sizes[depth])

    read: list[list[tuple[int, ...]]] = []
    draw = training_loop.batch

    def drawn(*tokens: Any, **where: Any) -> Any:
        inputs, targets = draw(*tokens, **where)
        read.append([tuple(row) for row in inputs.tolist()])
        return inputs, targets

    monkeypatch.setattr(series_plan, "settings_of", sized)
    monkeypatch.setattr(training_loop, "batch", drawn)
    series(tmp_path, None, "--depths", "1,2,3", "--steps", "7,8,9", "--arms", "grown")
    seen: list[tuple[int, ...]] = []
    for record in json.loads((tmp_path / "metrics.json").read_text()):
        own = [read.pop(0) for _ in range(record["steps"])]
        assert {len(rows) for rows in own} == {sizes[record["depth"]]}
        trunk = tmp_path / f"checkpoints/{record['name']}-trunk.pt"
        steps = torch.load(trunk)["step"] if trunk.exists() else record["steps"]
        seen += [row for rows in own[:steps] for row in rows]
    assert not read
    assert len(set(seen)) == len(seen)


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


@pytest.mark.parametrize("blocks", ["appended", "inserted"])
def test_penalties_hold_the_parents_part_wherever_its_blocks_are(blocks: str) -> None:
    """Old coordinates by the EWC, new columns of old tensors by the subspace, new blocks not."""
    parent = GPT(GPTConfig(16, 8, n_layer=2, n_head=1, n_embd=8))
    config = GPTConfig(16, 8, n_layer=3, n_head=2, n_embd=16)
    growth = grow(parent, config, torch.Generator().manual_seed(0), blocks=blocks)
    importance = {name: torch.ones_like(weight) for name, weight in parent.named_parameters()}
    arm = parse_arm("grown+ewc=1+subspace=1")
    kept = training_state.inherit_penalties(growth, arm, SeriesConfig(), importance).penalty
    assert isinstance(kept, ProgressiveInheritance)
    assert not any(part.detach() for part in kept.parts().values())
    old = set(growth.names.values())
    assert len(old) == 14
    for name, weight in growth.model.named_parameters():
        for place, part in (((0, 0), "ewc"), ((0, -1), "subspace")):
            with torch.no_grad():
                weight[place] += 1.0
            moved = {key for key, value in kept.parts().items() if value.detach() > 0.01}
            assert moved == ({part} if name in old else set()), name
            with torch.no_grad():
                weight[place] -= 1.0
