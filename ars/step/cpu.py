r"""The step on a CPU: torch's own fused Adam, and the penalty in blocks.

Tensors whose gradient must be changed first (penalty, clipping, half precision) are updated in runs
that stay in the cache between the operations, so main memory sees each element once: 28 bytes a
float32 parameter, 36 with a float32 penalty. The way the tensors are divided into calls of torch's
kernels is kept from step to step.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from ars import reference
from ars.csrc_triton.layout import Operands
from ars.reference import SCALED
from ars.step.batch import Batch, Hyper, Options, begin

__all__ = ["CpuStep"]

# Elements of a run: long enough to hide the calls, short enough for a second-level cache.
BLOCK = 1 << 17
# A step at which every beta ** step is 0, that of a beta next to 1 too, so that torch's own bias
# corrections are 1.
INFINITE_STEP = torch.tensor(torch.finfo(torch.float32).max, dtype=torch.float32, device="cpu")
# What has an entry for each element of the parameter, and what of that the update changes.
ELEMENTWISE = (
    "param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor", "importance", "pull",
)  # fmt: skip
WRITTEN = ELEMENTWISE[:4]


class CpuStep:
    """Takes steps with torch's kernels."""

    def __init__(self) -> None:
        self._scratch = _Scratch()
        self._counters: Counters | None = None
        self._division: Division | None = None

    def step_(self, batch: Batch, hypers: list[Hyper], options: Options, *, foreach: bool) -> None:
        """Take one step, in place.

        Args:
            batch: The tensors, all on the CPU.
            hypers: The rows of hyperparameters.
            options: What holds for all groups.
            foreach: Use torch's foreach kernels instead of its fused one.
        """
        hypers = list(map(_as_numbers, hypers))
        start = begin(batch, hypers, options, grad_norm)
        if start is None:
            return
        penalty = 0.0 if options.penalty is None else float(options.penalty)
        counters = self._counters
        if counters is None or not counters.is_current(batch):
            counters = self._counters = Counters(batch)
        products = counters.advance_(hypers, start.hypers)
        kinds = batch.groups if products is None else counters.number_by_products(products)
        factor = float(start.factor)
        scaled = factor * float(start.hypers[0].factor) != 1.0
        division = self._division
        if division is None or not division.is_current(batch, kinds, scaled=scaled):
            division = self._division = Division(batch, kinds, self._scratch, scaled=scaled)
        stretches = division.cut_gradients(batch.grads)
        for part in division.parts:
            pair = None if products is None else products[part.first].tolist()
            hyper = start.hypers[batch.groups[part.first]]
            update = _Update(hyper, pair, options, factor, foreach)
            if part.whole.indices:
                update.update_whole(part.whole, batch.grads)
            for run in part.runs:
                penalty += update.update_run(run, stretches)
            for run, gradients in division.runs_of_strided(part, self._scratch):
                penalty += update.update_run(run, gradients)
        start.report(options.diagnostics, penalty)


def grad_norm(grads: list[Tensor]) -> float:
    """Euclidean norm of all gradients as one vector.

    Float32 gradients are summed by the BLAS dot product, which reads them twice as fast as torch's
    norm does; if that overflows, and for every other dtype, the reference is used.
    """
    squares = 0.0
    for grad in grads:
        if grad.dtype == torch.float32 and grad.is_contiguous():
            flat = grad.detach().view(-1)
            square = float(torch.dot(flat, flat))
        else:
            square = math.inf
        if not math.isfinite(square):
            square = float(reference.grad_norm([grad.detach()])) ** 2
        squares += square
    return math.sqrt(squares)


def _as_numbers(hyper: Hyper) -> Hyper:
    """Read tensor hyperparameters as numbers: on a CPU that waits for nothing."""
    lr, beta1, beta2 = (float(value) for value in (hyper.lr, hyper.beta1, hyper.beta2))
    return hyper._replace(lr=lr, beta1=beta1, beta2=beta2, strength=float(hyper.strength))


class Counters:
    """The step counters of one batch, and the products of betas that a gate makes vary.

    They are never moved: users share them between processes, or look at them through views. Those
    that lie side by side are advanced as one tensor.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        steps = [one.step for one in batch.tensors]
        products = [one.products for one in batch.tensors if one.products is not None]
        of = [one.products_step for one in batch.tensors if one.products_step is not None]
        self._members = steps + products + of
        self._addresses = list(map(Tensor.data_ptr, self._members))
        self._steps, self._products, self._products_steps = (
            list(_merge_adjacent(tensors)) for tensors in (steps, products, of)
        )
        # A tensor is added to many three times as fast as a number; to integers only an integer.
        exact = all(map(Tensor.is_floating_point, steps))
        self._one = torch.ones((), dtype=torch.float32 if exact else torch.int64, device="cpu")
        self._groups = torch.tensor(batch.groups, device="cpu")
        first: dict[int, int] = {}
        firsts = [first.setdefault(group, i) for i, group in enumerate(batch.groups)]
        self._firsts = torch.tensor(firsts, device="cpu")  # of each one's group

    def is_current(self, batch: Batch) -> bool:
        """Whether these are the batch's counters, where they are now."""
        return batch is self._batch and self._addresses == list(map(Tensor.data_ptr, self._members))

    def advance_(self, given: list[Hyper], hypers: list[Hyper]) -> Tensor | None:
        """Count a step, and advance the products of the betas if there are any.

        Args:
            given: The rows of hyperparameters, without the gate.
            hypers: With it.

        Returns:
            The products (6), (tensors, 2), or None.
        """
        if self._products:
            steps, of = _concatenated(self._steps), _concatenated(self._products_steps)
            if steps.dtype != of.dtype or not torch.equal(steps, of):
                old, powers = _concatenated(self._products), self._betas(given)
                old = reference.next_product(old, of[:, None], steps[:, None], powers, 1.0)
                _write_(self._products, old)
                _write_(self._products_steps, steps)
            betas, sizes = self._betas(hypers), list(map(len, self._products))
            torch._foreach_mul_(self._products, list(betas.split(sizes)))
        torch._foreach_add_(self._steps + self._products_steps, self._one, alpha=1)
        return _concatenated(self._products) if self._products else None

    def number_by_products(self, products: Tensor) -> list[int]:
        """Return a number for each tensor, the same for those of a group with the same products."""
        groups = self._batch.groups
        if torch.equal(products, products[self._firsts]):
            return groups
        known: dict[tuple[int, float, float], int] = {}
        return list(map(known.setdefault, zip(groups, *products.T.tolist(), strict=True), count()))

    def _betas(self, hypers: list[Hyper]) -> Tensor:
        """Return the betas of each tensor, (tensors, 2)."""
        pairs = [(hyper.beta1, hyper.beta2) for hyper in hypers]
        return torch.tensor(pairs, dtype=torch.float64, device="cpu")[self._groups]


def _concatenated(memories: list[Tensor]) -> Tensor:
    return memories[0] if len(memories) == 1 else torch.cat(memories)


def _write_(memories: list[Tensor], values: Tensor) -> None:
    torch._foreach_copy_(memories, list(values.split(list(map(len, memories)))))


def _merge_adjacent(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield tensors that lie one behind the other as one, a row for each, in their order."""
    stretch: list[Tensor] = []
    for tensor in tensors:
        if stretch and not _is_adjacent(tensor, stretch[-1]):
            yield _merged(stretch)
            stretch = []
        stretch.append(tensor.detach())
    if stretch:
        yield _merged(stretch)


def _is_adjacent(tensor: Tensor, other: Tensor) -> bool:
    """Whether a tensor is like another, and begins in its memory where that one ends."""
    return (
        tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.is_contiguous()
        and other.is_contiguous()
        and tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
        and tensor.storage_offset() == other.storage_offset() + other.numel()
    )


def _merged(stretch: list[Tensor]) -> Tensor:
    first, size = stretch[0], stretch[0].numel()
    shape, strides = ((len(stretch), size), (size, 1)) if size > 1 else ((len(stretch),), (1,))
    return first.as_strided(shape, strides, first.storage_offset())


class Piece(NamedTuple):
    """A stretch of one tensor's operands, each of them a row of the same length."""

    rows: Operands
    tensor: int  # its index in the batch
    part: int  # which of its stretches of BLOCK elements

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool, bool]:
        """What must be alike to be updated in one call: dtype, amsgrad, penalty, pull."""
        rows = self.rows
        has = (rows.max_exp_avg_sq is not None, rows.anchor is not None, rows.pull is not None)
        return rows.exp_avg.dtype, *has

    def importance(self) -> Tensor:
        """Return how hard the penalty pulls, a floating-point row; for penalised pieces only."""
        importance, scale = self.rows.importance, self.rows.scale
        assert importance is not None
        return importance if scale is None else reference.decode_importance(importance, scale)


class _Scratch:
    """Memory for intermediate results: new memory for each would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._rows: dict[torch.dtype, Tensor] = {}

    def rows(self, dtype: torch.dtype) -> Tensor:
        """Return four rows of a dtype, shape (4, BLOCK)."""
        if dtype not in self._rows:
            self._rows[dtype] = torch.empty(4, BLOCK, dtype=dtype, device="cpu")
        return self._rows[dtype]


class Run:
    """Pieces of one kind that are updated together: at most ``BLOCK`` elements.

    Attributes:
        pieces: The pieces.
        columns: The lists of their operands.
        sizes: Their numbers of elements.
        theta, gradient, delta, pull: Rows of scratch for all pieces together.
        thetas, gradients: The stretches of the first two that belong to each piece.
    """

    def __init__(self, pieces: list[Piece], scratch: _Scratch) -> None:
        self.pieces = pieces
        self.dtype, self.amsgrad, self.penalized, self.pulled = pieces[0].kind
        columns = zip(*(piece.rows for piece in pieces), strict=True)
        self.columns: Any = Operands(*map(list, columns))  # type: ignore[arg-type]
        self.sizes = sizes = [piece.rows.param.numel() for piece in pieces]
        rows = scratch.rows(self.dtype)[:, : sum(sizes)]
        self.theta, self.gradient, self.delta, self.pull = rows
        self.thetas, self.gradients = self.theta.split(sizes), self.gradient.split(sizes)


class Whole(NamedTuple):
    """Tensors that torch's kernel can update as they are."""

    indices: list[int]  # in the batch
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty without amsgrad
    steps: list[Tensor]


class Part(NamedTuple):
    """Tensors that are updated with the same numbers."""

    first: int  # any of them
    whole: Whole
    runs: list[Run]  # those that need work before
    strided: list[int]  # those whose elements lie apart, or in different orders


class Division:
    """How a step on one batch is divided into calls of torch's kernels.

    Args:
        batch: The tensors.
        kinds: What tensors that are updated with the same numbers have in common.
        scratch: Memory for the runs.
        scaled: Whether gradients must be multiplied before torch's kernel may see them.
    """

    def __init__(self, batch: Batch, kinds: list[int], scratch: _Scratch, *, scaled: bool) -> None:
        self._batch, self._kinds, self._scaled = batch, kinds, scaled
        self._strides = [one.param.stride() for one in batch.tensors]
        self._layout = batch.layout
        self._cut: list[int] = []
        members: dict[int, list[int]] = defaultdict(list)
        for i, kind in enumerate(kinds):
            members[kind].append(i)
        self.parts = [self._divide(indices, scratch) for indices in members.values()]
        # Views are kept of these; the others are handed to torch's kernel as the objects they are.
        self._viewed = [t for i in self._cut for t in _elementwise(batch.tensors[i]).values()]
        self._addresses = list(map(Tensor.data_ptr, self._viewed))

    def _divide(self, indices: list[int], scratch: _Scratch) -> Part:
        """Sort tensors by what their update takes."""
        whole, in_rows, strided = [], [], []
        for i in indices:
            one, grad, strides = self._batch.tensors[i], self._batch.grads[i], self._strides[i]
            param, tensors = one.param, _elementwise(one).values()
            # What zeros_like would lay out in another way has gaps or overlaps.
            dense = param.is_contiguous() or torch.empty_like(param).stride() == strides
            # A compressed importance has a scale for so many elements in the order of a dense row.
            ordered = one.scale is None or param.is_contiguous()
            if not (dense and ordered) or any(t.stride() != strides for t in tensors):
                strided.append(i)
            elif (
                self._scaled
                or grad.dtype != param.dtype
                or grad.stride() != strides
                or one.anchor is not None
                or one.pull is not None
                or any(t.dtype != param.dtype for t in tensors)
            ):
                in_rows.append(i)
            else:
                whole.append(i)
        self._cut += in_rows
        rows = [(i, _in_rows(self._batch.tensors[i], self._strides[i])) for i in in_rows]
        chosen = [self._batch.tensors[i] for i in whole]
        lists = (
            [one.param for one in chosen],
            [one.exp_avg for one in chosen],
            [one.exp_avg_sq for one in chosen],
            [one.max_exp_avg_sq for one in chosen if one.max_exp_avg_sq is not None],
            [one.step for one in chosen],
        )
        return Part(indices[0], Whole(whole, *lists), list(_runs(rows, scratch)), strided)

    def is_current(self, batch: Batch, kinds: list[int], *, scaled: bool) -> bool:
        """Whether this is the division of these tensors as they are now, or does as well.

        One for gradients that are multiplied does for all: norms that are clipped now and then
        would otherwise cost a division each time.
        """
        return (
            batch is self._batch
            and (self._scaled or not scaled)
            and batch.layout is self._layout
            and self._kinds == kinds
            and self._addresses == list(map(Tensor.data_ptr, self._viewed))
        )

    def cut_gradients(self, grads: list[Tensor]) -> dict[int, tuple[Tensor, ...]]:
        """Cut the gradients of the tensors in runs as the runs are cut."""
        return {i: _cut(_as_row(grads[i], self._strides[i])) for i in self._cut}

    def runs_of_strided(
        self, part: Part, scratch: _Scratch
    ) -> Iterator[tuple[Run, dict[int, tuple[Tensor, ...]]]]:
        """Lay strided tensors out in rows, and write them back.

        Args:
            part: Which tensors.
            scratch: Memory for the runs.

        Yields:
            A run and the stretches of its gradients, to be updated before the next is asked for.
        """
        for i in part.strided:
            one = self._batch.tensors[i]
            strides = torch.empty(one.param.shape, device="meta").stride()
            rows = _in_rows(one, strides)
            stretches = {i: _cut(_as_row(self._batch.grads[i], strides))}
            for run in _runs([(i, rows)], scratch):
                yield run, stretches
            for name in WRITTEN:
                original = getattr(one, name)
                if original is not None:
                    original.copy_(getattr(rows, name).view(original.shape))


def _elementwise(tensors: Operands) -> dict[str, Tensor]:
    """Return what has an entry for each element, by name."""
    named = zip(ELEMENTWISE, map(tensors.__getattribute__, ELEMENTWISE), strict=True)
    return {name: tensor for name, tensor in named if tensor is not None}


def _in_rows(tensors: Operands, strides: tuple[int, ...]) -> Operands:
    """Return what belongs to a tensor with its elements in one row, see :func:`_as_row`."""
    rows = {name: _as_row(tensor, strides) for name, tensor in _elementwise(tensors).items()}
    return tensors._replace(**rows)


def _as_row(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a tensor's elements as one row, in the memory order that ``strides`` mean.

    A view if the tensor has these strides; otherwise a copy.

    Args:
        tensor: Any tensor.
        strides: Strides of a dense tensor of its shape.

    Returns:
        The elements, shape (numel,).
    """
    if tensor.stride() != strides:
        dense = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="cpu")
        tensor = dense.copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _cut(row: Tensor) -> tuple[Tensor, ...]:
    """Cut a row into stretches of BLOCK elements."""
    return (row,) if row.numel() <= BLOCK else row.split(BLOCK)


def _runs(tensors: Iterable[tuple[int, Operands]], scratch: _Scratch) -> Iterator[Run]:
    """Cut large tensors, and gather small ones, into runs.

    Args:
        tensors: Their indices in the batch, and what belongs to them in rows.
        scratch: Memory that all runs share.

    Yields:
        The runs.
    """
    pending: list[Piece] = []
    size = 0
    for index, rows in tensors:
        numel = rows.param.numel()
        for part, start in enumerate(range(0, numel, BLOCK)):
            stop = min(start + BLOCK, numel)
            cut = rows
            if numel > BLOCK:
                cut = rows._replace(**{n: t[start:stop] for n, t in _elementwise(rows).items()})
                if rows.scale is not None:
                    cut = cut._replace(scale=rows.scale[start // SCALED : -(-stop // SCALED)])
            piece = Piece(cut, index, part)
            if pending and (size + stop - start > BLOCK or piece.kind != pending[0].kind):
                yield Run(pending, scratch)
                pending, size = [], 0
            pending.append(piece)
            size += stop - start
    if pending:
        yield Run(pending, scratch)


def _in_one_row(stretches: list[Tensor], row: Tensor) -> Tensor:
    """Return stretches as one, in the dtype of ``row``: a lone one as it is, or copied there."""
    if len(stretches) > 1:
        return torch.cat(stretches, out=row)
    return stretches[0] if stretches[0].dtype == row.dtype else row.copy_(stretches[0])


class _Update:
    r"""The update of tensors with the same numbers.

    torch's kernel corrects the bias by powers of constant betas. For betas that a gate makes vary
    it is given a step so large that its own corrections are 1, and the right ones by a change of
    variables:

    .. math::
        \eta \frac{m / c_1}{\sqrt{v / c_2} + \epsilon}
        = \eta' \frac{m}{\sqrt{v} + \epsilon'}, \qquad
        \eta' = \eta \frac{\sqrt{c_2}}{c_1}, \quad \epsilon' = \epsilon \sqrt{c_2}.
    """

    def __init__(
        self,
        hyper: Hyper,
        products: list[float] | None,  # of its betas, if a gate makes these vary
        options: Options,
        factor: float,  # of the gradients: unscaling and clipping
        foreach: bool,
    ) -> None:
        self.hyper, self.products, self.options = hyper, products, options
        factor *= float(hyper.factor)
        self.factor, self.foreach = -factor if hyper.maximize else factor, foreach
        self.arguments: dict[str, Any] = {
            "lr": hyper.lr,
            "beta1": hyper.beta1,
            "beta2": hyper.beta2,
            "eps": hyper.eps,
            "weight_decay": hyper.weight_decay,
        }
        if products is not None:
            correction1, root2 = 1 - products[0], math.sqrt(1 - products[1])
            self.arguments["lr"] = float(hyper.lr) * root2 / correction1
            self.arguments["eps"] = hyper.eps * root2
            if options.decoupled:  # torch decays by lr' w'; L2 decay does not meet the lr
                self.arguments["weight_decay"] = hyper.weight_decay * correction1 / root2

    def update_whole(self, whole: Whole, gradients: list[Tensor]) -> None:
        """Update whole tensors, all in one call.

        Args:
            whole: The tensors.
            gradients: Those of the batch.
        """
        indices, params, exp_avgs, exp_avg_sqs, largest, steps = whole
        grads = [gradients[i] for i in indices]
        maximize = self.hyper.maximize
        self._adam(params, grads, exp_avgs, exp_avg_sqs, largest, steps, maximize=maximize)

    def update_run(self, run: Run, stretches: Mapping[int, Sequence[Tensor]]) -> float:
        """Update one run of pieces, and return its penalty before the step.

        Args:
            run: The pieces.
            stretches: The gradient of each tensor of the batch, cut as the tensor is.
        """
        columns, strength = run.columns, float(self.hyper.strength)
        thetas: list[Tensor] = columns.param
        if any(theta.dtype != run.dtype for theta in thetas):
            _in_one_row(thetas, run.theta)
            thetas = list(run.thetas)
        gradients = [stretches[piece.tensor][piece.part] for piece in run.pieces]
        penalty = 0.0
        coupled = run.penalized and not self.options.proximal
        if run.penalized:
            anchor = _in_one_row(columns.anchor, run.pull)
            delta = torch.sub(_in_one_row(thetas, run.delta), anchor, out=run.delta)
            importance = _in_one_row([piece.importance() for piece in run.pieces], run.pull)
            pull = torch.mul(delta, importance, out=run.pull)
            penalty = 0.5 * strength * float(torch.dot(delta, pull))
        unchanged = self.factor == 1.0 and not (coupled or run.pulled)
        if not unchanged or any(gradient.dtype != run.dtype for gradient in gradients):
            # Converted before the product, which would round to half precision.
            gradient = _in_one_row(gradients, run.gradient)
            if self.factor != 1.0:
                gradient = torch.mul(gradient, self.factor, out=run.gradient)
            if coupled:  # eq. 8
                gradient = torch.add(gradient, run.pull, alpha=strength, out=run.gradient)
            if run.pulled:
                pull = _in_one_row(columns.pull, run.pull)
                gradient = torch.add(gradient, pull, out=run.gradient)
            gradients = list(run.gradients) if len(gradients) > 1 else [gradient]

        largest = columns.max_exp_avg_sq if run.amsgrad else []
        self._adam(thetas, gradients, columns.exp_avg, columns.exp_avg_sq, largest, columns.step)
        if run.penalized and self.options.proximal:
            if len(thetas) > 1 and thetas[0] is columns.param[0]:
                torch.cat(thetas, out=run.theta)
                thetas = list(run.thetas)
            self._take_proximal_step(run, run.theta if len(thetas) > 1 else thetas[0])
        for param, theta in zip(columns.param, thetas, strict=True):
            if theta is not param:
                param.copy_(theta)
        return penalty

    def _take_proximal_step(self, run: Run, theta: Tensor) -> None:
        """Take the proximal step (9), as :func:`ars.reference.ewc_proximal`, after Adam's.

        Args:
            run: The pieces.
            theta: Their parameters in one row, overwritten.
        """
        columns, bound = run.columns, torch.finfo(run.dtype).max
        denominator, q, part = run.gradient, run.delta, run.pull  # scratch that is free by now
        seconds = columns.max_exp_avg_sq if run.amsgrad else columns.exp_avg_sq
        torch.sqrt(_in_one_row(seconds, denominator), out=denominator)
        if self.products is not None:
            roots = [math.sqrt(1 - self.products[1])]
        else:
            beta2 = float(self.hyper.beta2)
            roots = [math.sqrt(1 - beta2**steps) for steps in map(float, columns.step)]
        if len(set(roots)) == 1:
            denominator.div_(roots[0])
        else:
            for stretch, root in zip(denominator.split(run.sizes), roots, strict=True):
                stretch.div_(root)
        denominator.add_(self.hyper.eps).clamp_(max=bound)
        metric = min(float(self.hyper.lr) * float(self.hyper.strength), bound)
        torch.mul(_in_one_row([piece.importance() for piece in run.pieces], q), metric, out=q)
        held = q > denominator
        torch.minimum(q, denominator, out=part).div_(denominator.add_(q))
        anchor = _in_one_row(columns.anchor, q)
        part.mul_(torch.sub(theta, anchor, out=denominator))
        torch.where(held, torch.add(anchor, part, out=denominator), theta.sub_(part), out=theta)

    def _adam(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        largest: list[Tensor],
        steps: list[Tensor],
        *,
        maximize: bool = False,
    ) -> None:
        """Call torch's kernel."""
        if self.products is not None:
            steps = [INFINITE_STEP] * len(params)
        arguments = self.arguments | {"amsgrad": bool(largest), "maximize": maximize}
        if self.foreach:  # torch advances the steps it is given
            steps = [step.float() for step in torch._foreach_sub(steps, 1)]
            arguments |= {"foreach": True, "decoupled_weight_decay": self.options.decoupled}
            adam(params, grads, exp_avgs, exp_avg_sqs, largest, steps, **arguments)
        else:
            fused = torch._fused_adamw_ if self.options.decoupled else torch._fused_adam_
            fused(params, grads, exp_avgs, exp_avg_sqs, largest, steps, **arguments)
