"""torch's optimizer tests of training: the right direction, groups, schedulers, odd gradients.

Covers ``test_forloop_goes_right_direction`` (for every implementation),
``test_param_group_with_lrscheduler_goes_right_direction``, ``test_param_groups_weight_decay``,
``test_param_groups_lr``, ``test_step_is_noop_when_params_have_no_grad``,
``test_step_is_noop_for_zero_grads``, ``test_errors`` and ``test_fused_error_on_params_on_meta``.
"""

import inspect

import pytest
import torch
from optimizers import Pull
from torch_suite import (
    CLASSES,
    FLAGS,
    INFOS,
    KERNELS_TOO,
    advance,
    affine,
    cases,
    clones,
    common_optimizers,
)

from ars import ARSAdam, ARSAdamW


def train(case, optimizer, forward, schedulers=(), steps=20):
    """Train, and check that the loss went where it should."""
    first = forward().item()
    for _ in range(steps):
        loss = forward()
        optimizer.step()
        advance(schedulers, loss)
    assert (forward().item() < first) is case.falls


@pytest.mark.parametrize("contiguous", [True, False])
@cases()
def test_goes_right_direction(case, contiguous):
    params, forward = affine(contiguous=contiguous)
    train(case, case.build(params), forward)


@cases()
def test_param_group_with_lrscheduler_goes_right_direction(case):
    for constructors in case.info.scheduler_inputs:
        params, forward = affine()
        optimizer = case.build([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}])
        train(case, optimizer, forward, [build(optimizer) for build in constructors], steps=8)


@cases(implementations=KERNELS_TOO)
def test_onecycle_cycles_the_betas(case):
    """The values are torch's, but for what a gate takes."""

    def run(build, params):
        optimizer, betas, rates = build(params), [], []
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
        for _ in range(8):
            forward(params)
            optimizer.step()
            scheduler.step()
            betas.append(optimizer.param_groups[0]["betas"][0])
            rates.append(float(optimizer.param_groups[0]["lr"]))
        return optimizer, betas, rates

    params, forward = affine()
    copies = clones(params)
    ours, betas, rates = run(case.build, params)
    _, *expected = run(case.theirs, copies)
    assert [betas, rates] == expected
    assert len(set(betas)) == 8
    if case.ars is None:
        torch.testing.assert_close(params, copies)
    else:
        # The gate takes its part of the betas where it is on them; the default's is on the rate.
        gate = float(ours.diagnostics["phi"]) if "betas" in case.ars.gate else 1.0
        assert float(ours.diagnostics["beta1"]) == pytest.approx(betas[-2] * gate)
        factor = 1 + float(ours.diagnostics["chi"])
        if "lr" in case.ars.gate:
            factor *= float(ours.diagnostics["phi"])
        assert float(ours.diagnostics["lr"]) == pytest.approx(rates[-2] * factor)
        assert all(torch.isfinite(param).all() for param in params)


@cases()
def test_param_groups_weight_decay(case):
    """Every argument may stand in the group; the group without decay decays nothing."""
    params, forward = affine()
    still = torch.nn.Parameter(torch.ones(3))
    still.grad = torch.zeros(3)
    kwargs = [case.kwargs, case.kwargs | {"weight_decay": 0.0}]
    groups = [{"params": params[:1], **kwargs[0]}, {"params": [params[1], still], **kwargs[1]}]
    train(case, case.cls(groups, ars=case.ars), forward)
    assert (still == 1).all()


@cases()
def test_param_groups_lr(case):
    """A group of learning rate 1e-28 does not move."""
    params, forward = affine()
    irrelevant = torch.nn.Parameter(torch.randn(2))
    before = irrelevant.detach().clone()
    given = {"lr": 1e-3} | case.kwargs
    groups = [{"params": params, **given}, {"params": [irrelevant]}]
    optimizer = case.cls(groups, lr=1e-28, ars=case.ars, foreach=given.get("foreach"))

    def with_gradient():
        irrelevant.grad = torch.rand(2)
        return forward()

    train(case, optimizer, with_gradient)
    assert torch.equal(irrelevant, before)


@cases(implementations=FLAGS)
def test_step_is_noop_when_params_have_no_grad(case):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [param.clone() for param in params]
    optimizer = case.build(params)
    loss = torch.ones(1)
    assert optimizer.step(lambda: loss) is loss
    assert all(map(torch.equal, params, before))
    assert not optimizer.state
    if case.ars is not None:
        assert int(optimizer.controller.counts.sum()) == 0


@cases(implementations=FLAGS)
def test_step_is_noop_for_zero_grads(case):
    param = torch.randn(5, 1, requires_grad=True)
    param = param.clone() if case.given.get("differentiable") else param
    before = param.detach().clone()
    param.grad = torch.zeros_like(before)
    optimizer = case.build([param], weight_decay=0.0)
    for _ in range(3):
        optimizer.step(lambda: torch.ones(1))
    assert torch.equal(param, before)
    state = optimizer.state[param]
    assert not any(state[name].any() for name in state.keys() - {"step"})


@pytest.mark.parametrize("sparse", [0, 1])
@cases(every_input=False)
def test_sparse_gradient_is_refused(case, sparse):
    """Before anything moves, whichever group it is in."""
    params = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    before = [param.detach().clone() for param in params]
    for i, param in enumerate(params):
        grad = torch.ones(3, 2)
        param.grad = grad.to_sparse() if i == sparse else grad
    optimizer = case.build([{"params": [param]} for param in params])
    remedy = r"does not support sparse gradients.*an embedding with sparse=False"
    with pytest.raises(RuntimeError, match=remedy):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert all(int(state["step"]) == 0 for state in optimizer.state.values() if state)


ERRORS = [
    pytest.param(cls, error, id=f"{cls.__name__}-{error.optimizer_error_input.desc}")
    for cls in CLASSES
    for error in INFOS[cls].optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


@pytest.mark.parametrize(("cls", "error"), ERRORS)
def test_errors(cls, error):
    given = error.optimizer_error_input
    # Torch warns of what will be an error in future; to our kernels it is one now.
    error_type = ValueError if issubclass(error.error_type, Warning) else error.error_type
    expected = pytest.raises(error_type, match=error.error_regex)
    if error.error_on == common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with expected:
            cls(given.params, **given.kwargs)
    else:
        optimizer = cls(given.params, **given.kwargs)
        with expected:
            optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_torchs_arguments_are_ours_with_the_same_defaults(cls):
    theirs = inspect.signature(INFOS[cls].optim_cls).parameters
    ours = inspect.signature(cls).parameters
    assert len(theirs) >= 11
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind
    positional = [name for name in ours if ours[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == [
        name for name in theirs if theirs[name].kind is not inspect.Parameter.KEYWORD_ONLY
    ]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("flag", ["fused", "foreach"])
@cases(implementations=[""])
def test_explicit_choice_on_meta_parameters(case, flag, swap):
    """The step refuses them; once they have data it steps, if they are still the optimizer's."""
    with torch.device("meta"):
        model = torch.nn.Linear(2, 3)
    optimizer = case.build(model.parameters(), **{flag: True})
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=f"`{flag}=True` requires all the params to be"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for param in model.parameters():
        torch.nn.init.zeros_(param)
        param.grad = torch.ones_like(param)
    optimizer.step()  # without the swap these are other parameters, as in torch
    moved = [bool(param.detach().abs().min() > 1e-4) for param in model.parameters()]
    assert moved == [swap, swap]
    optimizer.load_state_dict(optimizer.state_dict())


def test_penalty_is_checked_again_where_the_parameters_are():
    param, empty = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3).to("meta"))
    penalty = Pull([param])
    optimizer = ARSAdamW([("weight", param)], penalty=penalty)
    torch.utils.swap_tensors(param, empty)
    param.grad = torch.empty_like(param)
    with pytest.raises(ValueError, match="anchor of weight is on cpu, the parameter on meta"):
        optimizer.step()
    penalty.rows = [(param, torch.empty_like(param), torch.empty_like(param))]
    with pytest.raises(ValueError, match="anchor of weight is on the meta device"):
        ARSAdamW([("weight", param)], penalty=penalty)


@cases(every_input=False)
def test_group_without_parameters(case):
    """It may stand alone until another group is added."""
    params, forward = affine()
    optimizer = case.build([{"params": []}])
    optimizer.step()
    optimizer.add_param_group({"params": params})
    train(case, optimizer, forward)


def test_the_defaults_are_torchs_and_ours():
    for cls, theirs in ((ARSAdam, torch.optim.Adam), (ARSAdamW, torch.optim.AdamW)):
        assert issubclass(cls, torch.optim.Adam)
        defaults = cls([torch.ones(1)]).defaults
        expected = theirs([torch.ones(1)]).defaults
        assert {name: defaults[name] for name in expected} == expected
