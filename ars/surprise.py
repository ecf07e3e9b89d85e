"""What the controller watches: the loss, the gradient norm, the predictions' entropy, or else.

Of several processes it is the mean of theirs.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, distributed

from ars.controller import ARSController, caller_stacklevel
from ars.sharded import Group, checked_group, exchange_device

__all__ = [
    "Replicas", "StepLosses", "check_watched", "choose_surprise", "prediction_entropy",
    "read_surprise", "warn_of_fallback",
]  # fmt: skip


def prediction_entropy(logits: Tensor) -> Tensor:
    r"""Mean entropy of predictions, for ``step(surprise=...)`` under ``surprise="entropy"``.

    .. math:: \frac1N \sum_n -\sum_c p_{nc} \ln p_{nc}, \qquad p = \mathrm{softmax}(\text{logits})

    Args:
        logits: Scores of the classes in the last dimension, shape (..., C), float; ``-inf``
            excludes a class.

    Returns:
        The mean over all other dimensions, in nats, in [0, ln C]; 0-d, detached, at least float32.

    Raises:
        ValueError: The logits have no last dimension, or are empty.

    Example:
        >>> round(float(prediction_entropy(torch.zeros(3, 4))), 4)  # ln 4
        1.3863
    """
    if not logits.dim() or not logits.numel():
        raise ValueError(f"logits must have shape (..., C), not empty; got {tuple(logits.shape)}")
    logits = logits.detach()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.special.entr(logits.softmax(-1)).sum(-1).mean()


def choose_surprise(
    controller: ARSController | None, loss: Any, surprise: Any
) -> tuple[str, Tensor | None]:
    """Return what is watched in this step, and its value.

    Args:
        controller: Whose setting ``surprise`` says it; None is for no controller.
        loss: The step's loss, or None.
        surprise: What was passed as ``step(surprise=...)``, or None.

    Returns:
        Its name, and a detached 0-d tensor, or None for the gradient norm.

    Raises:
        TypeError: The surprise is neither a tensor nor a number.
        ValueError: It is not a scalar, it is missing, or one was passed that nothing watches.
    """
    kind = "auto" if controller is None else controller.config.surprise
    if surprise is not None and controller is None:
        raise ValueError(
            "step(surprise=...) got a value, but with ars=None there is no controller to watch it: "
            "leave it out, or use ars=ARSConfig(surprise='entropy')"
        )
    if surprise is not None and kind != "entropy":
        raise ValueError(
            f"step(surprise=...) got a value, but the controller watches {_name(kind)}: use "
            "ARSConfig(surprise='entropy'), or a callable that returns the value"
        )
    if callable(kind):
        return "callable", read_surprise(kind(), "what ARSConfig(surprise=...) returned")
    if kind == "entropy":
        if surprise is None:
            raise ValueError(
                "the controller watches the entropy of the predictions: pass "
                "step(surprise=ars.prediction_entropy(logits))"
            )
        return kind, read_surprise(surprise, "the surprise")
    value = None if kind == "grad_norm" else read_surprise(loss)
    if value is None and kind == "loss":
        raise ValueError("the controller watches the loss: pass step(loss=loss), or a closure")
    return "grad_norm" if value is None else "loss", value


def _name(kind: Any) -> str:
    return "the value of a callable" if callable(kind) else f"{kind!r}"


def check_watched(before: str | None, now: str) -> None:
    """Check that a controller goes on watching what it has watched.

    Args:
        before: ``loss``, ``grad_norm``, ``entropy``, ``callable``, or None before the first step.
        now: What it would watch in this step.

    Raises:
        ValueError: It is not the same.
    """
    if before not in (None, now):
        remedy = "pass loss= to every step or to none, or begin anew by reset_controller()"
        if {before, now} - {"loss", "grad_norm"}:
            remedy = "use the ARSConfig(surprise=...) that it began with"
        raise ValueError(
            f"the controller has watched the {before} and now gets the {now}: {remedy}"
        )


def read_surprise(value: Any, name: str = "the loss") -> Tensor | None:
    """Return a surprise as a detached 0-d tensor, or None if there is none.

    Args:
        value: A tensor of one element, a number, or None.
        name: What it is, for the message.

    Raises:
        TypeError: It is neither a tensor nor a number, or complex.
        ValueError: It is not a scalar.
    """
    if value is None:
        return None
    if isinstance(value, (int, float)):
        # Of an addition Dynamo can make an input of the number, of a constructor only a constant.
        return torch.zeros((), dtype=torch.float64, device="cpu") + value
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a 0-d tensor or a number, got {type(value).__name__}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, is {value.dtype}: pass its .abs() or .real")
    if value.numel() != 1:
        raise ValueError(
            f"{name} must be a scalar, got shape {tuple(value.shape)}: reduce it, e.g. .mean()"
        )
    if hasattr(value, "full_tensor"):  # a DTensor: a share of a sum, perhaps
        value = value.full_tensor()
    return value.detach().reshape(())


class StepLosses:
    """The losses that were noted since the last step; their mean is that step's loss."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    @property
    def is_empty(self) -> bool:
        """Whether none was noted."""
        return self._total is None

    def add(self, loss: Tensor | float) -> None:
        """Note the loss of a step, or of one of the micro-batches of a step.

        Args:
            loss: 0-d, not divided by the number of micro-batches.

        Raises:
            TypeError: It is neither a tensor nor a number.
            ValueError: It is not a scalar.
        """
        value = read_surprise(loss)
        if value is None:
            raise TypeError("watch(loss) got None: pass the loss, a 0-d tensor or a number")
        # A copy: the loss may be divided in place afterwards.
        self._total = value.clone() if self._total is None else self._total.double() + value
        self._count += 1

    def choose(self, loss: Tensor | float | None, returned: Any) -> Any:
        """Return the loss of a step: what was noted, else what was passed, else the closure's.

        Args:
            loss: What was passed as ``step(loss=...)``, or None.
            returned: What the closure returned, or None.

        Raises:
            ValueError: A loss was noted, and one was passed too.
        """
        if self._total is None:
            return returned if loss is None else loss
        if loss is not None:
            raise ValueError(
                "watch(loss) noted a loss for this step, and step(loss=...) got one too: use one "
                "of the two"
            )
        return self._total / self._count if self._count > 1 else self._total

    def clear(self) -> None:
        """Forget them: the step is taken."""
        self._total, self._count = None, 0


def warn_of_fallback(controller: ARSController, before: str | None, now: str) -> None:
    """Say, at an optimizer's first step, that the gradient norm is watched as there is no loss.

    Args:
        controller: Whose setting ``surprise`` may be ``"auto"``.
        before: What the controller has watched, None before the first step.
        now: What it watches in this step.
    """
    if before is None and now == "grad_norm" and controller.config.surprise == "auto":
        warnings.warn(
            "the controller got no loss, so it watches the gradient norm: call opt.watch(loss) "
            "before opt.step(), or choose the norm by ARSConfig(surprise='grad_norm')",
            stacklevel=caller_stacklevel(),
        )


class Replicas:
    """The processes whose controllers observe one number: the mean of theirs.

    A local loss would give each rank another gate, and their weights would part. The gradient norm
    is the same on all ranks after DDP or FSDP: of it nothing is exchanged.

    Args:
        group: A process group; None: torch's default group, wherever ``torch.distributed`` is
            initialised; False: none, every process gates by its own number.

    Raises:
        TypeError: It is something else, or a group that this process is not in.
    """

    def __init__(self, group: Group) -> None:
        self.group = checked_group(group)
        self._is_lost = False

    def mean(self, value: Tensor | None, device: torch.device) -> Tensor | None:
        """Return the mean of a number over the processes, the same bits in each.

        A collective operation of one float64, which a GPU does not wait for. Any process's NaN or
        infinity reaches all. Alone, a process gets its own number back.

        Args:
            value: 0-d; None, for the gradient norm, is None for all.
            device: Where the parameters are: where it is best exchanged.

        Raises:
            RuntimeError: The optimizer was pickled, and its process group was left behind.
        """
        if value is None or value.is_meta:
            return value
        if self._is_lost:
            raise RuntimeError(
                "a pickle cannot hold the process_group that this optimizer had: set "
                "optimizer.process_group"
            )
        running = distributed.is_available() and distributed.is_initialized()
        if self.group is False or (self.group is None and not running):
            return value
        count = distributed.get_world_size(self.group)
        if count == 1:
            return value
        place = exchange_device(self.group, device)
        total = value.detach().to(place, torch.float64, non_blocking=True, copy=True)
        distributed.all_reduce(total, group=self.group)
        return total / count

    def is_default(self) -> bool:
        """Whether these are all processes, or none but those that hold parts of the parameters."""
        everyone = (None, False, distributed.group.WORLD)
        return not self._is_lost and self.group in everyone

    def __deepcopy__(self, memo: dict[int, Any]) -> "Replicas":
        return Replicas(self.group)  # a group is not copied

    def __getstate__(self) -> dict[str, Any]:
        """Pickle all but a group of the user's, which cannot be."""
        named = self.group is not None and self.group is not False
        return {"group": None if named else self.group, "_is_lost": named or self._is_lost}
