"""The fused step against the reference, one step at a time from the same state."""

import math
from typing import Any

import pytest
import torch
from fused_oracle import assert_step
from fused_problem import HYPER, make_problem
from torch import Tensor

from ars.csrc_triton import launches as host
from ars.csrc_triton.layout import Diagnostic, Hyper
from ars.csrc_triton.tiles import TILE

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {"decoupled": False},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "clip": {"max_norm": 2.0},
    "coupled": {"penalty": "coupled"},
    "coupled-maximize-clip": {"penalty": "coupled", "maximize": True, "max_norm": 3.0},
    "proximal": {"penalty": "proximal"},
    "proximal-amsgrad-adam": {"penalty": "proximal", "amsgrad": True, "decoupled": False},
    "coupled-bf16-penalty": {"penalty": "coupled", "penalty_dtypes": (torch.bfloat16,)},
    "two-penalty-dtypes": {
        "penalty": "proximal", "penalty_dtypes": (torch.float32, torch.bfloat16),
        "unpenalized": (2,),
    },
    "some-penalized": {"penalty": "coupled", "unpenalized": (0, 2)},
    "gated": {"controller": "paper"},
    "groups": {"group_count": 3, "max_norm": 2.0, "penalty": "proximal"},
    "all": {
        "group_count": 2, "controller": "conditioned", "penalty": "proximal", "amsgrad": True,
        "max_norm": 2.0, "unpenalized": (1,),
    },
}  # fmt: skip
EVERY_DTYPE = ("adamw", "coupled-bf16-penalty", "proximal-amsgrad-adam", "all")
SEVERAL: dict[str, dict[str, Any]] = {
    "gated-rate": {"controller": "standardized", "group_count": 2, "penalty": "coupled"},
    "norm-surprise": {"controller": "paper", "group_count": 2, "max_norm": 2.0},
    "penalties": {
        "penalty": "coupled", "penalty_dtypes": (torch.float32, torch.bfloat16),
        "unpenalized": (1, 4), "amsgrad": True,
    },
    "penalty-in-first-only": {"penalty": "proximal", "unpenalized": (2, 3, 4, 5)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *((name, "fp32") for name in VARIANTS),
        *((name, dtype) for name in EVERY_DTYPE for dtype in ("bf16", "fp16", "fp64")),
    ],
)
def test_step_equals_the_reference(variant: str, dtype: str, device: str) -> None:
    settings = VARIANTS[variant]
    problem = make_problem(device, [DTYPES[dtype]], **settings)
    fused = problem.fused()
    clip = math.isfinite(settings.get("max_norm", math.inf))
    for loss in (0.4, 1.1):
        gated = problem.controller is not None
        surprise = torch.tensor(loss, device=device) if gated else None
        assert_step(problem, fused, loss=surprise, clip=clip)


@pytest.mark.parametrize("variant", SEVERAL.values(), ids=SEVERAL.keys())
def test_dtypes_share_one_norm_one_controller_and_one_penalty(
    variant: dict[str, Any], device: str
) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    problem = make_problem(device, dtypes, [(33, 5), (6,)], **variant)
    fused = problem.fused()
    for _ in range(2):
        assert_step(problem, fused, clip=math.isfinite(variant.get("max_norm", math.inf)))


def test_more_tensors_and_tiles_than_the_last_program_takes_at_once(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(host, "TENSOR_BLOCK", 4)
    monkeypatch.setattr(host, "SUM_BLOCK", 2)
    problem = make_problem(
        device, shapes=[(3,)] * 9, penalty="coupled", max_norm=1.0, controller="paper"
    )
    assert_step(problem, problem.fused(), clip=True)


BF16_LENGTHS = (1, 127, 1024, 1025, TILE - 1, TILE + 1153)
COMPACT: dict[str, Any] = {"penalty": "coupled", "penalty_dtypes": (torch.uint8,)}
PLACES: list[tuple[str, int, int, dict[str, Any]]] = [
    *(("fp32", n, 0, {}) for n in (1, 511, 512, TILE - 1, TILE, TILE + 1, 2 * TILE + 513)),
    *((dtype, 513, offset, {}) for dtype in DTYPES for offset in (0, 1, 5)),
    *(("bf16", n, 0, COMPACT | {mode: True}) for n in BF16_LENGTHS
      for mode in ("master", "stochastic")),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "numel", "offset", "options"), PLACES)
def test_every_element_is_covered_once_and_nothing_beyond(
    dtype: str, numel: int, offset: int, options: dict[str, Any], device: str
) -> None:
    """Every operand is a slice of a larger buffer, whose other elements must not change."""
    settings = {"penalty": "proximal", "controller": "paper", "max_norm": 1.0, "pulled": (0,)}
    problem = make_problem(
        device, [DTYPES[dtype]], [(numel,), (3, 7)], amsgrad=True, **settings | options
    )
    buffers: list[Tensor] = []

    def embed(tensor: Tensor | None, outside: float = 77.0) -> Tensor | None:
        if tensor is None:
            return None
        # 16 elements are a multiple of 16 bytes: offset 0 stays aligned.
        size = tensor.numel() + 32 + offset
        buffers.append(torch.full((size,), outside, dtype=tensor.dtype, device=device))
        inside = buffers[-1][16 + offset : 16 + offset + tensor.numel()]
        return inside.copy_(tensor.reshape(-1)).view(tensor.shape)

    names = ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "anchors", "importances"]
    for name in [*names, "steps", "products", "remainders", "pulls", "scales"]:
        if getattr(problem, name) is not None:
            setattr(problem, name, [embed(tensor) for tensor in getattr(problem, name)])
    if offset:  # a vector access would be wrong, and the reference comparison would see it
        assert all(tensor.data_ptr() % 16 for tensor in problem.params)
    before = [buffer.clone() for buffer in buffers]
    # One element too many, and the norm is NaN.
    grads = [embed(grad, math.nan) for grad in problem.gradients()]
    assert_step(problem, problem.fused(), clip=True, grads=grads)
    for buffer, old in zip(buffers, before, strict=False):
        assert torch.equal(buffer[: 16 + offset], old[: 16 + offset])
        assert torch.equal(buffer[-16:], old[-16:])


def test_dense_operands_of_another_memory_order_are_updated_in_it(device: str) -> None:
    problem = make_problem(device, [torch.float32], [(4, 3, 5, 6)], penalty="coupled")
    for name in ("params", "exp_avgs", "exp_avg_sqs", "anchors", "importances"):
        tensors = getattr(problem, name)
        setattr(problem, name, [t.to(memory_format=torch.channels_last) for t in tensors])
    fused = problem.fused()
    for _ in range(2):
        assert_step(problem, fused)


def set_numbers(hyper: Tensor, config: Tensor) -> None:
    hyper[:, Hyper.LR] = 0.05
    hyper[:, Hyper.BETA1] = 0.3
    hyper[:, Hyper.BETA2] = 0.0
    hyper[:, Hyper.EPS] = 0.4
    hyper[:, Hyper.WEIGHT_DECAY] = 0.0
    hyper[:, Hyper.STRENGTH] = 7.0
    hyper[:, Hyper.MAX_NORM] = 0.5
    hyper[:, Hyper.SIGN] = -1.0
    config *= 0.5


@pytest.mark.parametrize("controller", [None, "paper"], ids=["constant", "gated"])
def test_numbers_rewritten_on_the_device_are_live(controller: str | None, device: str) -> None:
    problem = make_problem(
        device, shapes=[(33,), (7,)], penalty="coupled", max_norm=2.0, controller=controller
    )
    fused = problem.fused()
    assert_step(problem, fused, clip=True)
    config = torch.ones(1) if problem.controller is None else problem.controller.config
    set_numbers(problem.hyper, config)
    assert_step(problem, fused, clip=True)


def test_products_are_the_power_for_betas_that_do_not_change(device: str) -> None:
    """An open gate leaves Adam's own bias correction, whatever the path it is computed on."""
    constant = make_problem(device, shapes=[(65,)])
    constant.steps = [torch.tensor(0.0, device=device)]
    gated = constant.clone()
    gated.products = [torch.ones(2, dtype=torch.float64, device=device)]
    gated.products_steps = [torch.zeros((), device=device)]
    gated.controller = make_problem(device, controller="paper").controller
    assert gated.controller is not None
    gated.controller.config[0] = 0.0  # alpha: no surprise closes the gate
    gated.controller.config[3] = 0.0  # jitter
    fused = (constant.fused(), gated.fused())
    for count in range(1, 4):
        grads = constant.gradients()
        for each in fused:
            each.step(grads, loss=torch.tensor(1.0, device=device), clip=False)
        power = [HYPER["beta1"] ** count, HYPER["beta2"] ** count]
        torch.testing.assert_close(gated.products[0].tolist(), power, rtol=1e-12, atol=0)
        torch.testing.assert_close(gated.params[0], constant.params[0], rtol=1e-6, atol=1e-6)


def test_autograd_notices_the_update(device: str) -> None:
    weight = torch.ones(4, device=device, requires_grad=True)
    problem = make_problem(device, shapes=[(4,)])
    problem.params = [weight]
    fused = problem.fused()
    loss = (weight * weight).sum()
    fused.step([torch.ones(4, device=device)], loss=None, clip=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_given_diagnostics_tensor_is_written(device: str) -> None:
    problem = make_problem(device, penalty="coupled", controller="paper")
    diagnostics = torch.full((len(Diagnostic),), 9.0, dtype=torch.float64, device=device)
    fused = problem.fused(diagnostics=diagnostics)
    assert fused.diagnostics is diagnostics
    assert_step(problem, fused, loss=torch.tensor(0.3, device=device))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_loss_of_any_float_dtype_and_shape_is_read_as_it_is(kind: torch.dtype, device: str) -> None:
    problem = make_problem(device, shapes=[(3,)], controller="paper")
    losses = torch.tensor([0.0, 0.7], dtype=kind, device=device, requires_grad=True)
    assert_step(problem, problem.fused(), loss=losses[1])
