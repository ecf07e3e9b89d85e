"""The trainer's Muon against the polynomial it applies to singular values, and against torch's."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.muon import Muon, orthogonalize

_USUAL = (3.4445, -4.7750, 2.0315)
_SHAPES = [(4, 4), (8, 4), (4, 4), (4, 8), (1, 6), (8, 4)]


def _weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in _SHAPES]


def _set_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def _by_singular_values(matrix: Tensor, steps: int) -> Tensor:
    a, b, c = _USUAL
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 7)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_polynomial_is_applied_to_the_singular_values(
    shape: tuple[int, int], steps: int
) -> None:
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    found = orthogonalize(matrices, _USUAL, steps, 1e-7)
    for matrix, one in zip(matrices, found, strict=True):
        torch.testing.assert_close(one, _by_singular_values(matrix, steps), rtol=0, atol=1e-12)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert orthogonalize(torch.zeros(2, 3, 3), _USUAL, 5, 1e-7).count_nonzero() == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": False},
        {"weight_decay": 0.0, "momentum": 0.5},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"ns_steps": 3},
    ],
)
def test_steps_are_those_of_torch(settings: dict[str, Any]) -> None:
    weights, others = _weights(), _weights()
    ours, torchs = Muon(weights, lr=0.02, **settings), torch.optim.Muon(others, lr=0.02, **settings)
    for step in range(3):
        before = [weight.detach().clone() for weight in others]
        for optimizer, params in ((ours, weights), (torchs, others)):
            _set_gradients(params, step)
            optimizer.step()
        for weight, other, old in zip(weights, others, before, strict=True):
            # torch's products are of bfloat16: 2^-8 a product, about ten of them behind each other.
            torch.testing.assert_close(weight - old, other - old, rtol=0.05, atol=0.05 * 0.02)
            weight.data.copy_(other)
    for weight, other in zip(weights, others, strict=True):
        found, expected = (
            optimizer.state[key]["momentum_buffer"]
            for optimizer, key in ((ours, weight), (torchs, other))
        )
        torch.testing.assert_close(found, expected)


def test_states_go_from_torchs_to_ours_and_back() -> None:
    weights = _weights()
    torchs = torch.optim.Muon(weights, lr=0.02)
    _set_gradients(weights, 0)
    torchs.step()
    copies, kept = deepcopy(weights), deepcopy(torchs.state_dict())
    ours = Muon(copies, lr=0.5)
    ours.load_state_dict(kept)
    assert ours.param_groups[0]["lr"] == 0.02
    for optimizer, params in ((torchs, weights), (ours, copies)):
        _set_gradients(params, 1)
        optimizer.step()
    for weight, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(copy, weight, rtol=0, atol=0.05 * 0.02)
    torchs.load_state_dict(ours.state_dict())


def test_a_weight_without_a_gradient_stays() -> None:
    weights = _weights()
    _set_gradients(weights, 0)
    weights[2].grad = None
    before = weights[2].detach().clone()
    optimizer = Muon(weights, lr=0.02)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(weights[2], before)
    assert weights[2] not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()  # none has a gradient: nothing to do


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="2D"):
        Muon([nn.Parameter(torch.zeros(3))])
