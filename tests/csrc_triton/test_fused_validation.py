"""What is refused: with an error that names it and the remedy, before anything has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_problem import Problem, make_problem
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from ars.csrc_triton.layout import Operands, Table
from ars.csrc_triton.step import FusedAdam
from ars.csrc_triton.tiles import tile_map

Spoil = Callable[[Problem], None]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def put(name: str, convert: Callable[[Any], Any], index: int = 1) -> Spoil:
    """Spoil one entry of a list of the problem."""

    def spoil(problem: Problem) -> None:
        values = list(getattr(problem, name))
        values[index] = convert(values[index])
        setattr(problem, name, values)

    return spoil


def put_controller(name: str, convert: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(problem: Problem) -> None:
        assert problem.controller is not None
        value = convert(getattr(problem.controller, name))
        problem.controller = problem.controller._replace(**{name: value})

    return spoil


def put_all(**values: Any) -> Spoil:
    return lambda problem: problem.__dict__.update(values)


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def wrapped(tensor: Tensor) -> Tensor:
    return TwoTensor(tensor, tensor)


INVALID: dict[str, tuple[Spoil, type[Exception], str]] = {
    "param-integer": (put("params", Tensor.int), TypeError, "parameter 1 is torch.int32"),
    "param-complex": (put("params", lambda t: t + 1j), TypeError, "parameter 1 .*complex64"),
    "param-meta": (put("params", meta), ValueError, "parameter 1 is on meta"),
    "param-wrapper": (put("params", wrapped), TypeError, "parameter 1 is a TwoTensor.*local"),
    "param-overlap": (
        put("params", lambda t: t[:1].expand(4, 6)), ValueError, "parameter 1 .*contiguous",
    ),
    "param-gaps": (
        put("params", lambda t: t.repeat(1, 2)[:, :6]), ValueError, "parameter 1 .*contiguous",
    ),
    "hyper-dtype": (lambda p: put_all(hyper=p.hyper.float())(p), TypeError, "hyper .*float64"),
    "hyper-shape": (lambda p: put_all(hyper=p.hyper[:, :8])(p), ValueError, r"hyper .*\(1, 9\)"),
    "groups-count": (put_all(groups=[0]), ValueError, "1 groups for 2 parameters"),
    "groups-range": (put_all(groups=[0, 1]), ValueError, "parameter 1 is in group 1.*1 rows"),
    "groups-negative": (put_all(groups=[-1, 0]), ValueError, "parameter 0 is in group -1"),
    "moment-dtype": (put("exp_avgs", Tensor.double), TypeError, "exp_avg 1 .*float32"),
    "moment-half": (put("exp_avg_sqs", Tensor.half), TypeError, "exp_avg_sq 1 .*float32"),
    "moment-shape": (put("exp_avg_sqs", Tensor.flatten), ValueError, "exp_avg_sq 1 has shape"),
    "moment-order": (put("exp_avgs", transposed), ValueError, "exp_avg 1 has strides .*contig"),
    "moment-meta": (put("exp_avgs", meta), ValueError, "exp_avg 1 is on meta; move"),
    "largest-dtype": (put("max_exp_avg_sqs", Tensor.double), TypeError, "max_exp_avg_sq 1"),
    "step-dtype": (put("steps", Tensor.double), TypeError, "step 1 is torch.float64; convert"),
    "step-shape": (put("steps", lambda t: t.new_zeros(2)), ValueError, r"step 1 has shape \(2,\)"),
    "products-dtype": (put("products", Tensor.float), TypeError, "beta_products 1 is"),
    "products-shape": (put("products", lambda t: t[:1]), ValueError, "beta_products 1 has"),
    "products-step": (put("products_steps", Tensor.double), TypeError, "beta_products_step 1 is"),
    "products-missing": (put_all(products=None), ValueError, "pass products"),
    "window-empty": (put_controller("window", lambda t: t[:0]), ValueError, "window has shape"),
    "window-dtype": (put_controller("window", Tensor.float), TypeError, "window is"),
    "counts-dtype": (put_controller("counts", Tensor.int), TypeError, "counts is torch.int32"),
    "counts-shape": (put_controller("counts", lambda t: t[:1]), ValueError, "counts must be"),
    "config-shape": (put_controller("config", lambda t: t[:5]), ValueError, r"config .*\(10,\)"),
    "anchor-missing": (put("anchors", lambda t: None), ValueError, "parameter 1 has only one"),
    "anchors-missing": (put_all(anchors=None), ValueError, "parameter 0 has only one"),
    "anchor-shape": (put("anchors", lambda t: t[:1]), ValueError, "anchor 1 has shape"),
    "anchor-integer": (put("anchors", Tensor.long), TypeError, "anchor 1 is torch.int64"),
    "importance-order": (put("importances", transposed), ValueError, "importance 1 has strides"),
}  # fmt: skip


def turn_all(problem: Problem) -> None:
    for name in ("params", "exp_avgs", "exp_avg_sqs", "pulls", "anchors", "importances"):
        put(name, transposed, 0)(problem)


INVALID_BF16: dict[str, tuple[Spoil, type[Exception], str]] = {
    "remainder-dtype": (put("remainders", Tensor.int), TypeError, r"remainder 1 .*torch\.int16"),
    "remainder-shape": (put("remainders", Tensor.flatten), ValueError, "remainder 1 has shape"),
    "remainder-order": (put("remainders", transposed), ValueError, "remainder 1 has strides"),
    "remainder-of-float32": (
        put("remainders", lambda _: torch.zeros(5, 60, dtype=torch.int16), 0), ValueError,
        r"parameter 0 is torch\.float32 and has a remainder.*pass None",
    ),
    "pull-dtype": (put("pulls", Tensor.bfloat16), TypeError, r"pull 1 .*torch\.float32"),
    "pull-shape": (put("pulls", lambda t: t[:1]), ValueError, "pull 1 has shape"),
    "pull-order": (put("pulls", transposed, 0), ValueError, "pull 0 has strides"),
    "scale-dtype": (put("scales", Tensor.double), TypeError, r"scale 1 .*torch\.float32"),
    "scale-shape": (put("scales", lambda t: t[:-1]), ValueError, r"scale 1 .*\(5,\)"),
    "scale-missing": (put("scales", lambda _: None), TypeError, "uint8; pass its scale"),
    "scale-of-float": (put("importances", Tensor.float), TypeError, "importance 1 has a scale but"),
    "scale-alone": (
        lambda p: (put("anchors", lambda _: None)(p), put("importances", lambda _: None)(p)),
        ValueError, "parameter 1 has a scale but no importance",
    ),
    "scale-order": (turn_all, ValueError, r"parameter 0 has strides.*\.contiguous\(\)"),
    "number-count": (put_all(numbers=[1]), ValueError, "1 numbers for 2"),
    "number-range": (put("numbers", lambda _: 1 << 32), ValueError, "number 1 is 4294967296"),
    "stochastic-master": (put_all(stochastic=True), TypeError, r"exp_avg 1 .*torch\.bfloat16"),
}  # fmt: skip


def make(device: str) -> Problem:
    return make_problem(
        device, shapes=[(5,), (4, 6)], amsgrad=True, controller="paper", penalty="coupled"
    )


def make_bf16(device: str, **options: Any) -> Problem:
    """Parameter 0 in float32, parameter 1 in bfloat16; both have everything they can have."""
    settings: dict[str, Any] = {
        "pulled": (0, 1), "penalty": "coupled", "penalty_dtypes": (torch.uint8,), "master": True,
    }  # fmt: skip
    return make_problem(device, [torch.float32, torch.bfloat16], [(5, 60)], **settings | options)


@pytest.mark.parametrize(
    ("build", "spoil", "error", "message"),
    [
        *(pytest.param(make, *case, id=name) for name, case in INVALID.items()),
        *(pytest.param(make_bf16, *case, id=name) for name, case in INVALID_BF16.items()),
    ],
)
def test_invalid_operands_are_refused(
    build: Callable[[str], Problem], spoil: Spoil, error: type[Exception], message: str, device: str
) -> None:
    problem = build(device)
    problem.fused()
    spoil(problem)
    with pytest.raises(error, match=message):
        problem.fused()


def test_moments_and_remainders_that_the_mode_does_not_have_are_refused(device: str) -> None:
    problem = make_bf16(device, stochastic=True)
    with pytest.raises(ValueError, match="parameter 1 is stochastically rounded and has a rem"):
        problem.fused()
    problem.remainders = None
    problem.fused()
    with pytest.raises(TypeError, match=r"exp_avg 1 is torch\.bfloat16; convert it to torch\.f"):
        problem.fused(stochastic=False)


def test_no_parameters_are_refused(device: str) -> None:
    hyper = make(device).hyper
    with pytest.raises(ValueError, match="pass at least one"):
        FusedAdam([], [], hyper=hyper, decoupled=True, controller=None)


def test_the_table_begins_with_the_operands() -> None:
    names = [column.name.lower() for column in Table]
    assert names == [*Operands._fields, "numel", "group", "number"]
    assert [column.value for column in Table] == list(range(len(Table)))


def test_diagnostics_of_another_dtype_are_refused(device: str) -> None:
    with pytest.raises(TypeError, match=r"diagnostics is torch\.float32"):
        make(device).fused(diagnostics=torch.zeros(10, device=device))


GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "dtype": (Tensor.half, TypeError, "gradient 1 is torch.float16; convert it to torch.float32"),
    "shape": (Tensor.flatten, ValueError, r"gradient 1 has shape \(24,\)"),
    "order": (transposed, ValueError, r"gradient 1 has strides \(1, 4\).*contiguous"),
    "meta": (meta, ValueError, "gradient 1 is on meta; move"),
    "sparse": (Tensor.to_sparse, TypeError, r"gradient 1 has layout .*to_dense"),
    "wrapper": (wrapped, TypeError, "gradient 1 is a TwoTensor"),
}


@pytest.mark.parametrize(("convert", "error", "message"), GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_an_invalid_gradient_changes_nothing(
    convert: Callable[[Tensor], Tensor],
    error: type[Exception],
    message: str,
    warm: bool,
    device: str,
) -> None:
    problem = make(device)
    fused = problem.fused()
    grads = problem.gradients()
    if warm:
        fused.step(grads, loss=None, clip=True)
    before, diagnostics = problem.clone(), fused.diagnostics.clone()
    with pytest.raises(error, match=message):
        fused.step([grads[0], convert(grads[1])], loss=None, clip=True)
    with pytest.raises(ValueError, match="1 gradients for 2"):
        fused.step(grads[:1], loss=None, clip=True)
    assert_unchanged(problem, before)
    torch.testing.assert_close(fused.diagnostics, diagnostics, rtol=0, atol=0, equal_nan=True)


def assert_unchanged(problem: Problem, before: Problem) -> None:
    assert problem.controller is not None
    assert before.controller is not None
    for name in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "products"):
        pairs = zip(getattr(problem, name), getattr(before, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(problem.controller.window, before.controller.window)
    assert torch.equal(problem.controller.counts, before.controller.counts)
    assert torch.equal(problem.controller.gate_state, before.controller.gate_state)


def test_a_gradient_in_another_order_at_the_same_address_is_noticed(device: str) -> None:
    problem = make(device)
    fused = problem.fused()
    grads = problem.gradients()
    fused.step(grads, loss=None, clip=False)
    reordered = grads[1].view(6, 4).t()
    assert reordered.data_ptr() == grads[1].data_ptr()
    with pytest.raises(ValueError, match="gradient 1 has strides"):
        fused.step([grads[0], reordered], loss=None, clip=False)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (torch.tensor(1), TypeError, "loss is torch.int64"),
        (torch.ones(2), ValueError, r"loss has shape \(2,\)"),
        (torch.tensor(1.0, device="meta"), ValueError, "loss has shape .* on meta"),
    ],
    ids=["integer", "vector", "meta"],
)
def test_an_invalid_loss_changes_nothing(
    loss: Tensor, error: type[Exception], message: str, device: str
) -> None:
    problem = make(device)
    fused = problem.fused()
    before = problem.clone()
    with pytest.raises(error, match=message):
        fused.step(problem.gradients(), loss=loss if loss.is_meta else loss.to(device), clip=True)
    assert_unchanged(problem, before)


def test_the_kernels_run_where_they_are_compiled_for() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 is on \w+, where these kernels do not run"):
        make("cpu" if torch.cuda.is_available() else "meta").fused()


def test_the_tile_map_covers_every_tensor_once() -> None:
    tiles = tile_map([0, 1, 4096, 4097, 9000], [4, 0, 2, 1, 3], torch.device("cpu"))
    assert tiles.dtype == torch.int32
    expected = [(0, 0), (2, 0), (1, 0), (1, 1), (3, 0), (3, 1), (3, 2)]
    assert [tuple(entry) for entry in tiles.tolist()] == expected
    empty = tile_map([0, 0], [1, 3], torch.device("cpu"))
    assert empty.tolist() == [[1, 0]]
