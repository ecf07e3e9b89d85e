"""The controller of a training run: its parts, and its state on the device."""

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ars import reference
from ars.config import ARSConfig, ChronosJitter, EntropyGuard, SurpriseGate

__all__ = ["ARSController", "caller_stacklevel"]

_Part = TypeVar("_Part", EntropyGuard, SurpriseGate, ChronosJitter)
# The settings that observing takes, by the name that they have in ARSConfig.
_SETTINGS = [
    name
    for name, parameter in inspect.signature(reference.controller_step_).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
]
_OPEN = reference.GateState(phi=1.0, slow=0.0, deviation=0.0, mean=0.0, lowest=0.0)


class ARSController:
    """The controller: its three parts, and its memory on one device.

    Args:
        config: Its settings.
        device: Where it lives: the device of the parameters it gates.

    Attributes:
        config: Its settings.
        window: The last finite surprises, a ring buffer of shape (W,).
        counts: Surprises written and steps taken, (2,).
        gate_state: What the gate remembers, (5,), see :class:`ars.reference.GateState`.

    Example:
        >>> controller = ARSController(ARSConfig.paper())
        >>> signals = controller.observe(0.0)
        >>> signals.psi, signals.phi, signals.chi
        (1.0, 1.0, 0.0)
        >>> controller.surprise_gate(0.0, psi=1.0)
        1.0
    """

    def __init__(self, config: ARSConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.window = torch.zeros(config.window, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.gate_state = torch.zeros(len(_OPEN), dtype=torch.float64, device=device)
        self.gate_state[0].fill_(1.0)
        self._prepare()

    def _prepare(self) -> None:
        """Make what is not pickled."""
        self._settings = {name: getattr(self.config, name) for name in _SETTINGS}
        self._norm_watch = _NormWatch(self.window)

    @property
    def entropy_guard(self) -> EntropyGuard:
        """Psi, from the autocorrelation of the surprises."""
        return self._part(EntropyGuard)

    @property
    def surprise_gate(self) -> SurpriseGate:
        """Phi, from a surprise and Psi; opens over ``release``.

        The controller itself shortens that to ``first_release``, as it remembers whether there was
        an alarm before.
        """
        return self._part(SurpriseGate)

    @property
    def chronos_jitter(self) -> ChronosJitter:
        """The relative change chi of the learning rate, from Psi and the step."""
        return self._part(ChronosJitter)

    def _part(self, kind: type[_Part]) -> _Part:
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: getattr(self.config, name) for name in names})

    def __getstate__(self) -> dict[str, object]:
        """Pickle the settings and the memory; events of what has been noticed cannot be."""
        return {"config": self.config, **self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` returned, or what another version did."""
        self.config = state["config"]
        self.window, self.counts, self.gate_state = (
            state[name] for name in ("window", "counts", "gate_state")
        )
        self._prepare()

    def observe(self, surprise: Tensor | float) -> reference.Signals:
        """Observe one surprise and return the gate for this step.

        Args:
            surprise: The step's surprise, 0-d, on any device, or a number.

        Returns:
            The signals (eqs. 1 to 4): numbers on a CPU, 0-d float64 on another device.
        """
        return reference.controller_step_(
            surprise, self.window, self.counts, self.gate_state, **self._settings
        )

    def check_norm(self, groups: list[dict[str, Any]]) -> None:
        """Warn once if the gradient norms that were observed do not move: clipped, perhaps.

        To be called after every step that watches the norm. Nothing waits for a GPU.

        Args:
            groups: The parameter groups, with the gradients.
        """
        if self._norm_watch.is_due():
            self._norm_watch.check([param for group in groups for param in group["params"]])

    def latest(self) -> Tensor:
        """Return the last finite surprise, 0-d, or 0 before the first; nothing waits for it."""
        place = (self.counts[0] - 1) % self.window.numel()
        return self.window.gather(0, place.view(1)).reshape(())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the window (W,), the counts (2,) and the gate's memory (5,), as references."""
        return {"window": self.window, "counts": self.counts, "gate_state": self.gate_state}

    def check_state_dict(self, state: Any) -> None:
        """Check that a saved state fits this controller, changing nothing.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            TypeError: Something in it has another type.
            ValueError: An entry is missing, was saved with another window, or holds numbers that no
                controller has had.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the controller's state must be a dict, got {type(state).__name__}")
        for name, mine in self.state_dict().items():
            if name == "gate_state" and name not in state:
                continue  # as in version 0.1.0, or with last_phi in its place
            if name not in state:
                raise ValueError(f"the controller's state lacks {name!r}; was it saved by ARS?")
            _check_numbers(name, state[name], mine)
        if "last_phi" in state:
            _check_numbers("last_phi", state["last_phi"], self.gate_state[0])
        watches = state.get("watches")
        if watches not in (None, "loss", "grad_norm", "entropy", "callable"):
            raise ValueError(f"the controller has watched {watches!r}, which it cannot")

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state saved by :meth:`state_dict` into this controller's tensors.

        Version 0.1.0 saved nothing of the gate: it is taken to be open. A ``last_phi``, which was
        saved in its place later, opens over ``release``, as it would have.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: It does not fit; nothing has been changed then.
        """
        self.check_state_dict(state)
        self.window.copy_(state["window"])
        self.counts.copy_(state["counts"])
        if "gate_state" in state:
            self.gate_state.copy_(state["gate_state"])
        else:
            self.gate_state.copy_(torch.tensor(_OPEN, dtype=torch.float64, device="cpu"))
            if "last_phi" in state:
                self.gate_state[0].copy_(state["last_phi"])
                self.gate_state[1].fill_(1.0)


class _NormWatch:
    """Looks whether a window of gradient norms moves: when it is full, then ever more rarely.

    A norm that was clipped before the step is the same at every step: m n / (n + 1e-6) with n >= m,
    and rounding. No other norm stays within that, but where the gradients never change, or do no
    more, as at the end of training. Of the last there is no warning, nor of gradients that nobody
    has computed anew, as in a benchmark.

    Args:
        window: The controller's, of norms.
    """

    def __init__(self, window: Tensor) -> None:
        self._window = window
        self._steps, self._next = 0, window.numel()
        self._seen: tuple[Tensor | None, int] = None, 0  # a gradient, and its version
        self._copy: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def is_due(self) -> bool:
        """Count a step; whether there is something to do after it."""
        self._steps += 1
        return self._steps >= self._next - 1 or self._copy is not None

    def check(self, params: list[Tensor]) -> None:
        """Copy the window if it is time, and warn of a copy that has arrived and does not move."""
        window = self._window
        if window.device.type not in ("cpu", "cuda"):
            return  # nor are the kernels for others
        if window.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self._steps >= self._next - 1:
            grads = [param.grad for param in params if param.grad is not None]
            least = min(grads, key=Tensor.numel, default=None)  # held for a step, so a small one
            before, version = self._seen
            # A tensor of inference mode has no version.
            known = least is not None and not least.is_inference()
            self._seen = least, least._version if least is not None and known else 0
            is_new = not known or least is not before or self._seen[1] != version
        if self._steps >= self._next:
            self._is_first = self._next == window.numel() and is_new
            self._next = 2 * self._steps
            eps = max((torch.finfo(grad.dtype).eps for grad in grads), default=0.0)
            self._tolerance = max(3 * eps, 1e-5)
            self._copy, self._event = _to_host(window)
        if self._copy is not None and (self._event is None or self._event.query()):
            self._warn_if_constant(self._copy)
            self._copy, self._event, self._seen = None, None, (None, 0)

    def _warn_if_constant(self, norms: Tensor) -> None:
        low, high = norms.min().item(), norms.max().item()
        if high <= 0:
            return
        tolerance = self._tolerance + min(2e-6 / high, 1e-4)  # for the 1e-6 of clipping
        if 0 < high - low <= tolerance * high or (low == high and self._is_first):
            self._next = sys.maxsize
            warnings.warn(
                f"the gradient norm, which the controller watches, has been {high:.4g} in each "
                f"of the last {norms.numel()} steps, so it sees nothing. If the gradients are "
                "clipped before the step, pass step(loss=loss), or clip in the step instead: "
                "ARSAdamW(..., max_grad_norm=1.0)",
                stacklevel=caller_stacklevel(),
            )


def caller_stacklevel() -> int:
    """Return how many frames above who asks the first one is that is neither ours nor torch's."""
    level, frame = 0, inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "torch")  # none in what Dynamo has written
        if name.partition(".")[0] not in ("ars", "torch"):
            break
        level, frame = level + 1, frame.f_back
    return level


def _to_host(window: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Copy to the host; on a GPU without waiting, with the event of the copy's arrival."""
    copy = torch.empty(window.shape, dtype=window.dtype, device="cpu", pin_memory=window.is_cuda)
    copy.copy_(window, non_blocking=True)
    if not window.is_cuda:
        return copy, None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(window.device))
    return copy, event


def _check_numbers(name: str, saved: Any, mine: Tensor) -> None:
    """Raise unless what was saved of a controller fits its own, and is possible.

    Raises:
        TypeError: It is no tensor of such numbers.
        ValueError: It has another shape, or numbers that no controller has had.
    """
    exact = not mine.is_floating_point()
    if (
        not isinstance(saved, Tensor)
        or saved.layout != torch.strided
        or saved.is_complex()
        or saved.is_floating_point() == exact
    ):
        kind = saved.dtype if isinstance(saved, Tensor) else type(saved).__name__
        raise TypeError(f"the controller's {name!r} must be a {mine.dtype} tensor, got {kind}")
    if saved.shape != mine.shape:
        raise ValueError(
            f"the controller's {name!r} was saved with shape {tuple(saved.shape)}, this one has "
            f"{tuple(mine.shape)}: use the same ARSConfig(window=...)"
        )
    if saved.is_meta:
        if not mine.is_meta:
            raise ValueError(f"the controller's {name!r} was saved on the meta device, empty")
        return
    right = not bool(saved.isnan().any())
    if name == "counts":  # of surprises, of steps
        right = 0 <= int(saved[0]) <= int(saved[1])
    elif name == "window":
        right = bool(saved.isfinite().all())
    elif right:  # the gate, and whether it opens over the longer time
        right = bool(((saved.flatten()[:2] >= 0) & (saved.flatten()[:2] <= 1)).all())
    if not right:
        raise ValueError(
            f"the controller's {name!r} was saved as {saved.tolist()}, which it cannot have been: "
            "the file is damaged, or of something else"
        )
