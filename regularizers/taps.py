r"""One backward pass that leaves every sample's squared gradient.

A tap sits behind every layer: the identity forwards, and backwards the place where the layer's
input and its output's gradient meet, from which a rule (:mod:`ars.regularizers.layer_rules`) makes
the squares. Only the taps are differentiated by, so that no layer computes its own weight gradient.
What a tap saves goes through autograd like any layer's input: checkpointing recomputes it.

Which dimension of a layer's input holds the samples is found by comparing one sample's forward pass
with two samples': the dimension that doubles. Where none does (a position embedding, read once for
all samples and broadcast) the layer's output is expanded to the samples before it is used, so that
its gradient arrives before broadcasting adds the samples up. So is a parameter that a module adds
or concatenates by itself, if its first dimension is 1 (a class token, a position embedding).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ars.regularizers.contributions import Contribution, Sums, add_squares_of_uses_
from ars.regularizers.cotangents import Chunk, and_whether_more, cotangents
from ars.regularizers.layer_rules import rule_of, to_samples

__all__ = ["Taps", "UnsupportedModelError"]


class UnsupportedModelError(Exception):
    """The message says which layer, and why."""


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, root: Tensor, record: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.record = record
        # No view of it in autograd's eyes, as views made here must not be modified in place.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.record(x, gradient)
        return gradient, None, None, None


class _Call(NamedTuple):
    """One call of a layer: the samples' dimension of its input, if any, and the input's shape."""

    dim: int | None
    shape: torch.Size

    def is_expanded(self, x: Tensor) -> bool:
        """Whether ``x``, which was the same for all samples, has been expanded to them since."""
        return len(x) != 1 if self.leads else x.ndim > len(self.shape)

    @property
    def leads(self) -> bool:
        """Whether the input has a dimension of size 1 for the samples."""
        return len(self.shape) > 1 and self.shape[0] == 1


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get("input")


class Taps:
    """The taps of one model, and how its layers hold the samples.

    Args:
        model: In evaluation mode.
        parameters: The parameters to differentiate by, by name.
        inputs: Two samples at least, to look at the model with.

    Raises:
        UnsupportedModelError: A layer with trainable parameters is unknown, or does not hold the
            samples in one dimension.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], inputs: Tensor
    ) -> None:
        self._model = model
        self._names = {p: name for name, p in parameters.items()}
        self._broadcast: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._layers = self._tapped_layers()
        one, two = self._shapes(inputs[:1]), self._shapes(inputs[:2])
        if [m for m, _ in one] != [m for m, _ in two]:
            raise UnsupportedModelError("one sample takes another path than two")
        self._calls: dict[nn.Module, list[_Call]] = {m: [] for m in self._layers}
        uses: Counter[nn.Parameter] = Counter()
        for (module, alone), (_, both) in zip(one, two, strict=True):
            self._calls[module].append(_Call(self._sample_dim(module, alone, both), alone))
            uses.update(set(module.parameters(recurse=False)))
        uses.update(p for _, _, p in self._broadcast)
        self._several = {p for p, n in uses.items() if n > 1}
        self._pending: dict[nn.Parameter, list[Contribution]] = {}

    def _tapped_layers(self) -> dict[nn.Module, str]:
        layers = {}
        for path, module in self._model.named_modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if p in self._names}
            if own and rule_of(module) is not None:
                layers[module] = f"{type(module).__name__} {path or 'itself'!r}"
            elif all(p.ndim > 1 and len(p) == 1 for p in own.values()):
                self._broadcast += [(module, name, p) for name, p in own.items()]
            else:
                raise UnsupportedModelError(
                    f"{type(module).__name__} {path or 'itself'!r} has no rule"
                )
        return layers

    def _shapes(self, inputs: Tensor) -> list[tuple[nn.Module, torch.Size]]:
        found = []

        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = _input(args, kwargs)
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                raise UnsupportedModelError(f"{self._layers[module]} does not map one tensor")
            found.append((module, x.shape))

        with self._hooks(look), torch.no_grad():
            self._model(inputs)
        return found

    def _sample_dim(self, module: nn.Module, alone: torch.Size, both: torch.Size) -> int | None:
        name, rule = self._layers[module], rule_of(module)
        if len(alone) != len(both):
            raise UnsupportedModelError(f"{name} sees {tuple(alone)} and {tuple(both)}")
        changed = [i for i, (m, n) in enumerate(zip(alone, both, strict=True)) if m != n]
        if not changed:
            return None
        dim = changed[0]
        if len(changed) > 1 or both[dim] != 2 * alone[dim] or (dim and not (rule and rule[1])):
            raise UnsupportedModelError(
                f"{name} sees one sample as {tuple(alone)}, two as {tuple(both)}"
            )
        return dim

    @contextmanager
    def _hooks(self, hook: Any) -> Iterator[None]:
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _expanded(self, samples: int, root: Tensor, total: dict[str, Tensor]) -> Iterator[None]:
        """Put a copy for every sample in the place of each broadcast parameter."""

        def recorder(p: nn.Parameter) -> Any:
            return lambda _, gradient: self._add(total, p, Sums(gradient.unsqueeze(1)))

        try:
            for module, name, p in self._broadcast:
                copies = p.detach().expand(samples, *p.shape[1:])
                module._parameters[name] = _Tap.apply(copies, root.detach(), root, recorder(p))
            yield
        finally:
            for module, name, p in self._broadcast:
                module._parameters[name] = p

    def add_squares(self, total: dict[str, Tensor], estimator: str, chunk: Chunk) -> None:
        """Add the squared gradients of every sample to ``total``, in place.

        Args:
            total: Sums by parameter name, contiguous, in the dtype to square and add in.
            estimator: A name in ``ESTIMATORS``.
            chunk: The samples, at least two.

        Raises:
            UnsupportedModelError: The layers are not called as they were at first. ``total`` is
                then as it was.
        """
        samples = len(chunk.targets)
        root = torch.zeros((), device=chunk.targets.device, requires_grad=True)
        calls: Counter[nn.Module] = Counter()

        def tap(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            # Recomputed by a checkpoint, a layer is called again, in the same order.
            known = self._calls[module]
            if not known:
                raise UnsupportedModelError(f"{self._layers[module]} was not used at first")
            call = known[calls[module] % len(known)]
            calls[module] += 1
            x = _input(args, kwargs).detach()
            if call.dim is None and not call.is_expanded(x):
                skip = int(call.leads)
                x, output = (t.expand(samples, *t.shape[skip:]) for t in (x, output))
            dim = call.dim or 0

            def record(x: Tensor, gradient: Tensor) -> None:
                with torch.autocast(gradient.device.type, enabled=False):
                    x, gradient = (to_samples(t, dim, samples) for t in (x, gradient))
                    self._record(total, module, x, gradient)

            return _Tap.apply(output, x, root, record)

        self._pending.clear()
        with self._hooks(tap), self._expanded(samples, root, total):
            logits = self._model(chunk.inputs)
            for module, known in self._calls.items():
                if calls[module] != len(known):
                    name = self._layers[module]
                    raise UnsupportedModelError(
                        f"{name} was called {len(known)} times at first, now {calls[module]} times"
                    )
            found = cotangents(estimator, logits.detach(), chunk)
            for cotangent, more in and_whether_more(found):
                torch.autograd.grad(logits, root, cotangent, retain_graph=more, allow_unused=True)
                for p, uses in self._pending.items():
                    add_squares_of_uses_(total[self._names[p]], uses, samples)
                self._pending.clear()

    def _record(
        self, total: dict[str, Tensor], module: nn.Module, x: Tensor, gradient: Tensor
    ) -> None:
        rule = rule_of(module)
        assert rule is not None
        for name, contribution in rule[0](module, x, gradient).items():
            p = module._parameters.get(name)
            if p in self._names:
                self._add(total, p, contribution)

    def _add(self, total: dict[str, Tensor], p: nn.Parameter, use: Contribution) -> None:
        if p in self._several:
            self._pending.setdefault(p, []).append(use)
        else:
            use.add_squares_(total[self._names[p]])
