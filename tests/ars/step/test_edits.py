"""Parameters, gradients and moments that a user has changed between steps: refused or followed."""

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, gradients, make, parameters

from ars import ARSAdam, ARSAdamW, GradientRelease, reference
from ars.step import batch as collecting

SHAPES = ((6, 4), (5,))


def trained(implementation, dtype=torch.float32, **settings):
    params = parameters(dtype, shapes=SHAPES)
    optimizer = make(implementation, params, lr=0.1, **settings)
    for seed in range(2):
        gradients(params, seed)
        optimizer.step(loss=1.0)
    gradients(params, 2)
    return optimizer, params


def everything(optimizer):
    """Copies of all that a step would change."""
    tensors = [optimizer._buffer]
    for param in optimizer._parameters():
        tensors += [param.detach(), *optimizer.state[param].values()]
    if optimizer.controller is not None:
        tensors += optimizer.controller.state_dict().values()
    return [tensor.clone() for tensor in tensors]


def are_same(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def refuses(optimizer, match):
    """Whether a step raises and changes nothing, also when it is tried again."""
    before = everything(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            optimizer.step(loss=1.0)
    return are_same(before, everything(optimizer))


def entry(key):
    def replace(optimizer, param):
        optimizer.state[param][key] = torch.zeros(3, 4, dtype=optimizer.state[param][key].dtype)

    return replace


def inside(key):
    def replace(optimizer, param):
        optimizer.state[param][key].data = torch.zeros(2000, 4)

    return replace


def with_gradient(change):
    def replace(optimizer, param):
        param.grad = None
        param.data = change(param.data)
        param.grad = torch.ones_like(param)

    return replace


def stale(optimizer, param):
    grad = param.grad
    optimizer.change_rows(param, added=torch.ones(3, 4))
    param.grad.data = grad


EDITS = {
    "grown": (with_gradient(lambda data: torch.cat([data, data, data])), r"\(6, 4\).*\(18, 4\)"),
    "much grown": (with_gradient(lambda data: data.repeat(900, 1)), r"\(6, 4\).*\(5400, 4\)"),
    "pruned": (with_gradient(lambda data: data[::2].clone()), r"\(6, 4\).*\(3, 4\)"),
    "a view of itself": (with_gradient(lambda data: data[:3]), r"\(6, 4\).*\(3, 4\)"),
    "turned": (with_gradient(lambda data: data.T), r"\(6, 4\).*\(4, 6\)"),
    "widened": (with_gradient(torch.Tensor.double), "exp_avg of .*torch.float32.*torch.float64"),
    "first moment": (entry("exp_avg"), r"exp_avg of .*\(3, 4\).*\(6, 4\)"),
    "second moment": (entry("exp_avg_sq"), r"exp_avg_sq of .*\(3, 4\).*\(6, 4\)"),
    "moment's memory": (inside("exp_avg"), r"exp_avg of .*\(2000, 4\).*\(6, 4\)"),
    "largest second moment": (entry("max_exp_avg_sq"), r"max_exp_avg_sq of .*\(3, 4\).*\(6, 4\)"),
    "stale gradient": (stale, r"gradient of .*\(6, 4\).*\(9, 4\).*set it to None"),
}


# Of other kinds of parameters, where they change what is kept of one.
BF16 = {"dtype": torch.bfloat16, "master_weights": True}
EDITS_OF_OTHERS = {
    "remainder": (BF16, entry("param_remainder"), r"param_remainder of .*\(3, 4\).*\(6, 4\)"),
    "complex": ({"dtype": torch.complex64}, *EDITS["first moment"]),
    "complex made real": (
        {"dtype": torch.complex64}, with_gradient(lambda data: data.real.clone()),
        "exp_avg of .*torch.complex64.*torch.float32",
    ),
}  # fmt: skip
MISFITS = [
    *((which, {"amsgrad": True} | ars, *edit) for edit in EDITS.values()
      for which in IMPLEMENTATIONS for ars in ({}, {"ars": None})),
    *((which, *edit) for edit in EDITS_OF_OTHERS.values() for which in ("loop", "fused", "triton")
      if which != ("fused" if edit[0] is BF16 else "triton")),
]  # fmt: skip


@pytest.mark.parametrize(("implementation", "settings", "change", "match"), MISFITS)
def test_what_does_not_fit_is_refused_before_anything_moves(
    implementation, settings, change, match
):
    optimizer, params = trained(implementation, **settings)
    change(optimizer, params[0])
    assert refuses(optimizer, match if " of " in match else "of parameter 0 of group 0 .*" + match)


class Buffers(Pull):
    """A penalty with a gradient of its own, which fails on another shape."""

    def gradients(self):
        return [(p, torch.zeros_like(p)) for p, _, _ in self.rows]

    def refresh(self):
        return sum((anchor - p).sum() for p, anchor, _ in self.rows)


@pytest.mark.parametrize("penalty", [Pull, Buffers])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_penalty_of_another_shape_is_refused(implementation, penalty):
    params = parameters(shapes=SHAPES)
    optimizer = make(implementation, params, penalty=penalty(params))
    gradients(params, 0)
    optimizer.step(loss=1.0)
    del optimizer.state[params[0]]  # so that only the penalty does not fit
    params[0].grad, params[0].data = None, torch.ones(3, 4)
    params[0].grad = torch.ones(3, 4)
    assert refuses(optimizer, r"the penalty's anchor of .*\(6, 4\).*\(3, 4\).*optimizer.penalty")


@pytest.mark.parametrize("key", [1, 2])
def test_an_anchor_or_importance_that_gets_other_memory_is_refused(key):
    params = parameters(shapes=SHAPES)
    penalty = Pull(params)
    optimizer = ARSAdamW(params, penalty=penalty)
    gradients(params, 0)
    optimizer.step(loss=1.0)
    optimizer._terms[params[0]][key - 1].data = torch.zeros(2, 4)
    assert refuses(optimizer, r"the penalty's .* has shape \(2, 4\)")


def test_gradient_release_refuses_before_the_first_parameter_moves():
    params = parameters(shapes=SHAPES)
    optimizer = ARSAdamW(params)
    with GradientRelease(optimizer) as release:
        release.backward(sum(param.sum() for param in params))
        params[0].data = torch.ones(3, 4)
        before = everything(optimizer)
        with pytest.raises(RuntimeError, match=r"exp_avg of parameter 0 .*\(6, 4\).*\(3, 4\)"):
            release.backward(sum(param.sum() for param in params))
    assert are_same(before, everything(optimizer))
    assert params[1].grad is None


def test_a_compiled_step_refuses():
    params = parameters(shapes=SHAPES)
    optimizer = ARSAdamW(params)

    @torch.compile(backend="aot_eager")
    def step():
        optimizer.step(loss=torch.ones(()))

    gradients(params, 0)
    step()
    with_gradient(lambda data: data.repeat(40, 1))(optimizer, params[0])
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=r"exp_avg of parameter 0 .*\(6, 4\).*\(240, 4\)"):
        step()
    assert are_same(before, everything(optimizer))


def test_a_moment_on_another_device_is_refused():
    optimizer, params = trained("fused")
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(6, 4, device="meta")
    with pytest.raises(RuntimeError, match=r"exp_avg of .* is on meta, .* on cpu"):
        optimizer.step(loss=1.0)


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("what", ["param", "grad", "exp_avg"])
def test_strides_that_change_are_followed(implementation, what):
    results = []
    for strided in (False, True):
        optimizer, params = trained(implementation)
        param = params[0]
        if strided:
            tensor = {"grad": param.grad, "exp_avg": optimizer.state[param]["exp_avg"]}
            tensor = tensor.get(what, param)
            tensor.data = tensor.data.T.contiguous().T
        for _ in range(2):
            optimizer.step(loss=1.0)
        results.append(param.detach().clone())
    torch.testing.assert_close(*results)


def test_the_check_without_what_torch_has_for_compiled_code(monkeypatch):
    monkeypatch.setattr(collecting, "TensorGuards", None)
    optimizer, params = trained("fused")
    with_gradient(lambda data: data.repeat(900, 1))(optimizer, params[0])
    assert refuses(optimizer, r"exp_avg of .*\(6, 4\).*\(5400, 4\)")
    optimizer, params = trained("fused")
    inside("exp_avg")(optimizer, params[0])
    assert refuses(optimizer, r"exp_avg of .*\(2000, 4\)")


ROWS = {
    "removed": (torch.tensor([True, False, True, True, False, False]), None),
    "added": (None, torch.full((2, 4), 0.3)),
    "both": (torch.tensor([5, 0, 0]), torch.full((1, 4), 0.3)),
    "all removed": (torch.tensor([], dtype=torch.int64), None),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("change", ROWS)
def test_rows_take_their_moments_and_gradient_along(change, implementation):
    keep, added = ROWS[change]
    optimizer, (param, _) = trained(implementation, amsgrad=True)
    whole, (old, _) = trained(implementation, amsgrad=True)
    optimizer.change_rows(param, keep, added)
    kept = slice(None) if keep is None else keep
    number = len(old[kept])
    assert torch.equal(param[:number], old[kept])
    assert torch.equal(param.grad[:number], old.grad[kept])
    assert not param.grad[number:].any()
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(optimizer.state[param][key][:number], whole.state[old][key][kept])
        assert not optimizer.state[param][key][number:].any()
    if added is not None:
        assert torch.equal(param[number:], added)
    assert optimizer.state[param]["step"] == 2
    optimizer.step(loss=1.0)
    whole.step(loss=1.0)
    # The kernels' vectors begin elsewhere: an ulp.
    torch.testing.assert_close(param[:number], old[kept])
    assert optimizer.state[param]["step"] == 3


@pytest.mark.parametrize("implementation", ["loop", "triton"])
def test_added_rows_of_master_weights_are_exact(implementation):
    optimizer, (param, _) = trained(implementation, torch.bfloat16, master_weights=True)
    added = torch.full((2, 4), 0.3001)
    optimizer.change_rows(param, torch.tensor([1]), added)
    master = reference.join_master(param.detach(), optimizer.state[param]["param_remainder"])
    assert torch.equal(master[1:], added)
    optimizer.step(loss=1.0)


def test_rows_of_a_parameter_as_small_as_the_products_of_its_betas():
    param = torch.ones(2, requires_grad=True)
    optimizer = ARSAdam([param], lr=0.1)
    param.grad = torch.ones(2)
    optimizer.step(loss=1.0)
    optimizer.change_rows(param, torch.tensor([1]))
    param.grad = torch.ones(1)
    optimizer.step(loss=1.0)
    # Adam moves by the learning rate under a constant gradient, to float32.
    torch.testing.assert_close(param.detach(), torch.tensor([0.8]))


def test_rows_before_the_first_step_and_without_gradient():
    (param,) = parameters(shapes=((6, 4),))
    optimizer = ARSAdamW([param])
    optimizer.change_rows(param, added=torch.zeros(2, 4))
    assert param.shape == (8, 4)
    assert param.grad is None
    gradients([param], 0)
    optimizer.step(loss=1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"keep": torch.tensor([0, 6])}, ValueError, "from 0 to 5"),
        ({"keep": torch.tensor([-1])}, ValueError, "from 0 to 5"),
        ({"keep": torch.tensor([True])}, ValueError, r"mask .* \(1,\), must have \(6,\)"),
        ({"keep": torch.tensor([0.5])}, TypeError, "int64 indices or a bool mask"),
        ({"added": torch.ones(2, 3)}, ValueError, r"\(n, ...\) like its \(6, 4\), got \(2, 3\)"),
        ({"added": torch.ones(2, 4, dtype=torch.complex64)}, TypeError, "pass real ones"),
    ],
)
def test_rows_that_do_not_fit_are_refused(arguments, error, match):
    optimizer, params = trained("fused")
    before = everything(optimizer)
    with pytest.raises(error, match=match):
        optimizer.change_rows(params[0], **arguments)
    assert are_same(before, everything(optimizer))


def test_rows_of_others_and_of_a_penalised_parameter_are_refused():
    params = parameters(shapes=SHAPES)
    optimizer = ARSAdamW(params[:1], penalty=Pull(params[:1]))
    with pytest.raises(ValueError, match="is not in this optimizer"):
        optimizer.change_rows(params[1])
    with pytest.raises(ValueError, match=r"set optimizer\.penalty to None"):
        optimizer.change_rows(params[0], torch.tensor([0]))
    optimizer.penalty = None
    optimizer.change_rows(params[0], torch.tensor([0]))
    scalar = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="no rows of its own"):
        ARSAdamW([scalar]).change_rows(scalar)
