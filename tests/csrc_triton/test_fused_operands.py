"""Remainders, pulls, scales and numbers: what is refused, what is noticed, and what is shared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_oracle import assert_step
from fused_problem import Problem, make_problem
from torch import Tensor

from ars.csrc_triton import launches as host

BF16 = torch.bfloat16


def make(device: str, **options: Any) -> Problem:
    """Parameter 0 in float32, parameter 1 in bfloat16; both have everything they can have."""
    settings: dict[str, Any] = {
        "pulled": (0, 1), "penalty": "coupled", "penalty_dtypes": (torch.uint8,), "master": True,
    }  # fmt: skip
    return make_problem(device, [torch.float32, BF16], [(5, 60)], **settings | options)


def put(name: str, convert: Callable[[Any], Any], index: int = 1) -> Callable[[Problem], None]:
    def spoil(problem: Problem) -> None:
        values = list(getattr(problem, name))
        values[index] = convert(values[index])
        setattr(problem, name, values)

    return spoil


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def turn_all(problem: Problem) -> None:
    for name in ("params", "exp_avgs", "exp_avg_sqs", "pulls", "anchors", "importances"):
        put(name, transposed, 0)(problem)


def be_stochastic(problem: Problem) -> None:
    problem.stochastic = True


INVALID: dict[str, tuple[Callable[[Problem], None], type[Exception], str]] = {
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
    "number-count": (lambda p: setattr(p, "numbers", [1]), ValueError, "1 numbers for 2"),
    "number-range": (put("numbers", lambda _: 1 << 32), ValueError, "number 1 is 4294967296"),
    "stochastic-master": (be_stochastic, TypeError, r"exp_avg 1 .*torch\.bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "message"), INVALID.values(), ids=INVALID.keys())
def test_invalid_operands_are_refused(
    spoil: Callable[[Problem], None], error: type[Exception], message: str, device: str
) -> None:
    problem = make(device)
    problem.fused()
    spoil(problem)
    with pytest.raises(error, match=message):
        problem.fused()


def test_moments_and_remainders_that_the_mode_does_not_have_are_refused(device: str) -> None:
    problem = make(device, stochastic=True)
    with pytest.raises(ValueError, match="parameter 1 is stochastically rounded and has a rem"):
        problem.fused()
    problem.remainders = None
    problem.fused()
    with pytest.raises(TypeError, match=r"exp_avg 1 is torch\.bfloat16; convert it to torch\.f"):
        problem.fused(stochastic=False)


@pytest.mark.parametrize("name", ["remainders", "pulls", "scales"])
def test_a_tensor_that_lies_elsewhere_is_noticed(name: str, device: str) -> None:
    problem = make(device)
    fused = problem.fused()
    assert not fused.is_outdated()
    tensor = getattr(problem, name)[1]
    tensor.data = tensor.data.clone()
    assert fused.is_outdated()


@pytest.mark.parametrize("mode", ["master", "stochastic"])
def test_none_of_it_is_a_launch_more(
    mode: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    names: list[str] = []
    launch = host.launch

    def counting(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(host, "launch", counting)
    problem = make_problem(
        device, [BF16], [(70,), (3,), (9,), (65,)], pulled=(1, 3), penalty="coupled",
        penalty_dtypes=(torch.uint8,), unpenalized=(0, 1), **{mode: True},
    )  # fmt: skip
    assert_step(problem, problem.fused(), scale=8.0)
    assert names == ["control_kernel", "adam_kernel"]


def test_pulls_are_read_at_every_step(device: str) -> None:
    problem = make(device)
    fused = problem.fused()
    for _ in range(2):
        assert_step(problem, fused)
        for pull in problem.pulls or ():
            assert pull is not None
            pull.normal_()
