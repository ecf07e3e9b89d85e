"""ProgressiveInheritance; CombinedLoss, warnings of its monitor and of a collapsed importance."""

import copy
import warnings

import pytest
import torch
from ewc_models import move, random_importance, small_model

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    CombinedLoss,
    Distillation,
    KroneckerPenalty,
    PenaltyMonitor,
    ProgressiveInheritance,
    SubspacePenalty,
)


def penalties(model, strength=1e-3):
    basis = torch.linalg.qr(torch.randn(4, 2, dtype=torch.float64)).Q
    return (
        EWC(model, random_importance(model), strength),
        SubspacePenalty(model, {"2.weight": basis}, strength),
    )


def task_loss(model):
    return model(torch.ones(2, 3, dtype=model[0].weight.dtype)).square().sum() + 1.0


@pytest.mark.parametrize("joined", [False, True])
def test_is_the_sum_of_its_parts(joined):
    model = small_model(torch.float64)
    ewc, subspace = penalties(model)
    given = [ProgressiveInheritance(ewc, subspace)] if joined else [ewc, subspace]
    loss_of = CombinedLoss(*given, l2=0.5, model=model)
    move(model)
    expected = {
        "task": task_loss(model),
        "ewc": ewc.value(),
        "subspace": subspace.value(),
        "l2": 0.25 * sum(p.square().sum() for p in model.parameters()),
    }
    total = loss_of(task_loss(model))
    assert list(loss_of.parts) == [*expected, "total"]
    for name, part in expected.items():
        assert not loss_of.parts[name].requires_grad
        assert loss_of.parts[name].item() == pytest.approx(part.item(), rel=1e-14)
    torch.testing.assert_close(total, sum(expected.values()), rtol=1e-14, atol=0.0)
    assert loss_of.parts["total"].item() == total.item()
    ours = torch.autograd.grad(total, list(model.parameters()))
    theirs = torch.autograd.grad(sum(expected.values()), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_penalties_of_one_kind_are_one_part():
    model = small_model(torch.float64)
    ewc, _ = penalties(model)
    loss_of = CombinedLoss(ewc, ewc)
    move(model)
    loss_of(task_loss(model))
    assert loss_of.parts["ewc"].item() == pytest.approx(2 * ewc.value().item(), rel=1e-14)


def test_any_object_with_a_value_will_do():
    class Constant:
        def value(self):
            return torch.tensor(0.25)

    loss_of = CombinedLoss(Constant())
    assert loss_of(torch.tensor(1.0)).item() == 1.25
    assert loss_of.parts["Constant"].item() == 0.25


def messages(monitor, *observations):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for observation in observations:
            monitor.observe(*observation)
    return [str(warning.message) for warning in caught]


def test_monitor_warns_once_of_each():
    monitor = PenaltyMonitor()
    assert messages(monitor, (1.0, 0.9, 0.5), (1.0, 1.0, 0.5), (-1.0, 0.5, 0.4)) == []
    (message,) = messages(monitor, (1.0, 1.1), (1.0, torch.tensor(9.0)))
    assert "the penalty, 1.1, exceeds the task loss, 1" in message
    assert "Lower its strength" in message
    (message,) = messages(monitor, (1.0, 0.9, 0.6), (1.0, 0.9, 0.7))
    assert "the subspace penalty, 0.6, exceeds half of the task loss" in message
    (message,) = messages(monitor, *[(1.0, 0.0)] * 5)
    assert "was exactly 0 3 times: it protects nothing" in message


def test_monitor_lets_a_penalty_start_at_zero():
    assert messages(PenaltyMonitor(), *[(1.0, 0.0), (1.0, 0.0), (1.0, 1e-30)] * 3) == []


def test_a_monitor_goes_on_from_its_state() -> None:
    first, second = PenaltyMonitor(), PenaltyMonitor()
    assert len(messages(first, (1.0, 5.0), (1.0, 0.0), (1.0, 0.0))) == 1
    second.load_state_dict(first.state_dict())
    (message,) = messages(second, (1.0, 0.0), (1.0, 5.0))  # the third 0, and what has been said
    assert "exactly 0" in message


def test_combined_loss_looks_now_and_then():
    model = small_model(torch.float64)
    ewc, _ = penalties(model, strength=1e6)
    loss_of = CombinedLoss(ewc, check_every=3)
    loss_of(task_loss(model))
    move(model)
    loss_of(task_loss(model))
    loss_of(task_loss(model))
    with pytest.warns(UserWarning, match="exceeds the task loss") as caught:
        loss_of(task_loss(model))
    assert caught[0].filename == __file__
    for _ in range(6):
        loss_of(task_loss(model))


def test_a_penalty_of_another_copy_of_the_model_is_noticed():
    ewc, _ = penalties(small_model(torch.float64))
    trained = small_model(torch.float64)
    loss_of = CombinedLoss(ewc, check_every=1)
    loss_of(task_loss(trained))
    loss_of(task_loss(trained))
    with pytest.warns(UserWarning, match="built for another copy of the model"):
        loss_of(task_loss(trained))


def test_a_collapsed_importance_is_noticed():
    model = torch.nn.Linear(10, 10, bias=False)
    importance = torch.full((10, 10), 1e-13)
    importance[0, 0] = 1.0
    with pytest.warns(UserWarning, match="collapsed: 99 of 100 entries are below 1e-12.*sketch"):
        EWC(model, {"weight": importance})
    importance[0, 1] = 1.0
    penalty = EWC(model, {"weight": importance})
    with pytest.warns(UserWarning, match="collapsed: 100 of 100"):
        penalty.consolidate({"weight": torch.zeros(10, 10)})


def test_refuses_wrong_arguments():
    model = small_model()
    with pytest.raises(TypeError, match=r"penalty Sequential has no method value\(\)"):
        CombinedLoss(model)
    with pytest.raises(ValueError, match="nothing to add"):
        CombinedLoss()
    with pytest.raises(ValueError, match="l2 must be finite and >= 0, got -1"):
        CombinedLoss(l2=-1.0, model=model)
    with pytest.raises(ValueError, match=r"l2=1.0 needs to know the parameters; pass model"):
        CombinedLoss(l2=1.0)
    with pytest.raises(ValueError, match="check_every must be an integer >= 1"):
        CombinedLoss(l2=1.0, model=model, check_every=0)
    with pytest.raises(ValueError, match=r"task must be a 0-d tensor, got \(2,\)"):
        CombinedLoss(l2=1.0, model=model)(torch.ones(2))
    with pytest.raises(ValueError, match="task must be a 0-d tensor, got float"):
        CombinedLoss(l2=1.0, model=model)(1.0)


def test_distillation_belongs_to_the_task_loss():
    distillation = Distillation(small_model())
    with pytest.raises(TypeError, match=r"add its value\(inputs, logits\) to the task's loss"):
        CombinedLoss(distillation)


def progressive(model, seed=1, mode="coupled"):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(4, 2, generator=generator, dtype=torch.float64)).Q
    ewc = EWC(model, random_importance(model, seed=seed), 3.0, mode)
    return ProgressiveInheritance(ewc, SubspacePenalty(model, {"2.weight": basis}, 5.0))


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
def test_members_of_the_protocol_are_those_of_the_parts(mode):
    model = small_model(torch.float64)
    penalty = progressive(model, mode=mode)
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


def test_progressive_state_round_trip_and_all_or_nothing(tmp_path):
    model = small_model()
    saved = progressive(model)
    torch.save(saved.state_dict(), tmp_path / "penalty.pt")
    state = torch.load(tmp_path / "penalty.pt", weights_only=True)
    move(model)
    loaded = progressive(model, seed=9)
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


def test_progressive_refuses_other_parts():
    model = small_model()
    penalty = progressive(model)
    with pytest.raises(TypeError, match="ewc must be of class EWC, got SubspacePenalty"):
        ProgressiveInheritance(penalty.subspace, penalty.ewc)
    kinds = "SubspacePenalty or KroneckerPenalty"
    with pytest.raises(TypeError, match=f"subspace must be of class {kinds}, got NoneType"):
        ProgressiveInheritance(penalty.ewc, None)


def _with_kronecker(model, mode="coupled"):
    """What the factors leave out, the biases, is held by the EWC."""
    generator = torch.Generator().manual_seed(3)

    def factor(size):
        half = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return half @ half.T

    weights = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    factors = {n: (factor(w.shape[1]), factor(w.shape[0])) for n, w in weights.items()}
    biases = {n: f for n, f in random_importance(model).items() if n not in weights}
    ewc = EWC(model, biases, 3.0, mode)
    return ProgressiveInheritance(ewc, KroneckerPenalty(model, factors, 5.0))


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
def test_ewc_and_kronecker_in_one_step_are_each_of_them(mode):
    stepped = []
    for parts in (("ewc",), ("subspace",), ()):
        model = small_model(torch.float64)
        whole = _with_kronecker(model, mode)
        move(model)
        penalty = getattr(whole, parts[0]) if parts else whole
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = ARSAdamW(model.parameters(), lr=1e-2, ars=None, penalty=penalty)
        task_loss(model).backward()
        expected = whole.ewc.value() if parts == ("ewc",) else penalty.value()
        optimizer.step()
        if parts != ("ewc",) or mode == "coupled":
            assert optimizer.diagnostics["penalty"].item() == pytest.approx(expected.item())
        stepped.append({n: p.detach() - before[n] for n, p in model.named_parameters()})
    ewc, kronecker, both = stepped
    for name, change in both.items():  # biases by the one, weights by the other
        alone = ewc if name.endswith("bias") else kronecker
        torch.testing.assert_close(change, alone[name], rtol=1e-12, atol=0)
        assert not torch.equal(change, (kronecker if name.endswith("bias") else ewc)[name])


def test_ewc_and_kronecker_have_names_a_state_and_no_projection():
    model = small_model()
    saved = _with_kronecker(model)
    state = copy.deepcopy(saved.state_dict())
    move(model)
    assert list(saved.parts()) == ["ewc", "KroneckerPenalty"]
    assert saved.value().item() == pytest.approx(sum(v.item() for v in saved.parts().values()))
    loss_of = CombinedLoss(saved)
    loss_of(100 * task_loss(model))
    assert list(loss_of.parts) == ["task", "ewc", "KroneckerPenalty", "total"]
    loaded = _with_kronecker(model)
    loaded.subspace.strength = 7.0
    broken = dict(state, subspace=dict(state["subspace"], estimator=3))
    with pytest.raises(TypeError, match="estimator"):
        loaded.load_state_dict(broken)
    assert loaded.value().item() == 0.0
    assert loaded.subspace.strength == 7.0
    loaded.load_state_dict(state)
    assert loaded.value().item() == pytest.approx(saved.value().item())
    assert loaded.subspace.strength == 5.0
    with pytest.raises(TypeError, match="no subspace to project on"):
        loaded.project_()
