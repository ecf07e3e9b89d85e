"""EWC with the anchor in bfloat16 and the importance in bfloat16 or uint8."""

import pytest
import torch
from ewc_models import move, random_importance, small_model
from torch import nn

from ars.regularizers import EWC


def compact(model, **options):
    return EWC(model, random_importance(model), 3.0, storage="compact", **options)


@pytest.mark.parametrize(
    ("storage", "expected"), [("full", 8), ("bfloat16", 4), ("compact", 3.0625)]
)
def test_bytes_a_parameter(storage, expected):
    model = nn.Linear(256, 256, bias=False)
    ((p, *stored),) = EWC(model, {"weight": torch.rand(256, 256)}, storage=storage).terms()
    assert sum(t.numel() * t.element_size() for t in stored) / p.numel() == expected


def test_decay_is_computed_in_float32():
    model = nn.Linear(64, 64, bias=False)
    first, second = torch.rand(2, 64, 64)
    penalty = EWC(model, {"weight": first}, storage="bfloat16")
    stored = penalty.importance["weight"].float()
    penalty.consolidate({"weight": second}, decay=0.9)
    expected = (stored * 0.9 + second).bfloat16()
    assert torch.equal(penalty.importance["weight"], expected)


def test_further_tasks_keep_the_addresses():
    model = small_model(torch.bfloat16)
    full, small = EWC(model, random_importance(model), 3.0), compact(model)
    addresses = [t.data_ptr() for term in small.terms() for t in term]
    for seed in range(2):
        move(model, seed=seed)
        for penalty in (full, small):
            penalty.consolidate(random_importance(model, seed=seed), decay=0.5)
    move(model, seed=7)
    for penalty in (full, small):
        penalty.add_task(random_importance(model, seed=8))
    move(model, seed=9)
    assert [t.data_ptr() for term in small.terms() for t in term] == addresses
    assert small.value().item() == pytest.approx(full.value().item(), rel=0.02)
    assert small.constant == pytest.approx(full.constant, rel=0.02)


def test_refuses_what_it_cannot_store():
    model = nn.Conv2d(2, 4, 3, bias=False).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"'weight' is not contiguous, .* use storage='bfloat16'"):
        EWC(model, {"weight": torch.rand(4, 2, 3, 3)}, storage="compact")
    with pytest.raises(ValueError, match=r"unknown storage 'tiny'; choose one of \['full', 'bflo"):
        EWC(model, {"weight": torch.rand(4, 2, 3, 3)}, storage="tiny")
