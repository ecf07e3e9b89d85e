"""torch's optimizer tests that compare values: with torch's class, and between implementations.

Covers ``test_foreach_matches_forloop``, ``test_fused_matches_forloop``, ``test_tensor_lr``,
``test_complex``, ``test_complex_2d`` and ``test_set_default_dtype_works_with_foreach``, the last
also for the other implementations.
"""

import pytest
import torch
from torch_suite import CLASSES, IMPLEMENTATIONS, INFOS, KERNELS_TOO, affine, assert_same, cases

ITERATIONS = 7


def network(dtype):
    """torch's own model for this, a 0-d parameter, an empty one, a misaligned and a strided one."""
    torch.manual_seed(1)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
    draw = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    others = [draw(), draw(0, 3), draw(38)[1:], draw(5, 3, 2)[..., 1], draw(4, 6).t()]
    return model, [*model.parameters(), *(other.requires_grad_() for other in others)]


def train_alike(builders, dtype, check, *, strided=True):
    """Train one network with each optimizer; after each step check, and copy the first's values.

    On the way all gradients are missing once, a layer is frozen and thawed, and the gradients of
    the tensors that are in no model are drawn anew.
    """
    inputs = torch.arange(1, 7, dtype=dtype).div(10).reshape(3, 2)
    runs = []
    for build in builders:
        model, params = network(dtype)
        if not strided:
            params = params[:-2]
        runs.append((model, params, build(params)))
    for step in range(ITERATIONS):
        for model, params, optimizer in runs:
            optimizer.zero_grad()
            if step in (3, 5):
                model[2].requires_grad_(step == 5)
            if step != 2:
                model(inputs).sum().backward()
                generator = torch.Generator().manual_seed(step)
                for param in params[4:]:
                    noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                    param.grad = noise.to(dtype)
            optimizer.step()
        (_, first, expected), *others = runs
        for _, params, optimizer in others:
            for a, b in zip(params, first, strict=True):
                check(a.detach(), b.detach())
                ours, theirs = optimizer.state[a], expected.state[b]
                assert ours.keys() >= theirs.keys()
                for name in theirs:
                    check(ours[name], theirs[name])
                    ours[name].copy_(theirs[name])
                with torch.no_grad():
                    a.copy_(b)
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@cases(implementations=KERNELS_TOO, controllers=["off"], kernels_every_input=True)
def test_without_a_controller_it_is_torch(case, dtype):
    """The fused step bitwise, the others to the default tolerance."""
    if case.given.get("fused"):
        # torch's fused step needs dense tensors, as ours on a GPU does.
        train_alike([case.theirs, case.build], dtype, assert_same, strided=False)
    else:
        dense = case.kernels  # as the kernels, too
        train_alike([case.theirs, case.build], dtype, torch.testing.assert_close, strided=not dense)


@cases(implementations=["foreach", "fused"])
def test_foreach_and_fused_match_the_loop(case):
    """Parameters and all of the state, in float64."""
    loop = {"foreach": False, "fused": False}
    check = torch.testing.assert_close
    (_, _, a), (_, _, b) = train_alike(
        [lambda params: case.build(params, **loop), case.build], torch.float64, check
    )
    for name, value in a.diagnostics.items():
        check(b.diagnostics[name], value, equal_nan=True, msg=name)


# One unit in the last place of a bfloat16, where the sums were rounded in another order.
TOLERANCES = {torch.bfloat16: {"rtol": 5e-3, "atol": 1e-5}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@cases(implementations=["foreach", "fused"], dtype=torch.float16)
def test_foreach_and_fused_match_the_loop_in_other_dtypes(case, dtype):
    def check(a, b):
        torch.testing.assert_close(a, b, **TOLERANCES.get(a.dtype, {}))

    loop = {"foreach": False, "fused": False}
    train_alike([lambda params: case.build(params, **loop), case.build], dtype, check)


@pytest.mark.parametrize("dims", [0, 2])
@cases(implementations=KERNELS_TOO)
def test_tensor_lr(case, dims):
    """A 1-element tensor of any shape is the number it holds, also when a scheduler writes it."""
    params, forward = affine()
    copies = [param.detach().clone().requires_grad_() for param in params]
    copies.append(torch.zeros((), requires_grad=True))
    params.append(torch.zeros((), requires_grad=True))
    lr = torch.full((1,) * dims, 1e-3)
    number = case.build(params, lr=float(lr))
    if case.given.get("foreach"):
        with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
            case.build(copies, lr=lr)
        return
    tensor = case.build(copies, lr=lr)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (number, tensor)]
    for _ in range(5):
        for mine in (params, copies):
            forward(mine)
            mine[2].grad = torch.ones(())
        number.step()
        tensor.step()
        for a, b in zip(params, copies, strict=True):
            torch.testing.assert_close(a, b)
        for scheduler in schedulers:
            scheduler.step()
    assert tensor.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.25e-3)
    assert float(tensor.diagnostics["lr"]) == pytest.approx(float(number.diagnostics["lr"]))


@pytest.mark.parametrize("dims", [0, 3])
@cases(implementations=["loop", "fused"])
def test_tensor_betas(case, dims):
    params, forward = affine()
    copies = [param.detach().clone().requires_grad_() for param in params]
    betas = (0.7, 0.8)
    optimizers = (
        case.build(params, betas=betas),
        case.build(copies, betas=tuple(torch.full((1,) * dims, beta) for beta in betas)),
    )
    for _ in range(5):
        for mine, optimizer in zip((params, copies), optimizers, strict=True):
            forward(mine)
            optimizer.step()
    torch.testing.assert_close(params, copies)


@cases()
def test_complex_is_its_real_view(case):
    shapes = ((10, 5), (10,))
    params = [torch.randn(shape, dtype=torch.complex64) for shape in shapes]
    real = [torch.view_as_real(param).clone().requires_grad_() for param in params]
    params = [param.requires_grad_() for param in params]
    params.append(torch.randn(10, 5, requires_grad=True))  # the two kinds may be mixed
    real.append(params[2].detach().clone().requires_grad_())
    ours, theirs = case.build(params), case.build(real)
    for _ in range(3):
        for a, b in zip(params, real, strict=True):
            b.grad = torch.randn_like(b)
            a.grad = torch.view_as_complex(b.grad) if a.is_complex() else b.grad
        ours.step()
        theirs.step()
        for a, b in zip(params, real, strict=True):
            a = torch.view_as_real(a) if a.is_complex() else a
            torch.testing.assert_close(a.detach(), b.detach())


@cases()
def test_complex_is_its_two_parts(case):
    """On Rosenbrock's function of a complex pair, whose parts are in a tensor each."""

    def loss(pair):
        x, y = pair
        return ((1 - x) ** 2 + 100 * (y - x**2) ** 2).abs()

    pair = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    parts = [p.clone().requires_grad_() for p in (pair.real.detach(), pair.imag.detach())]
    ours, theirs = case.build([pair]), case.build(parts)
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        values = loss(pair), loss(torch.complex(*parts))
        torch.testing.assert_close(*values)
        for value in values:
            value.backward()
        torch.testing.assert_close(torch.view_as_real(pair.grad).unbind(-1), [*grads(parts)])
        ours.step()
        theirs.step()
        torch.testing.assert_close(torch.view_as_real(pair.detach()).unbind(-1), [*detached(parts)])


def grads(params):
    return (param.grad for param in params)


def detached(params):
    return (param.detach() for param in params)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
@cases(implementations=["", *IMPLEMENTATIONS])
def test_default_dtype_changes_nothing_but_the_step(case, default):
    """As in torch the step is float64 under a default of float64, except where fused is asked."""

    def run():
        torch.manual_seed(0)
        params, forward = [torch.randn(4, 5, dtype=torch.float64, requires_grad=True)], []
        optimizer = case.build(params, max_grad_norm=0.5)
        generator = torch.Generator().manual_seed(3)
        for _ in range(ITERATIONS):
            params[0].grad = torch.randn(4, 5, generator=generator, dtype=torch.float64)
            optimizer.step()
            forward.append(params[0].detach().clone())
        return forward, optimizer.state[params[0]], optimizer.diagnostics

    expected, state, said = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        values, other, told = run()
    finally:
        torch.set_default_dtype(before)
    wide = default == torch.float64 and not case.given.get("fused")
    assert state["step"].dtype == torch.float32
    assert other["step"].dtype == (torch.float64 if wide else torch.float32)
    assert float(other["step"]) == ITERATIONS
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    for name in state.keys() - {"step"}:
        torch.testing.assert_close(other[name], state[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(told), dict(said), rtol=1e-9, atol=0, equal_nan=True)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_cases_leave_the_implementation_to_us(cls):
    """torch's ``test_optim_infos_do_not_specify_global_cliquey_kwargs``."""
    given = [case.kwargs for case in INFOS[cls].optim_inputs_func(device="cpu")]
    assert len(given) >= 5
    assert not any({"foreach", "fused", "differentiable"} & kwargs.keys() for kwargs in given)
