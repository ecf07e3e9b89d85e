"""What the kernels require of the tensors they are given: checked on the host, before anything."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars.csrc_triton.layout import Config, Hyper

PARAM_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_same(name: str, index: int, tensor: Tensor, param: Tensor, dtype: torch.dtype) -> None:
    """Raise unless ``tensor`` and its parameter can be walked through together, by element.

    Raises:
        TypeError: If it is a wrapper subclass or has another dtype.
        ValueError: If its device, shape or strides differ from the parameter's.
    """
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"{name} {index} is a {type(tensor).__name__}, whose memory is not its own; pass its "
            "local tensor, or use the torch path (fused=False)"
        )
    if tensor.dtype != dtype:
        raise TypeError(f"{name} {index} is {tensor.dtype}; convert it to {dtype}")
    if tensor.device != param.device:
        raise ValueError(f"{name} {index} is on {tensor.device}; move it to {param.device}")
    if tensor.shape != param.shape:
        raise ValueError(
            f"{name} {index} has shape {tuple(tensor.shape)} but its parameter "
            f"{tuple(param.shape)}; pass one of the parameter's shape"
        )
    if not (tensor.is_contiguous() and param.is_contiguous()) and (
        tensor.stride() != param.stride() or not is_dense(param)
    ):
        raise ValueError(
            f"{name} {index} has strides {tensor.stride()} but its parameter {param.stride()}; "
            "call .contiguous() on both, so that their elements lie in the same order"
        )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in any order and none of them twice."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def check_params(params: list[Tensor], device_type: str) -> None:
    """Raise unless one launch on one device of this type can update the parameters.

    Raises:
        TypeError: If a dtype is not a float of 16, 32 or 64 bits, or a tensor is a wrapper.
        ValueError: If there are none, or one is elsewhere, or its memory is not dense.
    """
    if not params:
        raise ValueError("params is empty; pass at least one tensor")
    for index, param in enumerate(params):
        if param.dtype not in PARAM_DTYPES:
            raise TypeError(
                f"parameter {index} is {param.dtype}; the fused step takes float16, bfloat16, "
                "float32 and float64, use the torch path (fused=False) for others"
            )
        if param.device != params[0].device:
            raise ValueError(
                f"parameter {index} is on {param.device} but parameter 0 on {params[0].device}; "
                "make one FusedAdam for each device"
            )
        if param.device.type != device_type:
            remedy = (
                "unset TRITON_INTERPRET to compile for it"
                if device_type == "cpu"
                else "use the torch path (fused=False) there"
            )
            raise ValueError(
                f"parameter {index} is on {param.device}, where these kernels do not run: {remedy}"
            )
        check_same("parameter", index, param, param, param.dtype)


def check_buffer(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise unless a control buffer is float64, contiguous, of this shape and on this device.

    Raises:
        TypeError: If its dtype is not float64.
        ValueError: If its shape, device or memory layout is another.
    """
    if tensor.dtype != torch.float64:
        raise TypeError(f"{name} is {tensor.dtype}; make it float64")
    if tuple(tensor.shape) != shape or tensor.device != like.device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} on {tensor.device}; pass a contiguous one of "
            f"shape {shape} on {like.device}"
        )


def check_hyper(hyper: Tensor, groups: list[int], params: list[Tensor]) -> None:
    """Raise unless ``hyper`` has a row for every tensor's group.

    Raises:
        ValueError: If a group has no row, or there is not one group per parameter.
    """
    rows = hyper.shape[0] if hyper.dim() else 0
    check_buffer("hyper", hyper, (max(rows, 1), len(Hyper)), params[0])
    if len(groups) != len(params):
        raise ValueError(f"{len(groups)} groups for {len(params)} parameters; pass one for each")
    for index, group in enumerate(groups):
        if not 0 <= group < rows:
            raise ValueError(
                f"parameter {index} is in group {group}, but hyper has {rows} rows; give every "
                "group a row"
            )


def check_controller(window: Tensor, counts: Tensor, config: Tensor, like: Tensor) -> None:
    """Raise unless the controller's tensors have their shapes and dtypes.

    Raises:
        TypeError: If ``counts`` is not int64.
        ValueError: If the window is empty, or ``counts`` is elsewhere or not a pair.
    """
    if window.dim() != 1 or not window.numel():
        raise ValueError(f"window has shape {tuple(window.shape)}; pass (W,) with W >= 1")
    check_buffer("window", window, (window.numel(),), like)
    check_buffer("config", config, (len(Config),), like)
    if counts.dtype != torch.int64:
        raise TypeError(f"counts is {counts.dtype}; make it int64")
    if counts.shape != (2,) or counts.device != like.device or not counts.is_contiguous():
        raise ValueError(f"counts must be a contiguous pair on {like.device}; it is not")


def check_state(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor] | None,
) -> None:
    """Raise unless every parameter has its moments, float32, or float64 if the parameter is.

    Raises:
        ValueError: If there is not one of each per parameter.
    """
    named = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "max_exp_avg_sq": max_exp_avg_sqs}
    for name, moments in named.items():
        if moments is None:
            continue
        check_count(name, moments, params)
        for index, (param, moment) in enumerate(zip(params, moments, strict=True)):
            double = param.dtype == torch.float64
            check_same(name, index, moment, param, torch.float64 if double else torch.float32)


def check_counters(
    params: list[Tensor], steps: list[Tensor], products: list[Tensor] | None, *, gated: bool
) -> None:
    """Raise unless every parameter has a step and, if gated, its products of betas.

    Raises:
        TypeError: If a step is not float32, or a product not float64.
        ValueError: If one is missing, elsewhere, or of another shape.
    """
    if gated and products is None:
        raise ValueError("a controller changes the betas; pass products, one (2,) float64 each")
    named = {"step": (steps, torch.float32, ()), "beta_products": (products, torch.float64, (2,))}
    for name, (counters, dtype, shape) in named.items():
        if counters is None:
            continue
        check_count(name, counters, params)
        for index, counter in enumerate(counters):
            if counter.dtype != dtype:
                raise TypeError(f"{name} {index} is {counter.dtype}; convert it to {dtype}")
            if (
                counter.shape != shape
                or counter.device != params[0].device
                or not counter.is_contiguous()
            ):
                raise ValueError(
                    f"{name} {index} has shape {tuple(counter.shape)} on {counter.device}; pass a "
                    f"contiguous one of shape {shape} on {params[0].device}"
                )


def check_penalty(
    params: list[Tensor],
    anchors: list[Tensor | None] | None,
    importances: list[Tensor | None] | None,
) -> None:
    """Raise unless anchors and importances come in pairs that fit their parameters.

    Raises:
        TypeError: If one is not a float of 16, 32 or 64 bits.
        ValueError: If one of a pair is missing.
    """
    if (anchors is None) != (importances is None):
        raise ValueError("pass both anchors and importances, or neither")
    if anchors is None or importances is None:
        return
    check_count("anchor", anchors, params)
    check_count("importance", importances, params)
    for index, (param, anchor, importance) in enumerate(
        zip(params, anchors, importances, strict=True)
    ):
        if (anchor is None) != (importance is None):
            raise ValueError(f"parameter {index} has only one of anchor and importance; pass both")
        for name, tensor in (("anchor", anchor), ("importance", importance)):
            if tensor is None:
                continue
            if tensor.dtype not in PARAM_DTYPES:
                raise TypeError(f"{name} {index} is {tensor.dtype}; convert it to a float dtype")
            check_same(name, index, tensor, param, tensor.dtype)


def check_count(name: str, tensors: Sequence[Tensor | None], params: list[Tensor]) -> None:
    """Raise unless there is one tensor for each parameter.

    Raises:
        ValueError: If there are more or fewer.
    """
    if len(tensors) != len(params):
        raise ValueError(f"{len(tensors)} tensors {name} for {len(params)} parameters")
