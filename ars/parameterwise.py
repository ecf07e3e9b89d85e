"""One step of an optimizer, taken parameter by parameter, in the order their gradients arrive."""

import dataclasses
import threading

import torch
from torch import Tensor

from ars import functional, reference
from ars.adam import ARSAdam
from ars.batch import DIAGNOSTICS, Batch, Hyper, Options, gated
from ars.collect import Collector, check_terms
from ars.config import ARSConfig
from ars.controller import ARSController
from ars.penalty import parameter_names

__all__ = ["ParameterwiseStep"]

PENALTY = DIAGNOSTICS.index("penalty")
SIGNALS = len(reference.Signals._fields)  # the diagnostics begin with them


class ParameterwiseStep:
    """Takes the optimizer's ``step(loss=loss)`` in parts.

    The first parameter's part is an ordinary step: it observes the loss and writes the diagnostics.
    The others repeat its gate.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: ARSAdam) -> None:
        self._optimizer = optimizer
        self._parts: dict[Tensor, _Part] = {}
        self._first = _Part()  # whichever comes first: its kernels observe and report
        self._scratch = torch.zeros_like(optimizer._buffer)  # what the other parts report
        self._open: ARSController | None = None
        self._lock = threading.Lock()  # autograd has a thread for every device
        self.begin("loss", None)

    def begin(self, watches: str, surprise: Tensor | None) -> None:
        """Begin a step.

        Args:
            watches: What the surprise is.
            surprise: 0-d; None if there is no controller.
        """
        self._watches, self._surprise = watches, surprise
        self._places: dict[Tensor, tuple[int, int]] = {}  # indices of the group, of the parameter
        for index, group in enumerate(self._optimizer.param_groups):
            for param in group["params"]:
                self._places[param] = index, len(self._places)
        check_terms(self._optimizer._terms, self._places)
        # Parameters that have been replaced do not stay for the tables that were made of them.
        self._parts = {p: part for p, part in self._parts.items() if p in self._places}
        self._stepped: set[Tensor] = set()
        self._penalties: list[Tensor] = []
        self._hypers: list[list[Hyper]] = []  # for the parameters of each group, after the first
        self._options: Options | None = None

    @torch.no_grad()
    def take_(self, param: Tensor) -> None:
        """Step one parameter, and free its gradient.

        Args:
            param: Has a gradient. One that is in the optimizer no more is left alone.

        Raises:
            RuntimeError: Its gradient is sparse, or it has been stepped.
        """
        with self._lock:
            if param not in self._places:
                return
            if param in self._stepped:
                name = parameter_names(self._optimizer.param_groups)[param]
                raise RuntimeError(
                    f"{name} has got a second gradient in one backward pass, after its first was "
                    "used: a checkpoint with use_reentrant=True does that to tied weights, so pass "
                    "use_reentrant=False"
                )
            if self._options is None:
                self._take_first(param)
            else:
                self._take_next(param, self._options, self._hypers[self._places[param][0]])
            self._stepped.add(param)
            param.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """Let the penalty pull at what had no gradient, and report that there was a step."""
        if self._options is None:  # no parameter had a gradient
            return
        optimizer, held = self._optimizer, Batch()
        for param, (group, number) in self._places.items():
            term = optimizer._terms.get(param) if param.requires_grad else None
            if term is None or param in self._stepped:
                continue
            if self._options.proximal and term.pull is None:
                optimizer._append(held, group, number, param)
                continue
            param.grad = torch.zeros_like(param)
            hypers = [hyper._replace(weight_decay=0.0) for hyper in self._hypers[group]]
            self._take_next(param, self._options, hypers)
            self._stepped.add(param)
            param.grad = None
        if held.params:
            first = next(param for param in self._places if param in self._stepped)
            count = optimizer.state[first]["step"]
            self._penalties.append(functional.hold_(held, *self._given, count=count))
        if self._penalties:
            self._optimizer._buffer[PENALTY] += torch.stack(self._penalties).sum()
        # What learning rate schedulers look for.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]

    def _take_first(self, param: Tensor) -> None:
        optimizer = self._optimizer
        optimizer._follow()
        hypers, options = optimizer._settings(self._surprise)
        batch = self._collect(param, self._first)
        options = optimizer._refresh(options)
        optimizer._watches = self._watches
        optimizer._buffer[PENALTY] = 0.0  # without a penalty of its own, it writes none
        self._step(batch, hypers, options, self._first)
        self._given = hypers, options
        self._repeat(hypers, options)

    def _take_next(self, param: Tensor, options: Options, hypers: list[Hyper]) -> None:
        part = self._parts.setdefault(param, _Part())
        batch = self._collect(param, part)
        self._step(batch, hypers, options, part)
        if batch.anchors[0] is not None:
            self._penalties.append(self._scratch[PENALTY].clone())

    def _collect(self, param: Tensor, part: "_Part") -> Batch:
        """Gather one parameter's tensors, the last step's if they still are the same."""
        optimizer, place = self._optimizer, self._places[param]
        group = {**optimizer.param_groups[place[0]], "params": [param]}

        def append(batch: Batch, _: int, __: int, param: Tensor) -> None:
            optimizer._append(batch, *place, param)

        state = {param: optimizer.state[param]}
        return part.collector.collect(
            [group], state, optimizer._terms, append, optimizer._check, whole=False
        )

    def _step(self, batch: Batch, hypers: list[Hyper], options: Options, part: "_Part") -> None:
        implementation = self._optimizer._implementation
        # The kernels' tables are a part's own; the rest needs no more than memory to work in.
        kept = part.kept if implementation == "triton" else self._optimizer._kept
        try:
            functional.step_(implementation, batch, hypers, options, kept)
        finally:
            batch.grads = []

    def _repeat(self, hypers: list[Hyper], options: Options) -> None:
        """Make of the first part's settings those that give the others the same gate."""
        buffer = options.diagnostics
        if self._scratch.device != buffer.device:
            self._scratch = torch.zeros_like(buffer)
        self._options = options._replace(diagnostics=self._scratch, penalty=None)
        self._hypers = [hypers] * len(hypers)
        if options.controller is None:
            return
        config = options.controller.config
        if self._optimizer._implementation != "triton":
            signals = buffer[:SIGNALS].clone()
            on_cpu = signals.device.type == "cpu"
            values = signals.tolist() if on_cpu else signals.unbind()
            repeated = _Repeated(config, reference.Signals(*values))
            self._options = self._options._replace(controller=repeated)
            return
        # A kernel observes by itself. So it gets what is gated already, of its group alone, and a
        # controller that is open whatever it observes, with the constants it is compiled for.
        if self._open is None or self._open.window.device != buffer.device:
            settings = dataclasses.replace(config, phi_min=1.0, jitter=0.0)
            self._open = ARSController(settings, buffer.device)
        self._options = self._options._replace(controller=self._open)
        idle = [hyper._replace(lr=0.0, beta1=0.0, beta2=0.0, strength=0.0) for hyper in hypers]
        self._hypers = [
            [*idle[:i], _gated_there(hyper, buffer, config.gate), *idle[i + 1 :]]
            for i, hyper in enumerate(hypers)
        ]


class _Part:
    """What is kept from step to step of one parameter."""

    def __init__(self) -> None:
        self.collector = Collector()
        self.kept = functional.Kept()


class _Repeated(ARSController):
    """Says again what a controller has said to the first parameter of a step."""

    def __init__(self, config: ARSConfig, signals: reference.Signals) -> None:
        self.config, self._signals = config, signals

    def observe(self, surprise: Tensor | float) -> reference.Signals:
        """Return the gate of this step, whatever the surprise."""
        return self._signals


def _gated_there(hyper: Hyper, diagnostics: Tensor, gate: tuple[str, ...]) -> Hyper:
    """Apply the gate on the device, in float64 as the kernel does."""

    def there(number: Tensor | float) -> Tensor:
        return torch.as_tensor(number, dtype=torch.float64, device=diagnostics.device)

    signals = reference.Signals(*diagnostics[:SIGNALS].clone().unbind())
    hyper = gated(hyper._replace(lr=there(hyper.lr)), signals, tuple({*gate} - {"betas"}))
    # The kernel needs the betas as they are, too.
    return hyper._replace(beta_factor=signals.phi) if "betas" in gate else hyper
