"""What the kernels require of the tensors they are given: checked on the host, before anything."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars.csrc_triton.layout import Config, GateState, Hyper, Operands

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
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} {index} has layout {tensor.layout}; call .to_dense() on it")
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


def check_controller(
    window: Tensor, counts: Tensor, gate_state: Tensor, config: Tensor, like: Tensor
) -> None:
    """Raise unless the controller's tensors have their shapes and dtypes.

    Raises:
        TypeError: If ``counts`` is not int64.
        ValueError: If the window is empty, or ``counts`` is elsewhere or not a pair.
    """
    if window.dim() != 1 or not window.numel():
        raise ValueError(f"window has shape {tuple(window.shape)}; pass (W,) with W >= 1")
    check_buffer("window", window, (window.numel(),), like)
    check_buffer("gate_state", gate_state, (len(GateState),), like)
    check_buffer("config", config, (len(Config),), like)
    if counts.dtype != torch.int64:
        raise TypeError(f"counts is {counts.dtype}; make it int64")
    if counts.shape != (2,) or counts.device != like.device or not counts.is_contiguous():
        raise ValueError(f"counts must be a contiguous pair on {like.device}; it is not")


def check_numbers(numbers: list[int], params: list[Tensor]) -> None:
    """Raise unless every parameter has a number of 32 bits.

    Raises:
        ValueError: If there is not one for each parameter, or it is out of range.
    """
    if len(numbers) != len(params):
        raise ValueError(f"{len(numbers)} numbers for {len(params)} parameters; pass one for each")
    for index, number in enumerate(numbers):
        if not 0 <= number < 1 << 32:
            raise ValueError(f"number {index} is {number}; pass one in [0, 2^32)")


def check_operands(tensors: Sequence[Operands], *, gates_betas: bool, stochastic: bool) -> None:
    """Raise unless everything that belongs to a parameter fits it.

    Raises:
        TypeError: If a dtype is another than the kernels take.
        ValueError: If one is missing, elsewhere, or of another shape or memory order.
    """
    for index, one in enumerate(tensors):
        param, remainder = one.param, one.remainder
        double = torch.float64 if param.dtype == torch.float64 else torch.float32
        rounded = stochastic and param.dtype == torch.bfloat16
        moment = torch.bfloat16 if rounded else double
        for name, tensor, dtype in (
            ("exp_avg", one.exp_avg, moment),
            ("exp_avg_sq", one.exp_avg_sq, moment),
            ("max_exp_avg_sq", one.max_exp_avg_sq, moment),
            ("pull", one.pull, double),
            ("remainder", remainder, torch.int16),
        ):
            if tensor is not None:
                check_same(name, index, tensor, param, dtype)
        if remainder is not None and (param.dtype != torch.bfloat16 or stochastic):
            reason = "stochastically rounded" if stochastic else str(param.dtype)
            raise ValueError(
                f"parameter {index} is {reason} and has a remainder; only bfloat16 master "
                "weights have one, pass None"
            )
        step = one.step  # users who share counters make them of shape (1,)
        step = step.detach().reshape(()) if step.numel() == 1 else step
        check_counter("step", index, step, param, torch.float32, ())
        if gates_betas:
            if one.products is None or one.products_step is None:
                raise ValueError(
                    f"the controller changes the betas, and parameter {index} has no products of "
                    "them; pass products, (2,) float64, and products_step"
                )
            check_counter("beta_products", index, one.products, param, torch.float64, (2,))
            counter = one.products_step
            check_counter("beta_products_step", index, counter, param, torch.float32, ())
        check_penalty(index, one)


def check_penalty(index: int, one: Operands) -> None:
    """Raise unless a parameter has a whole penalty that fits it, or none.

    Raises:
        TypeError: If a dtype is another than the kernels take.
        ValueError: If a part is missing, elsewhere, or of another shape or memory order.
    """
    param, scale = one.param, one.scale
    if (one.anchor is None) != (one.importance is None):
        raise ValueError(f"parameter {index} has only one of anchor and importance; pass both")
    for name, tensor in (("anchor", one.anchor), ("importance", one.importance)):
        if tensor is not None:
            quantized = name == "importance" and scale is not None
            if quantized and tensor.dtype != torch.uint8:
                raise TypeError(f"importance {index} has a scale but is {tensor.dtype}, not uint8")
            if not quantized and tensor.dtype not in PARAM_DTYPES:
                remedy = (
                    "pass its scale" if tensor.dtype == torch.uint8 else "convert it to a float one"
                )
                raise TypeError(f"{name} {index} is {tensor.dtype}; {remedy}")
            check_same(name, index, tensor, param, tensor.dtype)
    if scale is None:
        return
    if one.importance is None:
        raise ValueError(f"parameter {index} has a scale but no importance; pass both")
    if not param.is_contiguous():
        raise ValueError(
            f"parameter {index} has strides {param.stride()} and an importance with a scale, which "
            "belongs to elements in order; call .contiguous() on it"
        )
    check_counter("scale", index, scale, param, torch.float32, ((param.numel() + 63) // 64,))


def check_counter(
    name: str,
    index: int,
    counter: Tensor,
    param: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    """Raise unless something of a parameter has this dtype and shape, on its device.

    Raises:
        TypeError: If its dtype is another.
        ValueError: If its shape, device or memory layout is.
    """
    if counter.dtype != dtype:
        raise TypeError(f"{name} {index} is {counter.dtype}; convert it to {dtype}")
    if counter.shape != shape or counter.device != param.device or not counter.is_contiguous():
        raise ValueError(
            f"{name} {index} has shape {tuple(counter.shape)} on {counter.device}; pass a "
            f"contiguous one of shape {shape} on {param.device}"
        )
