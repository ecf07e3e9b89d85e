"""Warnings of a training that was stopped and went on."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trainer.recorder import Health


def state_of(warnings: list[str], penalty: float, seen: Any = None) -> Any:
    kept = SimpleNamespace(penalty=nn.Identity(), subspace_value=lambda: 0.0)
    optimizer = SimpleNamespace(shown=lambda: {"penalty": penalty})
    return SimpleNamespace(warnings=warnings, inheritance=kept, optimizer=optimizer, seen=seen)


def update_of(loss: float) -> Any:
    return SimpleNamespace(loss=torch.tensor(loss), distillation=None)


def test_a_warning_is_not_said_again_with_other_numbers_after_a_stop() -> None:
    state = state_of([], 5.0)
    (said,) = Health(state).look(state, update_of(1.0), 2.0)
    assert "the penalty, 5, exceeds the task loss, 1:" in said
    again = state_of(list(state.warnings), 7.5, state.seen)
    assert Health(again).look(again, update_of(2.0), 2.0) == []
    assert again.warnings == [said]


def test_another_kind_is_said_after_a_stop() -> None:
    state = state_of(["the penalty was exactly 0 3 times: it protects nothing"], 5.0)
    (said,) = Health(state).look(state, update_of(1.0), 2.0)
    assert "exceeds" in said
    assert len(state.warnings) == 2
