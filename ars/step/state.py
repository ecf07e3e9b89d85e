"""Each parameter's optimizer state: how it starts, its dtypes, what fits it, and its rows."""

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars import reference
from ars.penalty import Term, parameter_names
from ars.sharded import (
    is_placed_like,
    is_sharded,
    is_true_everywhere,
    mesh_of,
    part_of,
    place_like,
)

__all__ = [
    "PRODUCTS", "PRODUCTS_STEP", "SHAPED", "SHAPED_STATE", "CounterPool", "Precision",
    "change_rows_", "check_operands", "complete_state", "is_trial", "moment_dtype",
    "restore_dtypes", "step_kind",
]  # fmt: skip

# The products of betas that a gate makes vary, and the number of the step that they are of.
PRODUCTS = "beta_products"
PRODUCTS_STEP = "beta_products_step"
# What has the parameter's shape here.
SHAPED_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_remainder")
# What has it here and in torch's optimizers.
SHAPED = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "param_remainder", "acc_delta", "ax", "exp_inf",
    "grad_avg", "momentum_buffer", "prev", "square_avg", "step_size", "sum",
}  # fmt: skip
# Counters in one memory: pickle, unlike torch.save, saves all of it with each of them.
TOGETHER = 64


class Precision(NamedTuple):
    """What becomes of bfloat16 parameters; others are not concerned.

    Args:
        stochastic: They have bfloat16 moments, and all three are rounded stochastically.
        master: They have a remainder, which makes them float32 master weights.
        seed: Of the stochastic rounding.
    """

    stochastic: bool
    master: bool
    seed: int

    @property
    def is_plain(self) -> bool:
        """Whether they are rounded to the nearest, as all others."""
        return not (self.stochastic or self.master)

    def check(self, params: list[Tensor], *, differentiable: bool) -> None:
        """Raise unless these choices make sense together, and for these parameters.

        Args:
            params: The optimizer's parameters.
            differentiable: Whether autograd is to run through the step.

        Raises:
            ValueError: They do not; says why.
        """
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an int in [0, 2^63), got {self.seed!r}")
        if self.is_plain:
            return
        name = "stochastic_rounding" if self.stochastic else "master_weights"
        if self.stochastic and self.master:
            raise ValueError(
                "stochastic_rounding and master_weights cannot be True together: a master weight "
                "needs no rounding"
            )
        if differentiable:
            raise ValueError(f"differentiable=True: autograd cannot run through {name}=True")
        if all(param.dtype != torch.bfloat16 for param in params):
            raise ValueError(
                f"{name}=True is for bfloat16 parameters, and there are none: convert the model "
                "with .bfloat16() first"
            )


def moment_dtype(param: Tensor, precision: Precision) -> torch.dtype:
    """Moments are at least single precision unless rounded stochastically, and complex for complex.

    Args:
        param: The parameter.
        precision: What becomes of bfloat16 parameters.
    """
    if precision.stochastic and param.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.promote_types(param.dtype, torch.float32)


def step_kind(group: dict[str, Any], param: Tensor, *, triton: bool) -> dict[str, Any]:
    """Return the device and dtype that torch, or our kernel, wants a step counter to have.

    Args:
        group: The parameter's group.
        param: The parameter.
        triton: Whether the Triton kernels take the step.

    Returns:
        ``device`` and ``dtype``, to make or move a tensor with.
    """
    fused = triton or group["fused"]
    wide = torch.get_default_dtype() == torch.float64 and not fused
    return {
        "device": param.device if fused or group["capturable"] else torch.device("cpu"),
        "dtype": torch.float64 if wide else torch.float32,
    }


class CounterPool:
    """Makes counters side by side, so that one call can advance many of them."""

    def __init__(self) -> None:
        self._unused: dict[tuple[object, ...], list[Tensor]] = {}

    def zeros(self, name: str, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a new counter.

        Args:
            name: What it counts: those of one name lie side by side.
            *shape: Its shape.
            dtype: Its dtype.
            device: Where it lies.
        """
        unused = self._unused.setdefault((name, shape, dtype, device), [])
        if not unused:
            memory = torch.zeros(TOGETHER, *shape, dtype=dtype, device=device)
            unused += reversed(memory.unbind())
        return unused.pop()


def complete_state(
    state: dict[str, Any],
    param: Tensor,
    *,
    amsgrad: bool,
    step_kind: dict[str, Any],
    products: bool,
    precision: Precision,
    pool: CounterPool,
) -> None:
    """Start what is missing in a parameter's state: all of it, or what plain AdamW does not keep.

    Args:
        state: The parameter's state, completed in place.
        param: The parameter.
        amsgrad: Keep the running maximum of the second moment.
        step_kind: Device and dtype of the step counter.
        products: Keep the products of the betas (eq. 6), which a gate makes vary. Otherwise they
            are powers of the step, and the state is torch's.
        precision: What becomes of bfloat16 parameters.
        pool: Makes the counters.
    """
    if not isinstance(state.get("step"), Tensor):
        state["step"] = pool.zeros("step", **step_kind).fill_(state.get("step", 0))
    for name in SHAPED_STATE:
        if name in state:  # from before the parameter was placed where it is
            state[name] = place_like(state[name], param)
    for name in ("exp_avg", "exp_avg_sq") + ("max_exp_avg_sq",) * amsgrad:
        if name not in state:
            state[name] = torch.zeros_like(param, dtype=moment_dtype(param, precision))
    if precision.master and param.dtype == torch.bfloat16 and "param_remainder" not in state:
        state["param_remainder"] = torch.zeros_like(param, dtype=torch.int16)
    if not products:
        state.pop(PRODUCTS, None)
        state.pop(PRODUCTS_STEP, None)
    elif not (PRODUCTS in state and PRODUCTS_STEP in state):
        # Those of no step: where some have been taken, the powers of the betas take their place.
        device = param.device
        state[PRODUCTS] = pool.zeros(PRODUCTS, 2, dtype=torch.float64, device=device).fill_(1.0)
        state[PRODUCTS_STEP] = pool.zeros(PRODUCTS_STEP, dtype=step_kind["dtype"], device=device)


def is_trial(groups: list[dict[str, Any]]) -> bool:
    """Whether a step is only to make the state: all learning rates and all gradients are 0.

    ``torch.distributed.checkpoint`` takes one before it saves or loads. To be asked only while
    there is no state: reading gradients waits for the device, where every known learning rate is 0.

    Args:
        groups: The parameter groups.
    """
    for group in groups:
        lr = group["lr"].detach() if isinstance(group["lr"], Tensor) else group["lr"]
        # A base optimizer's may be no number, such as Adafactor's None; then it is not 0.
        if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
            return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if not grads:
        return False
    answer = not any(grad.is_sparse or bool(part_of(grad).any()) for grad in grads)
    # Were it a step for one process only, the others would wait for it in vain.
    for grad in {mesh_of(grad): grad for grad in grads if is_sharded(grad)}.values():
        answer = is_true_everywhere(answer, grad)
    return answer


def restore_dtypes(
    state: dict[str, Any],
    param: Tensor,
    saved: dict[str, Any],
    step_kind: dict[str, Any],
    precision: Precision,
    *,
    products: bool,
) -> None:
    """Undo torch's cast of a loaded state to the parameter's dtype, and drop what is not kept.

    Args:
        state: The parameter's state as torch has loaded it, corrected in place.
        param: The parameter.
        saved: The parameter's state as it was saved.
        step_kind: Device and dtype of the step counter.
        precision: What becomes of bfloat16 parameters.
        products: Whether the products of the betas are kept.
    """
    for name, value in saved.items():
        if name == "step":  # a number in old states, which torch has made a tensor
            state[name] = state[name].to(**step_kind)
        elif name == PRODUCTS_STEP or not isinstance(value, Tensor):
            continue
        elif name == PRODUCTS:
            # Another Adam casts what it carries along to the parameter's dtype.
            if products and value.dtype in (torch.float32, torch.float64):
                state[name] = value.to(param.device, torch.float64)
                of = torch.as_tensor(saved.get(PRODUCTS_STEP, saved["step"]))
                state[PRODUCTS_STEP] = of.to(param.device, step_kind["dtype"]).clone()
            else:
                state.pop(PRODUCTS)
                state.pop(PRODUCTS_STEP, None)
        elif name == "param_remainder":
            # Another optimizer casts it, and does not let it follow the parameter.
            if precision.master and param.dtype == torch.bfloat16 and value.dtype == torch.int16:
                state[name] = place_like(value.to(param.device, torch.int16), param)
            else:
                del state[name]
        elif value.is_floating_point() or value.is_complex():
            wide = value.to(param.device, moment_dtype(param, precision))
            state[name] = place_like(wide, param) if name in SHAPED else wide


def check_operands(
    param: Tensor,
    grad: Tensor | None,
    state: dict[str, Any],
    term: Term,
    groups: list[dict[str, Any]],
    precision: Precision,
) -> None:
    """Raise unless what belongs to a parameter still fits it, so that a step may move it.

    Args:
        param: The parameter.
        grad: Its gradient, if it has one.
        state: Its state, perhaps empty.
        term: Its penalty.
        groups: The optimizer's parameter groups, for its name.
        precision: What becomes of bfloat16 parameters.

    Raises:
        RuntimeError: Something has another shape, dtype or device; names it and the remedy.
    """

    def refuse(what: str, problem: str, remedy: str) -> None:
        raise RuntimeError(f"{what} of {parameter_names(groups)[param]} {problem}: {remedy}")

    if grad is None:
        grad = param
    if grad.is_sparse:
        raise RuntimeError(
            "this optimizer does not support sparse gradients: use "
            "torch.optim.SparseAdam, or an embedding with sparse=False"
        )
    problem = _misfit(grad, param)
    if problem is None and grad.is_complex() != param.is_complex():
        problem = f"is {grad.dtype}, the parameter {param.dtype}"
    if problem is not None:
        refuse("gradient", problem, "it is from before the parameter changed, so set it to None")
    if _overlaps(param):
        refuse("memory", "holds several of its elements at one place", "set param.data to a clone")
    for key in SHAPED_STATE:
        if key not in state:
            continue
        tensor = state[key]
        problem = _misfit(tensor, param) if isinstance(tensor, Tensor) else f"is {tensor!r}"
        if problem is None and _overlaps(tensor):
            refuse(key, "holds several elements at one place of its memory", "set it to a clone")
        if problem is not None:
            remedy = "change rows with optimizer.change_rows(), or start it afresh by `del "
            refuse(key, problem, remedy + "optimizer.state[parameter]`")
        master = key == "param_remainder"
        dtype = torch.int16 if master else moment_dtype(param, precision)
        if state[key].dtype != dtype:
            problem = f"is {state[key].dtype}, a {param.dtype} parameter needs {dtype}"
            remedy = "optimizer.load_state_dict(optimizer.state_dict()) converts it"
            refuse(key, problem, remedy)
    for key, size in (("step", 1), (PRODUCTS, 2), (PRODUCTS_STEP, 1)):
        value = state.get(key)
        if isinstance(value, Tensor) and value.numel() != size:
            remedy = "set it to a 0-d tensor" if size == 1 else "delete it"
            refuse(key, f"has shape {tuple(value.shape)}", remedy)
    count = state.get("step", 0)
    if not isinstance(count, (Tensor, Real)):
        refuse("step", f"is {count!r}", "set it to a 0-d tensor")
    for key, tensor in term._asdict().items():
        if tensor is not None and key != "scale":
            problem = _misfit(tensor, param)
            if problem is None and not is_placed_like(tensor, param):
                remedy = "set optimizer.penalty to it again"
                refuse(f"the penalty's {key}", "is distributed in another way", remedy)
            if problem is not None:
                remedy = "set optimizer.penalty to one that was built from the model as it is"
                refuse(f"the penalty's {key}", problem, remedy)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as after ``expand``: a kernel would refuse it half-way."""
    if tensor.layout != torch.strided:
        return False
    return any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _misfit(tensor: Tensor, param: Tensor) -> str | None:
    """Say in what a tensor differs from its parameter where it must not, or None."""
    if tensor.shape != param.shape:
        return f"has shape {tuple(tensor.shape)}, the parameter {tuple(param.shape)}"
    if tensor.device != param.device:
        return f"is on {tensor.device}, the parameter on {param.device}"
    return None


def change_rows_(
    param: Tensor, name: str, state: dict[str, Any], keep: Tensor | None, added: Tensor | None
) -> None:
    """Give a parameter other rows, in place; see :meth:`ars.ARSAdam.change_rows`.

    Args:
        param: The parameter.
        name: What to call it in an error.
        state: Its optimizer state, perhaps empty.
        keep: Indices or a mask of the rows that stay, None for all.
        added: Rows that are put after them, or None.

    Raises:
        TypeError: ``keep`` or ``added`` has another dtype.
        ValueError: A shape or an index does not fit; nothing has been changed then.
    """
    if param.dim() == 0 or is_traceable_wrapper_subclass(param):
        raise ValueError(
            f"{name} has no rows of its own to change: it is a {type(param).__name__} of shape "
            f"{tuple(param.shape)}"
        )
    data = param.detach()
    if added is None:
        added = data[:0]
    _check_added(name, data, added)
    index = _index(name, data, keep)
    added = added.detach().to(data.device)
    rest: Tensor | None = None
    if "param_remainder" in state:  # the master weights are what is added, not its rounding
        added, rest = reference.split_master(added.float())

    def changed(tensor: Tensor, new: Tensor | None = None) -> Tensor:
        if new is None:
            new = tensor.new_zeros((len(added), *tensor.shape[1:]))
        return torch.cat([tensor.detach().index_select(0, index), new.to(tensor.dtype)])

    entries = {
        key: changed(value, rest if key == "param_remainder" else None)
        for key, value in state.items()
        if key in SHAPED_STATE
    }
    grad = None if param.grad is None else changed(param.grad)
    new = changed(data, added)
    param.grad = None  # torch compares the shapes of both
    param.data = new
    param.grad = grad
    state.update(entries)


def _check_added(name: str, data: Tensor, added: Tensor) -> None:
    """Raise unless rows can be added.

    Raises:
        TypeError: They are complex, and the parameter is not.
        ValueError: They have another shape.
    """
    if added.dim() != data.dim() or added.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"rows to add to {name} must have shape (n{', ...' * (data.dim() > 1)}) like its "
            f"{tuple(data.shape)}, got {tuple(added.shape)}"
        )
    if added.is_complex() and not data.is_complex():
        raise TypeError(f"{name} is {data.dtype}, the rows to add {added.dtype}: pass real ones")


def _index(name: str, data: Tensor, keep: Tensor | None) -> Tensor:
    """Return the indices of the rows that stay.

    Raises:
        TypeError: ``keep`` has another dtype.
        ValueError: It does not fit.
    """
    rows = len(data)
    if keep is None:
        return torch.arange(rows, device=data.device)
    if keep.dtype == torch.bool:
        if keep.shape != (rows,):
            raise ValueError(
                f"the mask of the rows of {name} to keep has shape {tuple(keep.shape)}, must have "
                f"({rows},)"
            )
        return keep.to(data.device).nonzero().squeeze(1)
    if keep.dtype != torch.int64:
        raise TypeError(
            f"the rows of {name} to keep must be int64 indices or a bool mask, got {keep.dtype}"
        )
    if keep.dim() != 1 or (keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < rows):
        raise ValueError(
            f"the rows of {name} to keep must be a list of indices from 0 to {rows - 1}, got "
            f"{keep.tolist()}"
        )
    return keep.to(data.device)
