"""Names do not depend on what wraps a model: torch.compile, DataParallel, and its kin."""

import pytest
import torch
from torch import nn

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    ActivationCovariance,
    DiagonalFisher,
    KroneckerFisher,
    KroneckerPenalty,
    SubspacePenalty,
)


def compiled(model):
    return torch.compile(model, backend="eager")


def twice(model):
    return nn.DataParallel(compiled(model))


WRAPPERS = pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, twice])
BATCH = torch.randn(6, 4), torch.randint(0, 3, (6,))
PENALTIES = {
    "ewc": lambda model: EWC(model, DiagonalFisher(model, "exact").fit([BATCH]), strength=3.0),
    "kronecker": lambda model: KroneckerPenalty(
        model, KroneckerFisher(model, "exact").fit([BATCH]), strength=3.0
    ),
    "subspace": lambda model: SubspacePenalty.from_activations(
        model, ActivationCovariance(model).fit([BATCH]), strength=3.0, rank=2
    ),
}


def value_of(penalty):
    with torch.no_grad():
        return penalty.value()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@WRAPPERS
@pytest.mark.parametrize("kind", PENALTIES)
def test_what_is_measured_on_one_fits_the_other(wrap, kind):
    model = network()
    outside, inside = PENALTIES[kind](wrap(model)), PENALTIES[kind](model)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1)
    assert float(value_of(outside)) > 0
    assert torch.equal(value_of(outside), value_of(inside))
    assert outside.named_parameters() == inside.named_parameters()
    outside.load_state_dict(inside.state_dict())
    optimizer = ARSAdamW(wrap(model).parameters(), penalty=outside)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step(loss=1.0)
    assert float(optimizer.diagnostics["penalty"]) == pytest.approx(
        float(value_of(inside)), rel=0.2
    )


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("kind", PENALTIES)
def test_a_state_by_the_names_of_a_wrapper_is_read(prefix, kind):
    model = network()
    penalty = PENALTIES[kind](model)
    state = penalty.state_dict()
    old = {
        key: {f"{prefix}{name}": part for name, part in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in state.items()
    }
    with torch.no_grad():
        model[0].weight.add_(1.0)
    other = PENALTIES[kind](model)
    assert float(value_of(other)) == 0.0
    other.load_state_dict(old)
    assert float(value_of(other)) == float(value_of(penalty)) > 0


def test_importances_by_the_names_of_a_wrapper_are_read():
    model = network()
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    penalty = EWC(model, {f"_orig_mod.{name}": value for name, value in ones.items()})
    assert penalty.importance.keys() == ones.keys()


def test_a_part_of_the_model_that_is_called_module_keeps_its_name():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = network()

        def forward(self, x):
            return self.module(x)

    fisher = DiagonalFisher(Outer(), "exact").fit([BATCH])
    assert next(iter(fisher.importance)) == "module.0.weight"
    assert next(iter(EWC(Outer(), fisher).importance)) == "module.0.weight"
