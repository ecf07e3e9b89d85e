"""ProgressiveInheritance: the two parts, together, and nothing else."""

import pytest
import torch
from ewc_models import move, random_importance, small_model

from ars.regularizers import EWC, ProgressiveInheritance, SubspacePenalty


def build(model, seed=1, mode="coupled"):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(4, 2, generator=generator, dtype=torch.float64)).Q
    ewc = EWC(model, random_importance(model, seed=seed), 3.0, mode)
    return ProgressiveInheritance(ewc, SubspacePenalty(model, {"2.weight": basis}, 5.0))


def test_value_is_the_formula():
    """1/2 lambda sum Omega dW^2 + gamma Tr(P dW^T dW P), in closed form and through autograd."""
    model = small_model(torch.float64)
    penalty = build(model)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    move(model)
    basis = penalty.subspace.bases["2.weight"]
    projector = basis @ basis.T
    delta = {n: p - anchor[n] for n, p in model.named_parameters()}
    expected = 1.5 * sum((o * delta[n] ** 2).sum() for n, o in penalty.ewc.importance.items())
    part = delta["2.weight"] @ projector
    expected = expected + 5.0 * torch.trace(part @ part.T)
    torch.testing.assert_close(penalty.value(), expected, rtol=1e-13, atol=0.0)
    ours = torch.autograd.grad(penalty.value(), list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    parts = penalty.parts()
    assert list(parts) == ["ewc", "subspace"]
    assert sum(parts.values()).item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
def test_members_of_the_protocol_are_those_of_the_parts(mode):
    model = small_model(torch.float64)
    penalty = build(model, mode=mode)
    assert penalty.mode == mode
    assert penalty.strength == 3.0
    penalty.strength = 4.0
    assert penalty.ewc.strength == 4.0
    move(model)
    # The step adds the value of the terms itself.
    assert penalty.refresh().item() == pytest.approx(penalty.parts()["subspace"].item(), rel=1e-13)
    (pair,) = penalty.gradients()
    (expected,) = penalty.subspace.gradients()
    assert all(a is b for a, b in zip(pair, expected, strict=True))
    assert [t.data_ptr() for term in penalty.terms() for t in term] == [
        t.data_ptr() for term in penalty.ewc.terms() for t in term
    ]
    penalty.project_()
    assert penalty.parts()["subspace"].item() < 1e-24
    assert penalty.parts()["ewc"].item() > 0


def test_state_round_trip_and_all_or_nothing(tmp_path):
    model = small_model()
    saved = build(model)
    torch.save(saved.state_dict(), tmp_path / "penalty.pt")
    state = torch.load(tmp_path / "penalty.pt", weights_only=True)
    move(model)
    loaded = build(model, seed=9)
    loaded.strength = 8.0
    broken = dict(state, subspace=dict(state["subspace"], side="output"))
    with pytest.raises(ValueError, match="side='output', this penalty 'input'"):
        loaded.load_state_dict(broken)
    assert loaded.value().item() == 0.0
    assert loaded.strength == 8.0
    with pytest.raises(ValueError, match=r"keys \['ewc', 'subspace'\], got \['ewc'\]"):
        loaded.load_state_dict({"ewc": state["ewc"]})
    loaded.load_state_dict(state)
    assert loaded.value().item() == saved.value().item() > 0


def test_refuses_other_parts():
    model = small_model()
    penalty = build(model)
    with pytest.raises(TypeError, match="ewc must be of class EWC, got SubspacePenalty"):
        ProgressiveInheritance(penalty.subspace, penalty.ewc)
    with pytest.raises(TypeError, match="subspace must be of class SubspacePenalty, got NoneType"):
        ProgressiveInheritance(penalty.ewc, None)
