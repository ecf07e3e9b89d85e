"""KroneckerPenalty against the quadratic form with the whole matrix G (x) A."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ars.regularizers import ActivationCovariance, KroneckerFisher, KroneckerPenalty


def network() -> nn.Sequential:
    """A convolution, a linear layer with a bias and one without."""
    layers = (
        nn.Conv1d(2, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(9, 4),
        nn.Linear(4, 3, bias=False),
    )
    return nn.Sequential(*layers).double()


def batches(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 2, 4, dtype=torch.float64), torch.arange(n) % 3)]


def move(model: nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=scale)


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_children():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            matrix = module.weight.flatten(1)
            if module.bias is not None:
                matrix = torch.cat([matrix, module.bias[:, None]], 1)
            yield f"{name}.weight", matrix


def quadratic(model: nn.Module, anchors: dict[str, Tensor], fisher: Any) -> Tensor:
    """1/2 d^T F d summed over the layers, with F[name] the whole matrix."""
    total = torch.zeros((), dtype=torch.float64)
    for name, matrix in matrices(model):
        d = (matrix - anchors[name]).flatten()
        total = total + 0.5 * d @ fisher[name] @ d
    return total


@pytest.mark.parametrize("kind", ["kronecker", "activations"])
def test_value_gradient_and_buffers(kind: str) -> None:
    model = network()
    if kind == "kronecker":
        source: Any = KroneckerFisher(model, "exact").fit(batches())
        fisher = {n: torch.kron(f.outputs, f.inputs) for n, f in source.factors.items()}
    else:
        source = ActivationCovariance(model).fit(batches())
        fisher = {}
        for name, matrix in matrices(model):
            a = source.augmented[name][: matrix.shape[1], : matrix.shape[1]]
            fisher[name] = torch.kron(torch.eye(len(matrix)).double(), a)
    anchors = {name: matrix.detach().clone() for name, matrix in matrices(model)}
    penalty = KroneckerPenalty(model, source, strength=2.5)
    assert penalty.value() == 0
    move(model)

    expected = 2.5 * quadratic(model, anchors, fisher)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    value = penalty.value()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, list(model.parameters())), wanted)

    pairs = penalty.gradients()
    assert [p for p, _ in pairs] == list(model.parameters())
    assert not any(buffer.any() for _, buffer in pairs)
    torch.testing.assert_close(penalty.refresh(), expected.detach())
    torch.testing.assert_close(tuple(buffer for _, buffer in pairs), wanted)
    assert not any(buffer.requires_grad for _, buffer in pairs)
    move(model)
    penalty.refresh()
    assert not torch.allclose(pairs[0][1], wanted[0])  # the same buffers, at the new parameters
    assert [b.data_ptr() for _, b in penalty.gradients()] == [b.data_ptr() for _, b in pairs]
    assert penalty.terms() == []
    assert penalty.mode == "coupled"


def test_activations_of_several_tasks_are_summed_exactly() -> None:
    model = network()
    first = ActivationCovariance(model).fit(batches())
    penalty = KroneckerPenalty(model, first, strength=1.0)
    addresses = [t.data_ptr() for t in penalty.anchor.values()]
    move(model)
    second = ActivationCovariance(model).fit(batches())
    penalty.consolidate(second, decay=0.25)
    assert penalty.value() == 0
    for name, (a, g) in penalty.factors.items():
        size = len(a)
        sums = 0.25 * first.augmented[name] + second.augmented[name]
        torch.testing.assert_close(a, sums[:size, :size])
        assert g is None
    assert [t.data_ptr() for t in penalty.anchor.values()] == addresses


def test_kronecker_products_of_several_tasks_are_merged() -> None:
    model = network()
    fishers = [KroneckerFisher(model, "exact").fit(batches(1))]
    penalty = KroneckerPenalty(model, fishers[0])
    for _ in range(2):
        move(model)
        fishers.append(KroneckerFisher(model, "exact").fit(batches(1)))
        penalty.consolidate(fishers[-1], decay=0.5)
    assert penalty.value() == 0
    for name, (a, g) in penalty.factors.items():
        kept = torch.kron(g, a)
        terms = [torch.kron(f.factors[name].outputs, f.factors[name].inputs) for f in fishers]
        total = 0.25 * terms[0] + 0.5 * terms[1] + terms[2]
        assert 0.6 < (kept * total).sum() / kept.norm() / total.norm() < 1  # cosine
        assert (kept - total).norm() < min((term - total).norm() for term in terms)
    penalty.consolidate(fishers[0], decay=0.0)
    for name, (a, g) in penalty.factors.items():
        expected = fishers[0].factors[name]
        torch.testing.assert_close(torch.kron(g, a), torch.kron(expected.outputs, expected.inputs))


def test_half_precision_and_frozen_biases() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).bfloat16()
    model[0].bias.requires_grad_(False)
    x, y = torch.randn(4, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 1, 0])
    penalty = KroneckerPenalty(model, KroneckerFisher(model).fit([(x, y)]))
    assert list(penalty.anchor) == ["0.weight"]
    assert penalty.anchor["0.weight"].dtype == torch.float32
    move(model)
    assert penalty.refresh().dtype == torch.float32
    ((_, buffer),) = penalty.gradients()
    assert buffer.dtype == torch.float32
    (expected,) = torch.autograd.grad(penalty.value(), [model[0].weight])
    torch.testing.assert_close(buffer.bfloat16(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        inside = buffer.clone(), penalty.value()
        penalty.refresh()
    assert torch.equal(inside[0], buffer)
    assert torch.equal(inside[1], penalty.value())


def test_channels_last_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)
    a, g = torch.eye(13), torch.eye(4)
    penalty = KroneckerPenalty(model, {"0.weight": (a, g)})
    before = model[0].weight.detach().clone()
    move(model)
    penalty.refresh()
    torch.testing.assert_close(penalty.gradients()[0][1], model[0].weight.detach() - before)
    torch.testing.assert_close(penalty.anchor["0.weight"], before)


@pytest.mark.parametrize("kind", [KroneckerFisher, ActivationCovariance])
def test_state(kind: Any) -> None:
    model = network()
    penalty = KroneckerPenalty(model, kind(model).fit(batches()), strength=3.0)
    state = penalty.state_dict()
    assert state["estimator"] == ("sketch" if kind is KroneckerFisher else None)
    move(model)
    another = KroneckerPenalty(model, penalty.factors, strength=1.0)
    assert (another.estimator, another.sharing) == (None, None)
    addresses = [t.data_ptr() for t in another.anchor.values()]
    another.load_state_dict({k: dict(v) if isinstance(v, dict) else v for k, v in state.items()})
    assert another.strength == 3.0
    assert (another.estimator, another.sharing) == (state["estimator"], state["sharing"])
    assert torch.equal(another.value(), penalty.value())
    assert penalty.value() > 0
    assert [t.data_ptr() for t in another.anchor.values()] == addresses

    broken: list[tuple[dict[str, Any], str]] = [
        ({"strength": -1.0}, "strength must be finite"),
        ({"inputs": {}}, "inputs lacks '0.weight'"),
        ({"inputs": state["inputs"] | {"0.weight": torch.eye(2)}}, "the state's A of '0.weight'"),
        ({"anchor": state["anchor"] | {"4.weight": torch.eye(2)}}, "anchor of '4.weight'"),
        ({"more": 1}, "a KroneckerPenalty state is a mapping with keys"),
    ]
    if kind is KroneckerFisher:
        outputs = state["outputs"] | {"4.weight": torch.full((3, 3), torch.nan)}
        broken.append(({"outputs": outputs}, "the state's G of '4.weight' is not finite"))
    before = another.value()
    for change, says in broken:
        with pytest.raises(ValueError, match=re.escape(says)):
            another.load_state_dict(state | change)
        assert torch.equal(another.value(), before)


def test_the_recorded_source_is_of_all_factors() -> None:
    model = network()
    exact, reduced = (
        KroneckerFisher(model, "exact", sharing=sharing).fit(batches())
        for sharing in ("expand", "reduce")
    )
    penalty = KroneckerPenalty(model, exact)
    penalty.consolidate(exact)
    assert (penalty.estimator, penalty.sharing) == ("exact", "expand")
    penalty.consolidate(reduced)
    assert (penalty.estimator, penalty.sharing) == (None, None)
    penalty.consolidate(reduced, decay=0.0)
    assert (penalty.estimator, penalty.sharing) == ("exact", "reduce")
    with pytest.raises(TypeError, match="the state's sharing must be a name, got 3"):
        penalty.load_state_dict(penalty.state_dict() | {"sharing": 3})


def test_what_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2, bias=False))
    a, g = torch.eye(3), torch.eye(2)
    skew = torch.tensor([[1.0, 0.5], [-0.5, 1.0]])
    for factors, says in (
        ({}, "factors is empty"),
        ({"9.weight": (a, g)}, "factors names '9.weight'"),
        ({"1.weight": (a, g)}, "'1.weight' has shape (2,) and is no matrix"),
        ({"0.weight": (g, g)}, "A of '0.weight' has shape (2, 2), expected (3, 3)"),
        ({"0.weight": (a, a)}, "G of '0.weight' has shape (3, 3), expected (2, 2)"),
        ({"2.weight": (a, g)}, "has 3 rows for 2 columns and a bias, but"),
        ({"0.weight": (a * torch.inf, g)}, "A of '0.weight' is not finite"),
        ({"0.weight": (a, skew)}, "G of '0.weight' is not symmetric"),
        ({"0.weight": (-a, g)}, "A of '0.weight' has a negative diagonal"),
        ({"0.weight": (a, g), "2.weight": (g, None)}, "'2.weight' has no G, others have"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            KroneckerPenalty(model, factors)
    for wrong, says in (
        ([a], "factors must be a KroneckerFisher"),
        ({"0.weight": a}, "must be a pair (A, G)"),
        ({"0.weight": (a.int(), g)}, "must be floating point"),
        ({"0.weight": ("a", g)}, "must be a tensor"),
    ):
        with pytest.raises(TypeError, match=re.escape(says)):
            KroneckerPenalty(model, wrong)
    with pytest.raises(TypeError, match="model must be a"):
        KroneckerPenalty(a, {"0.weight": (a, g)})
    with pytest.raises(RuntimeError, match="not fitted"):
        KroneckerPenalty(model, KroneckerFisher(model))
    with pytest.raises(RuntimeError, match="not fitted"):
        KroneckerPenalty(model, ActivationCovariance(model))
    with pytest.raises(ValueError, match="strength"):
        KroneckerPenalty(model, {"0.weight": (a, g)}, strength=-1)

    penalty = KroneckerPenalty(model, {"0.weight": (a, g)})
    before = {n: t.clone() for n, t in penalty.anchor.items()}
    move(model)
    for factors, decay, says in (
        ({"0.weight": (a, g)}, 1.5, "decay must be a number in [0, 1]"),
        ({"2.weight": (g, None)}, 1.0, "'2.weight' has no G, others have"),
        ({"3.weight": (g, g)}, 1.0, "factors names '3.weight', which is not a parameter"),
        ({"0.weight": (a, None)}, 1.0, "G of '0.weight' is missing"),
        ({"0.weight": (torch.eye(4), g)}, 1.0, "A of '0.weight' has shape (4, 4)"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            penalty.consolidate(factors, decay=decay)
    assert all(torch.equal(before[n], t) for n, t in penalty.anchor.items())
    with pytest.raises(ValueError, match=r"G of '0.weight' is too much: .* without output"):
        KroneckerPenalty(model, {"0.weight": (a, None)}).consolidate({"0.weight": (a, g)})
