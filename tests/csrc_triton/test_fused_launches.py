"""How many launches a step takes, and when its tables are made or uploaded again."""

from typing import Any

import pytest
import torch
from fused_oracle import assert_step
from fused_problem import make_problem

from ars.csrc_triton import launches as host


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched since."""
    names: list[str] = []
    launch = host.launch

    def counting(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(host, "launch", counting)
    return names


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"controller": "paper", "group_count": 4}),
        (torch.bfloat16, {"master": True}),
        (torch.bfloat16, {"stochastic": True}),
    ],
    ids=["fp32", "master", "stochastic"],
)
def test_a_step_of_one_dtype_is_two_launches(
    dtype: torch.dtype, options: dict[str, Any], launches: list[str], device: str
) -> None:
    problem = make_problem(
        device, [dtype], [(70,), (3,), (9,), (65,)], pulled=(1, 3), penalty="coupled",
        penalty_dtypes=(torch.uint8,), unpenalized=(0, 1), max_norm=1.0, **options,
    )  # fmt: skip
    assert_step(problem, problem.fused(), scale=8.0, clip=True)
    assert launches == ["control_kernel", "adam_kernel"]


@pytest.mark.parametrize(("loss", "expected"), [(None, 3 + 3), (0.3, 1 + 3)], ids=["norm", "loss"])
def test_every_further_dtype_is_a_launch_more(
    loss: float | None, expected: int, launches: list[str], device: str
) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    problem = make_problem(device, dtypes, [(3,), (2,)], controller="paper")
    surprise = None if loss is None else torch.tensor(loss, device=device)
    problem.fused().step(problem.gradients(), loss=surprise, clip=False)
    assert len(launches) == expected


def test_gradient_addresses_are_uploaded_only_when_one_moved(device: str) -> None:
    problem = make_problem(device, shapes=[(5,), (6,), (0,)])
    fused = problem.fused()
    grads = problem.gradients()
    for _ in range(3):
        fused.step(grads, loss=None, clip=False)
    assert fused._gradients.uploads == 1
    moved = [grads[0], grads[1].clone(), grads[2]]
    fused.step(moved, loss=None, clip=False)
    assert fused._gradients.uploads == 2
    assert_step(problem, fused, grads=moved)
    assert fused._gradients.uploads == 2


@pytest.mark.parametrize(
    "name",
    ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "products", "anchors",
     "importances", "remainders", "pulls", "scales"],
)  # fmt: skip
def test_a_tensor_that_lies_elsewhere_is_noticed(name: str, device: str) -> None:
    problem = make_problem(
        device, [torch.bfloat16], [(5,), (6,)], amsgrad=True, controller="paper", master=True,
        penalty="coupled", penalty_dtypes=(torch.uint8,), pulled=(0, 1),
    )  # fmt: skip
    fused = problem.fused()
    assert not fused.is_outdated()
    tensor = getattr(problem, name)[-1]
    tensor.data = tensor.data.clone()
    assert fused.is_outdated()


def test_pulls_are_read_at_every_step(device: str) -> None:
    problem = make_problem(device, shapes=[(5,), (6,)], pulled=(0, 1))
    fused = problem.fused()
    for _ in range(2):
        assert_step(problem, fused)
        for pull in problem.pulls or ():
            assert pull is not None
            pull.normal_()


def test_amsgrad_may_be_on_for_some_parameters_only(launches: list[str], device: str) -> None:
    problem = make_problem(device, amsgrad=True, penalty="proximal", unpenalized=(0,))
    assert problem.max_exp_avg_sqs is not None
    problem.max_exp_avg_sqs = [None, *problem.max_exp_avg_sqs[1:3], None]
    assert_step(problem, problem.fused())
    assert launches == ["control_kernel", "adam_kernel", "adam_kernel"]
