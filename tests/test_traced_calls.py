"""How many files of the project a call goes through: what a reader has to open to follow it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ars import ARSAdamW
from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher.per_sample import Method

ROOT = Path(__file__).resolve().parent.parent


def files_entered(call: Callable[[], object]) -> list[str]:
    """Return the files below the repository whose functions run in ``call``, but for this one."""
    codes = set()

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            codes.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    paths = {Path(name).resolve() for name in codes if name.startswith("/")} - {Path(__file__)}
    below = {path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT)}
    return sorted(str(path) for path in below if not path.parts[0].startswith("."))


@pytest.mark.parametrize(("method", "most"), [("auto", 6), ("hooks", 8)])
def test_a_fit_of_the_diagonal_fisher(method: Method, most: int) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [(torch.randn(9, 4), torch.arange(9) % 3)] * 2
    fisher = DiagonalFisher(model, method=method)
    files = files_entered(lambda: fisher.fit(batches, 12))
    assert ("regularizers/fisher/hooks.py" in files) is (method == "hooks")
    assert len(files) <= most, files


def test_a_step_of_adamw_on_a_cpu() -> None:
    model = nn.Linear(8, 1)
    opt = ARSAdamW(model.parameters())
    for _ in range(3):
        opt.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        files = files_entered(lambda loss=loss: opt.step(loss=loss))
    assert "ars/step/cpu.py" in files
    assert len(files) <= 10, files
