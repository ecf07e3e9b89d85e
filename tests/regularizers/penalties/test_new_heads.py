"""Tasks that bring parameters, or come after some are gone, which matter to no other task."""

import copy

import pytest
import torch
from ewc_models import move
from torch import nn

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    ActivationCovariance,
    AdaptiveStrength,
    DiagonalFisher,
    KroneckerPenalty,
    ProgressiveInheritance,
    SubspacePenalty,
    load_penalty,
    save_penalty,
)

STORAGES = {"full": 1e-12, "bfloat16": 1e-2, "compact": 2e-2}  # relative, by their rounding


class Heads(nn.Module):
    """A trunk and a head for each task."""

    def __init__(self, count):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(count))

    def forward(self, x):
        return self.heads[-1](self.trunk(x).tanh())


def grow(model):
    model.heads.append(nn.Linear(4, 2).to(model.trunk.weight.dtype))
    return model


def importances(model, seed, *skip):
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}
    return {n: t for n, t in found.items() if not n.startswith(skip)}


def anchored(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def factors(model, seed, *skip):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, p in model.named_parameters():
        if p.ndim == 2 and not name.startswith(skip):
            a = torch.randn(p.shape[1], p.shape[1], generator=generator, dtype=p.dtype)
            g = torch.randn(len(p), len(p), generator=generator, dtype=p.dtype)
            found[name] = a @ a.T, g @ g.T
    return found


@pytest.mark.parametrize(("storage", "tolerance"), STORAGES.items(), ids=STORAGES)
def test_tasks_with_heads_of_their_own_are_the_sum_of_their_penalties(storage, tolerance):
    """The second does not know the first's head, nor the first the second's."""
    model = Heads(1).double()
    tasks = [(importances(model, 1), anchored(model))]
    penalty = EWC(model, tasks[0][0], 3.0, storage=storage, layer_strengths={"heads.*": 2.0})
    addresses = [t.data_ptr() for term in penalty.terms() for t in term]
    move(grow(model), seed=5)
    tasks.append((importances(model, 2, "heads.0"), anchored(model)))
    penalty.add_task(tasks[1][0])
    kept = [t.data_ptr() for term in penalty.terms()[:4] for t in term]
    assert kept == addresses
    assert list(penalty.importance) == [n for n, _ in model.named_parameters()]
    assert torch.equal(
        penalty.anchor["heads.1.weight"], model.heads[1].weight.to(penalty.anchor["trunk.bias"])
    )
    assert penalty.version == 1
    penalty.add_task(importances(model, 3))
    tasks.append((importances(model, 3), anchored(model)))
    assert penalty.version == 1
    move(model, seed=7)
    parameters = dict(model.named_parameters())
    total = sum(
        1.5 * (2.0 if n.startswith("heads") else 1.0)
        * (f[n].double() * (parameters[n] - a[n]).square()).sum()
        for f, a in tasks for n in f
    )  # fmt: skip
    expected = torch.autograd.grad(total, list(parameters.values()))
    ours = torch.autograd.grad(penalty.value(), list(parameters.values()))
    for gradient, closed in zip(ours, expected, strict=True):
        scale = float(closed.abs().max())
        torch.testing.assert_close(gradient, closed, rtol=tolerance, atol=tolerance * scale)


def test_online_ewc_takes_a_new_head_and_lets_the_old_one_decay():
    model = Heads(1)
    first = importances(model, 1)
    penalty = EWC(model, first)
    move(grow(model), seed=5)
    second = importances(model, 2, "heads.0")
    penalty.consolidate(second, decay=0.5)
    for name, p in model.named_parameters():
        expected = 0.5 * first.get(name, torch.zeros_like(p)) + second.get(name, 0.0)
        torch.testing.assert_close(penalty.importance[name], expected)
        assert torch.equal(penalty.anchor[name], p)


def test_what_the_model_has_no_more_is_dropped():
    model = Heads(2)
    penalty = EWC(model, importances(model, 1), 2.0)
    kronecker = KroneckerPenalty(model, factors(model, 1))
    subspace = SubspacePenalty(model, {n: torch.tensor([0]) for n in factors(model, 1)})
    del model.heads[1]
    penalty.add_task(importances(model, 2))
    kronecker.consolidate(factors(model, 2))
    subspace.consolidate({n: torch.tensor([1]) for n in factors(model, 1)})
    names = [n for n, _ in model.named_parameters()]
    assert list(penalty.anchor) == names
    assert list(kronecker.factors) == list(subspace.anchor) == ["trunk.weight", "heads.0.weight"]
    assert penalty.version == kronecker.version == subspace.version == 1
    opt = ARSAdamW(model.parameters(), penalty=penalty)
    model(torch.ones(2, 3)).sum().backward()
    opt.step(loss=torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["ewc", "kronecker", "subspace"])
def test_a_parameter_in_the_place_of_another_is_refused_before_anything_changes(kind):
    model = Heads(1)
    if kind == "ewc":
        penalty, more = EWC(model, importances(model, 1)), lambda: importances(model, 2)
        calls = [penalty.add_task, penalty.consolidate]
    elif kind == "kronecker":
        penalty, more = KroneckerPenalty(model, factors(model, 1)), lambda: factors(model, 2)
        calls = [penalty.consolidate]
    else:
        penalty = SubspacePenalty(model, {"heads.0.weight": torch.tensor([0])})
        more, calls = lambda: {"heads.0.weight": torch.tensor([1])}, [penalty.consolidate]
    before = repr(penalty.state_dict())
    model.heads[0] = nn.Linear(4, 2)
    for call in calls:
        with pytest.raises(ValueError, match=r"'heads\.0\.weight' is another parameter of Heads"):
            call(more())
    assert repr(penalty.state_dict()) == before


def test_a_new_head_whose_importance_does_not_fit_changes_nothing():
    model = Heads(1)
    penalty = EWC(model, importances(model, 1), storage="compact")
    before = repr(penalty.state_dict())
    grow(model)
    good = importances(model, 2)
    for wrong, match in (
        (torch.ones(3), r"'heads.1.bias' has shape \(3,\)"),
        (-torch.ones(2), "'heads.1.bias' holds a negative value"),
        (torch.full((2,), torch.inf), "'heads.1.bias' holds a value that is not finite"),
    ):
        for call in (penalty.add_task, penalty.consolidate):
            with pytest.raises(ValueError, match=match):
                call(good | {"heads.1.bias": wrong})
    assert repr(penalty.state_dict()) == before
    assert penalty.version == 0


def test_kronecker_penalty_of_a_new_layer_is_that_of_its_first_factors():
    model = Heads(1).double()
    first = factors(model, 1)
    penalty = KroneckerPenalty(model, first, 2.0)
    move(grow(model), seed=5)
    second = factors(model, 2, "heads.0")
    penalty.consolidate(second, decay=0.5)
    anchor = anchored(model)
    move(model, seed=6)
    delta = model.heads[1].weight.detach() - anchor["heads.1.weight"]
    a, g = second["heads.1.weight"]
    value = torch.trace(g @ delta @ a @ delta.T)
    delta = model.heads[0].weight.detach() - anchor["heads.0.weight"]
    a, g = first["heads.0.weight"]
    value += 0.5 * torch.trace(g @ delta @ a @ delta.T)
    only_heads = KroneckerPenalty(model, second, 2.0)
    only_heads.load_state_dict(penalty.state_dict())
    trunk = KroneckerPenalty(model, {"trunk.weight": penalty.factors["trunk.weight"]}, 2.0)
    delta = model.trunk.weight.detach() - anchor["trunk.weight"]
    a, g = trunk.factors["trunk.weight"]
    value += torch.trace(g @ delta @ a @ delta.T)
    torch.testing.assert_close(penalty.value(), value, rtol=1e-10, atol=0)
    torch.testing.assert_close(only_heads.value(), value, rtol=1e-10, atol=0)
    assert penalty.version == 1
    assert [p for p, _ in penalty.gradients()] == [
        model.trunk.weight, model.heads[0].weight, model.heads[1].weight
    ]  # fmt: skip


def test_activations_of_two_tasks_with_a_head_each():
    """Each head has its own task's data, and the trunk both tasks'."""
    model, x, y = Heads(1), torch.randn(6, 3), torch.randn(9, 3)
    first = ActivationCovariance(model).fit([x])
    grow(model)
    with pytest.warns(UserWarning, match="heads.0"):
        second = ActivationCovariance(model).fit([y])
    both = second.merge(first)
    other = first.merge(second)
    for name in ("trunk.weight", "heads.0.weight", "heads.1.weight"):
        torch.testing.assert_close(both.covariance[name], other.covariance[name])
    torch.testing.assert_close(
        both.covariance["heads.0.weight"], first.covariance["heads.0.weight"]
    )
    xy = torch.cat([x, y])
    torch.testing.assert_close(both.covariance["trunk.weight"], xy.T @ xy / 15)
    penalty = KroneckerPenalty(model, first)
    penalty.consolidate(second)
    assert set(penalty.factors) == {"trunk.weight", "heads.0.weight", "heads.1.weight"}


@pytest.mark.parametrize("implementation", [{"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("kind", ["ewc", "kronecker", "progressive"])
def test_an_optimizer_goes_on_with_what_its_penalty_has_taken_in(kind, implementation):
    """As a new optimizer with the same state would."""
    model = Heads(1)
    if kind == "kronecker":
        penalty = KroneckerPenalty(model, factors(model, 1), 0.2)
    else:
        penalty = EWC(model, importances(model, 1), 0.2)
    held = penalty
    if kind == "progressive":
        subspace = SubspacePenalty(model, {"trunk.weight": torch.tensor([1])}, 0.1)
        held = ProgressiveInheritance(penalty, subspace)
    opt = ARSAdamW(model.parameters(), lr=0.05, penalty=held, **implementation)

    def step(optimizer, of):
        optimizer.zero_grad()
        loss = of(torch.linspace(-1, 1, 6).view(2, 3)).square().sum()
        loss.backward()
        optimizer.step(loss=loss.detach())

    step(opt, model)
    move(grow(model), seed=5)
    more = factors(model, 2) if kind == "kronecker" else importances(model, 2)
    penalty.consolidate(more)
    if kind == "progressive":
        held.subspace.consolidate({n: torch.tensor([0]) for n in factors(model, 1)})
    before = anchored(model)
    with pytest.raises(ValueError, match=r"heads\.1\..*add_param_group"):
        step(opt, model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    opt.add_param_group({"params": model.heads[1].parameters()})
    move(model, seed=6)
    twin, copied = copy.deepcopy((model, held))
    other = ARSAdamW(twin.parameters(), lr=0.05, penalty=copied, **implementation)
    state = copy.deepcopy(opt.state_dict())
    for entry in state["state"].values():
        entry.pop("beta_products_step", None)
    state["param_groups"] = [state["param_groups"][0] | {"params": list(range(6))}]
    other.load_state_dict(state)
    for _ in range(3):
        step(opt, model)
        step(other, twin)
        for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q), (n, (p - q).abs().max(), opt.diagnostics, other.diagnostics)
        # Added up in another order, in float32: one has two groups.
        value = float(other.diagnostics["penalty"])
        assert float(opt.diagnostics["penalty"]) == pytest.approx(value, rel=1e-6)
        assert value > 0


@pytest.mark.parametrize("storage", STORAGES)
def test_a_file_of_more_tasks_goes_into_a_penalty_of_the_first(storage, tmp_path):
    pytest.importorskip("safetensors")
    model = Heads(1)
    penalty = EWC(model, importances(model, 1), storage=storage)
    move(grow(model), seed=5)
    penalty.add_task(importances(model, 2))
    save_penalty(penalty, tmp_path / "ewc")
    again = EWC(model, importances(model, 9, "heads.1"), 4.0, storage=storage)
    opt = ARSAdamW(model.parameters(), penalty=again)
    load_penalty(again, tmp_path / "ewc")
    assert repr(again.state_dict()) == repr(penalty.state_dict())
    assert again.version == 1
    move(model, seed=6)
    sum(p.square().sum() for p in model.parameters()).backward()
    value = again.value().item()
    opt.step(loss=torch.tensor(1.0))
    assert float(opt.diagnostics["penalty"]) == pytest.approx(value, rel=1e-5)
    subspace = SubspacePenalty(model, {n: torch.tensor([0]) for n in factors(model, 1)})
    save_penalty(subspace, tmp_path / "subspace")
    fewer = SubspacePenalty(model, {"trunk.weight": torch.tensor([1, 2])})
    load_penalty(fewer, tmp_path / "subspace")
    assert repr(fewer.state_dict()) == repr(subspace.state_dict())
    kronecker = KroneckerPenalty(model, factors(model, 1))
    save_penalty(kronecker, tmp_path / "kronecker")
    fewer = KroneckerPenalty(model, factors(model, 3, "heads"))
    load_penalty(fewer, tmp_path / "kronecker")
    assert repr(fewer.state_dict()) == repr(kronecker.state_dict())
    older = EWC(Heads(1), importances(Heads(1), 1), storage=storage)
    with pytest.raises(ValueError, match=r"has 'heads.1.weight', which this penalty does not hold"):
        load_penalty(older, tmp_path / "ewc")


def test_a_fitted_fisher_of_the_grown_model_and_an_adaptive_strength():
    model = Heads(1)
    batch = torch.randn(5, 3), torch.arange(5) % 2
    penalty = EWC(model, DiagonalFisher(model, "exact").fit([batch]), 1.0)
    adaptive = AdaptiveStrength(penalty, ratio=0.5, smoothing=0.0)
    move(grow(model), seed=5)
    penalty.add_task(DiagonalFisher(model, "exact").fit([batch]))
    assert (penalty.importance["heads.1.weight"] > 0).any()
    move(model, seed=6)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    adaptive.step()
    task = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    unit = torch.stack([
        ((p - penalty.anchor[n]) * penalty.importance[n]).norm()
        for n, p in model.named_parameters()
    ]).norm()  # fmt: skip
    torch.testing.assert_close(penalty.strength, 0.5 * task / unit, rtol=1e-5, atol=0)
