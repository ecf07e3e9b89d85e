r"""One backward pass that leaves every sample's squared gradient.

A tap sits behind every layer: the identity forwards, and backwards the place where the layer's
input and its output's gradient meet, from which a rule (:mod:`ars.regularizers.fisher.rules`) makes
the squares. Only the taps are differentiated by: the layer itself runs with a detached weight.
What a tap saves goes through autograd like any layer's input: checkpointing recomputes it.

Which dimension of a layer's input holds the samples is found by comparing one sample's forward pass
with two samples': the dimension that doubles. Where none does (a position embedding, read once for
all samples and broadcast) the layer's output is expanded to the samples before it is used, so that
its gradient arrives before broadcasting adds the samples up. So is a parameter that a module adds
or concatenates by itself, if its first dimension is 1 (a class token, a position embedding). What
has no dimension of 1 for them is followed to where it meets the samples
(:mod:`ars.regularizers.fisher.shared`): a bias of relative positions, a parameter of a module with
layers below it, the weights of a layer that such a module reads without calling it.

That is a guess from shapes. Two proofs make it safe, before anything is added:

* No other use: in a graph whose layers ran with detached weights, nothing may lead to a parameter.
  This is a property of the graph, not of values, and is looked at for every batch.
* Rows belong where they are taken to belong: the gradients g_r of a layer's output rows are linear
  in the cotangents v_n of the samples, so a row of sample n alone, and no other, satisfies

      g_r(2^k_1 v_1, ..., 2^k_N v_N) = 2^k_n g_r(v_1, ..., v_N)

  for all v and k. It is tried with random ones; powers of two leave all rounding as it is
  (:mod:`ars.regularizers.fisher.row_proof`). This costs two backward passes through the taps. They
  are made again for every batch whose operators or shapes are new, or where values decide where
  rows go.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ars.regularizers.fisher.estimators import Chunk, Samples, cotangents, with_lookahead
from ars.regularizers.fisher.row_proof import (
    Operators,
    Passes,
    RowProof,
    computed_in,
    outputs_tolerance,
)
from ars.regularizers.fisher.rules import (
    PATCHES,
    Contribution,
    Pieces,
    Rule,
    Sums,
    add_squares_of_uses_,
    can_be_differentiated,
    differentiated,
    is_known_to_mix,
    rule_of,
    to_samples,
)
from ars.regularizers.fisher.shared import Shared

__all__ = ["Taps", "UnsupportedModelError"]

# Elements of all samples' gradients of a parameter that a module uses by itself.
LOOSE = 8 * PATCHES
# What a tap's backward pass is given: (the layer's input, its output's gradient).
_Record: TypeAlias = Callable[[Tensor, Tensor], None]


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
    """One call of a layer, as it was of one sample.

    Args:
        dim: The samples' dimension of its input, if any.
        shape: Of the input.
        others: Other arguments, by number or name, whose first dimension is the samples'.
        shares_output: Whether the output is the same for all samples, though the input is not.
    """

    dim: int | None
    shape: torch.Size
    others: tuple[int | str, ...] = ()
    shares_output: bool = False

    def is_expanded(self, x: Tensor) -> bool:
        """Whether ``x``, which was the same for all samples, has been expanded to them since."""
        return len(x) != 1 if self.has_sample_dim else x.ndim > len(self.shape)

    @property
    def has_sample_dim(self) -> bool:
        """Whether the input has a dimension of size 1 for the samples."""
        return len(self.shape) > 1 and self.shape[0] == 1


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _other_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Tensor]:
    """The tensors that a call reads beside its input, by number or name."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {key: value for key, value in given[1:] if isinstance(value, Tensor)}


def _call_of(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    others: tuple[int | str, ...],
) -> Callable[..., Tensor]:
    """A module's ``forward`` by its input and ``others``; further arguments are those of a call."""
    given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    first = next(iter(given))

    def call(*read: Tensor) -> Tensor:
        now = given | dict(zip((first, *others), read, strict=True))
        places = [value for key, value in now.items() if isinstance(key, int)]
        output: Tensor = module.forward(
            *places, **{key: value for key, value in now.items() if isinstance(key, str)}
        )
        return output

    return call


class _Seen(NamedTuple):
    """The shapes of a call; of a layer with a rule, that of its input alone."""

    module: nn.Module
    shape: torch.Size
    others: dict[int | str, torch.Size]
    output: torch.Size


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
        self, model: nn.Module, parameters: dict[str, nn.Parameter], inputs: Samples
    ) -> None:
        self._model = model
        self._names = {p: name for name, p in parameters.items()}
        # Parameters that modules use themselves, with a first dimension of 1 and without one.
        self._broadcast: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._own: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._loose: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._layers = self._tapped_layers()
        one, two = self._shapes(inputs[:1]), self._shapes(inputs[:2])
        if [seen.module for seen in one] != [seen.module for seen in two]:
            raise UnsupportedModelError("one sample takes another path than two")
        for module in self._layers.keys() - {seen.module for seen in one}:
            del self._layers[module]
            self._loose += [(module, name, p) for name, p in self._own.pop(module).items()]
        self._calls: dict[nn.Module, list[_Call]] = {m: [] for m in self._layers}
        uses: Counter[nn.Parameter] = Counter()
        for alone, both in zip(one, two, strict=True):
            module = alone.module
            self._calls[module].append(self._call(alone, both))
            uses.update(set(module.parameters(recurse=False)))
        uses.update(p for _, _, p in (*self._broadcast, *self._loose))
        self._shared = {p for p, n in uses.items() if n > 1}
        self._pending: dict[nn.Parameter, list[Contribution]] = {}
        self._generator = torch.Generator(inputs.device).manual_seed(0)
        # What taps add to: a proof, while one is made, or else the sums, but not in the backward
        # pass that looks for other uses, as it runs through the layers behind such a use.
        self._proof: RowProof | None = None
        self._squaring = False
        self._passes = Passes(model)
        self._without_taps = False  # for a moment

    def _tapped_layers(self) -> dict[nn.Module, str]:
        layers = {}
        known = {
            p for m in self._model.modules() if rule_of(m) for p in m.parameters(recurse=False)
        }
        for path, module in self._model.named_modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if p in self._names}
            if own and rule_of(module) is not None:
                layers[module] = f"{type(module).__name__} {path or 'itself'!r}"
                self._own[module] = {n: p for n, p in own.items() if n in {"weight", "bias"}}
            elif all(p.ndim > 1 and len(p) == 1 for p in own.values()):
                self._broadcast += [(module, name, p) for name, p in own.items()]
            elif can_be_differentiated(module, self._names):
                layers[module] = f"{type(module).__name__} {path or 'itself'!r}"
                self._own[module] = own
            elif is_known_to_mix(module):
                raise UnsupportedModelError(
                    f"{type(module).__name__} {path or 'itself'!r} has no rule"
                )
            else:  # another name of a layer's parameter, or its own
                self._loose += [(module, name, p) for name, p in own.items() if p not in known]
        return layers

    def _shapes(self, inputs: Samples) -> list[_Seen]:
        found = []

        def record_shape(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = _input(args, kwargs)
            if not (isinstance(x, Tensor) and isinstance(output, Tensor)):
                raise UnsupportedModelError(f"{self._layers[module]} does not map tensors to one")
            others = _other_tensors(args, kwargs) if rule_of(module) is None else {}
            shapes = {key: other.shape for key, other in others.items()}
            found.append(_Seen(module, x.shape, shapes, output.shape))

        handles = [m.register_forward_hook(record_shape, with_kwargs=True) for m in self._layers]
        try:
            with torch.no_grad():
                inputs.run(self._model)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _call(self, alone: _Seen, both: _Seen) -> _Call:
        """Compare one sample's call of a layer with two samples'."""  # noqa: DOC501
        name = self._layers[alone.module]
        dim = self._sample_dim(alone.module, alone.shape, both.shape)
        if rule_of(alone.module) is not None:
            return _Call(dim, alone.shape)
        if alone.others.keys() != both.others.keys():
            raise UnsupportedModelError(f"{name} is called otherwise for two samples")
        others: list[int | str] = []
        for key, shape in alone.others.items():
            if both.others[key] == shape:
                continue  # the same for all samples
            if dim is None or both.others[key] != (2 * shape[0], *shape[1:]):
                raise UnsupportedModelError(
                    f"{name} sees one sample's {key!r} as {tuple(shape)}, two as "
                    f"{tuple(both.others[key])}"
                )
            others.append(key)
        shared = dim is not None and alone.output == both.output
        if shared and alone.output[:1] != (1,):
            raise UnsupportedModelError(f"{name} returns {tuple(alone.output)} for all samples")
        return _Call(dim, alone.shape, tuple(others), shared)

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
    def _tapped(self, tap: Any) -> Iterator[None]:
        """Run the layers with detached parameters, and ``tap`` right after them."""

        def detach(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._without_taps:
                module._parameters.update({n: p.detach() for n, p in self._own[module].items()})  # type: ignore[misc]

        def attach(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            module._parameters.update(self._own[module])
            return None if self._without_taps else tap(module, args, kwargs, output)

        handles = []
        try:
            for module in self._layers:
                # After the hooks that others put before a layer, and before those behind it.
                handles += [
                    module.register_forward_pre_hook(detach, with_kwargs=True),
                    module.register_forward_hook(attach, with_kwargs=True, prepend=True),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, own in self._own.items():  # of a layer that failed, or was cut short
                module._parameters.update(own)

    @contextmanager
    def _expanded(
        self, samples: int, root: Tensor, record: Callable[..., _Record]
    ) -> Iterator[None]:
        """Put a copy for every sample in the place of each parameter that modules use themselves.

        Raises:
            UnsupportedModelError: The copies of one are too large.
        """
        constants = self._constants()
        try:
            for module, name, p in self._broadcast:
                copies = p.detach().expand(samples, *p.shape[1:])
                tapped = _Tap.apply(copies, root.detach(), root, record(p))
                module._parameters[name] = tapped
            for module, name, p in self._loose:
                if samples * p.numel() > LOOSE:
                    raise UnsupportedModelError(
                        f"{type(module).__name__} uses {self._names[p]!r} by itself, whose "
                        f"gradients of {samples} samples are too large to be held (chunk_size "
                        "divides a batch)"
                    )
                copies = p.detach().expand(samples, *p.shape)
                tapped = _Tap.apply(copies, root.detach(), root, record(p))
                module._parameters[name] = Shared.of(tapped, constants)  # type: ignore[assignment]
            yield
        finally:
            for module, name, p in (*self._broadcast, *self._loose):
                module._parameters[name] = p

    def _constants(self) -> set[int]:
        """The addresses of what holds no samples."""
        tensors = (*self._model.parameters(), *self._model.buffers())
        return {Operators.address(tensor) for tensor in tensors}

    def add_squares(
        self, total: dict[str, Tensor], estimator: str, chunk: Chunk, *, prove: bool = True
    ) -> None:
        """Add the squared gradients of every sample to ``total``, in place.

        Args:
            total: Sums by parameter name, contiguous, in the dtype to square and add in.
            estimator: A name in ``ESTIMATORS``.
            chunk: The samples.
            prove: Whether to prove that rows belong to their samples; if not, the result must be
                compared with another.

        Raises:
            UnsupportedModelError: The model cannot be run with taps, or one of the two proofs
                fails. ``total`` is then as it was.
        """
        samples = len(chunk.targets)
        root = torch.zeros((), device=chunk.targets.device, requires_grad=True)
        calls: Counter[nn.Module] = Counter()
        tapped: list[str] = []
        float16 = False
        constants = self._constants()

        def number(name: str) -> int:
            tapped.append(name)
            return len(tapped) - 1

        def tap(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            nonlocal float16
            x = _input(args, kwargs)
            # Recomputed by a checkpoint, a layer is called again, in the same order.
            name, known = self._layers[module], self._calls[module]
            if not known:
                raise UnsupportedModelError(f"{name} was not used at first")
            call = known[calls[module] % len(known)]
            calls[module] += 1
            is_shared = isinstance(output, Shared)
            x, output = (t.each if isinstance(t, Shared) else t for t in (x, output))
            x = x.detach()
            if call.dim is None and not call.is_expanded(x):
                skip = int(call.has_sample_dim)
                is_shared = not skip
                x, output = (t.expand(samples, *t.shape[skip:]) for t in (x, output))
            elif call.shares_output and len(output) == 1:
                output = output.expand(samples, *output.shape[1:])
            dim = call.dim or 0
            if any(t.ndim <= dim or t.shape[dim] % samples for t in (x, output)):
                raise UnsupportedModelError(
                    f"{name} reads {tuple(x.shape)} for {samples} samples: "
                    "not as many rows for each"
                )
            float16 |= output.dtype == torch.float16
            me = number(name)
            rule, alone = self._rule(module, args, kwargs, call, samples), rule_of(module) is None

            def record(x: Tensor, gradient: Tensor) -> None:
                with torch.autocast(gradient.device.type, enabled=False):
                    gradient = to_samples(gradient, dim, samples)
                    if self._proof is not None:
                        self._proof.add(me, gradient)
                    if self._squaring or alone:
                        uses = rule(module, to_samples(x, dim, samples), gradient)
                    if self._squaring:
                        self._record(total, module, uses)
                    elif alone:  # may fail: then before anything is added
                        for use in uses.values():
                            if isinstance(use, Pieces):
                                use.gradients(slice(1))

            tapped_output: Tensor = _Tap.apply(output, x, root, record)
            return Shared.of(tapped_output, constants) if is_shared else tapped_output

        def record_copies(p: nn.Parameter) -> _Record:
            me = number(f"parameter {self._names[p]!r}")

            def record(_: Tensor, gradient: Tensor) -> None:
                if self._proof is not None:
                    self._proof.add(me, gradient.reshape(samples, 1, -1))
                elif self._squaring:
                    self._add(total, p, Sums(gradient.reshape(samples, *p.shape)))

            return record

        self._pending.clear()
        with self._tapped(tap), self._expanded(samples, root, record_copies):
            try:
                logits = self._passes.run(chunk.inputs)
                self._check_calls(calls)
                self._check_no_other_use(logits)
                if prove and samples > 1 and self._passes.needs_proof:
                    seen = self._check_rows(logits, root, chunk, tapped, float16=float16)
                    self._passes.mark_proven(logits, seen, ours=_Tap._backward_cls)
            except UnsupportedModelError:
                raise
            except Exception as error:  # whatever the taps do to the model
                raise UnsupportedModelError(f"{type(error).__name__}: {error}") from error
            found = cotangents(estimator, logits.detach(), chunk)
            self._squaring = True
            try:
                for cotangent, more in with_lookahead(found):
                    torch.autograd.grad(
                        logits, root, cotangent, retain_graph=more, allow_unused=True
                    )
                    for p, uses in self._pending.items():
                        add_squares_of_uses_(total[self._names[p]], uses, samples)
                    self._pending.clear()
            finally:
                self._squaring = False

    def _check_calls(self, calls: Counter[nn.Module]) -> None:
        for module, known in self._calls.items():
            if calls[module] != len(known):
                raise UnsupportedModelError(
                    f"{self._layers[module]} was called {len(known)} times at first, "
                    f"now {calls[module]} times"
                )

    def _check_no_other_use(self, logits: Tensor) -> None:
        found = torch.autograd.grad(
            logits, list(self._names), logits.detach(), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(self._names.values(), found, strict=True):
            if gradient is not None:
                raise UnsupportedModelError(f"it uses {name!r} outside of the layer that has it")

    def _check_rows(
        self, logits: Tensor, root: Tensor, chunk: Chunk, tapped: list[str], *, float16: bool
    ) -> Tensor:
        """Return which samples have reached which layers.

        Raises:
            UnsupportedModelError: A row belongs to another sample than its place says.
        """
        if (logits.isnan() | (logits == torch.inf)).any():
            # Nor will the importance be finite, which is an error of its own.
            return torch.zeros(1, dtype=torch.bool)
        self._check_independence(logits, chunk)
        proof = RowProof(logits.detach(), self._generator, float16=float16)
        self._proof = proof
        try:
            for cotangent in proof.cotangents():
                torch.autograd.grad(logits, root, cotangent, retain_graph=True, allow_unused=True)
        finally:
            self._proof = None
        evidence = proof.evidence()
        if not evidence.finite:
            raise UnsupportedModelError("some of its gradients are not finite")
        if evidence.misplaced is not None:
            raise UnsupportedModelError(
                f"{tapped[evidence.misplaced]} holds rows of other samples than their places say"
            )
        return evidence.seen

    def _check_independence(self, logits: Tensor, chunk: Chunk) -> None:
        """Raise UnsupportedModelError if a random sample's logits depend on the others."""  # noqa: DOC501
        n = int(torch.randint(len(logits), (), generator=self._generator, device=logits.device))
        expanded = (*self._broadcast, *self._loose)
        copies = [module._parameters[name] for module, name, _ in expanded]
        self._without_taps = True
        try:
            for module, name, p in expanded:
                module._parameters[name] = p
            with torch.no_grad():
                alone = chunk.inputs[n : n + 1].run(self._model)
        finally:
            self._without_taps = False
            for (module, name, _), copy in zip(expanded, copies, strict=True):
                module._parameters[name] = copy
        together = logits.detach()[n : n + 1]
        largest = together[together.isfinite()].abs().amax() if together.isfinite().any() else 0.0
        allowed = outputs_tolerance(computed_in(self._names, chunk.inputs))
        if not torch.isclose(alone, together, rtol=0, atol=float(allowed * largest)).all():
            raise UnsupportedModelError(
                f"sample {n} of {len(logits)} has other logits by itself: samples influence one "
                "another"
            )

    def _rule(self, module: nn.Module, args: Any, kwargs: Any, call: _Call, samples: int) -> Rule:
        """The rule of a layer, for one call of it."""  # noqa: DOC501
        known = rule_of(module)
        if known is not None:
            return known[0]
        given = _other_tensors(args, kwargs)
        others = [given[key].detach() for key in call.others]
        if any(len(other) % samples for other in others):
            raise UnsupportedModelError(
                f"{self._layers[module]} reads another tensor with not as many rows for each of "
                f"{samples} samples"
            )
        read = [to_samples(other, 0, samples) for other in others]
        called = _call_of(module, args, kwargs, call.others)
        return differentiated(module, self._own[module], called, read)

    def _record(
        self, total: dict[str, Tensor], module: nn.Module, uses: dict[str, Contribution]
    ) -> None:
        for name, contribution in uses.items():
            p = self._own[module].get(name)
            if p is not None:
                self._add(total, p, contribution)

    def _add(self, total: dict[str, Tensor], p: nn.Parameter, use: Contribution) -> None:
        if p in self._shared:
            self._pending.setdefault(p, []).append(use)
        else:
            use.add_squares_(total[self._names[p]])
