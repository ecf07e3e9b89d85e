r"""Linear and convolution layers as matrices: y_t = W a_t + b at every position t.

For a linear layer a_t is its input vector; for a convolution it is the patch under the kernel, in
the order of ``weight.flatten(1)``, and t runs over the output's pixels. Attention and experts are
taken as the products that they are made of (:mod:`ars.regularizers.fisher.own_products`). What the
layer reads, the rows a_t, and the place in the graph where its output appears are recorded while
the model runs.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from ars.regularizers.checks import IGNORE_INDEX, evaluation_mode
from ars.regularizers.fisher.estimators import Samples, accumulation_dtype
from ars.regularizers.fisher.gathered import gathered
from ars.regularizers.fisher.own_products import (
    Block,
    Routed,
    own_matrices,
    replaced_by_products,
)
from ars.regularizers.fisher.processes import Processes
from ars.regularizers.fisher.row_proof import Passes, RowProof
from ars.regularizers.fisher.rules import Convolution, is_transposed, patches_of

__all__ = [
    "MatrixLayer",
    "Use",
    "batched_rows",
    "check_blocks",
    "check_order",
    "check_order_by_gradients",
    "fit_layers",
    "input_rows",
    "matrix_layers",
    "outer_products",
    "output_rows",
    "proven_batches",
    "recorded_uses",
    "uses_by_matrix",
    "warn_of_others",
]

MatrixModule: TypeAlias = Any  # nn.Linear, a convolution, GPT-2's Conv1D, attention or experts
_Sums = TypeVar("_Sums", bound=tuple[Tensor, ...])
# Of a subclass that computes something else the inputs and outputs are not those of a product.
_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


@dataclass(frozen=True)
class MatrixLayer:
    """The layers that share one weight.

    Args:
        modules: Them, by their names in the model; several if the weight is tied.
        bias: Name of the bias that is trained with the weight, or None.
        transposed: Whether the weight is (d, p), as GPT-2's Conv1D has it.
    """

    modules: dict[str, Any]
    bias: str | None
    transposed: bool = False


class Use(NamedTuple):
    """One call of a layer.

    Args:
        weight: Name of its weight.
        module: The layer; None of attention.
        inputs: What it read.
        output: Where its output appears in the graph, before anything overwrites it in place; None
            without a graph.
        width: Numbers in a row of its output.
        block: Which of the matrices in the weight it multiplied by; None if that is one matrix.
        routed: Which of all tokens its rows are; None for all.
    """

    weight: str
    module: MatrixModule | None
    inputs: Tensor
    output: GradientEdge | None
    width: int
    block: Block | None = None
    routed: Routed | None = None

    def rows(self) -> Tensor:
        """What it multiplied by, (positions, d); 0 at the tokens that went elsewhere."""
        rows = input_rows(self.module, self.inputs)
        return rows if self.routed is None else self.routed.spread(rows)

    def gradient_rows(self, gradient: Tensor) -> Tensor:
        """The gradient of its output, (positions, width), likewise."""
        rows = output_rows(self.module, gradient)
        return rows if self.routed is None else self.routed.spread(rows)


def matrix_layers(model: nn.Module) -> dict[str, MatrixLayer]:
    """Find the trained matrices of linear layers, ungrouped convolutions, attention and experts.

    Args:
        model: The model.

    Returns:
        Name of the weight, as in ``named_parameters()``, -> its layers, in the model's order.

    Raises:
        ValueError: Two layers share a weight, but not their bias, or one of them has it transposed.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    layers: dict[str, MatrixLayer] = {}
    for path, module in model.named_modules():
        transposed = is_transposed(module)
        for name, its_bias in own_matrices(module).items():
            found = names.get(getattr(module, name))
            if found is not None:
                bias = names.get(getattr(module, its_bias)) if its_bias else None
                layers[found] = MatrixLayer({path: module}, bias)
        if not transposed and type(module).forward not in _FORWARDS:
            continue
        own: Any = module
        if own.weight not in names or getattr(own, "groups", 1) > 1:
            continue
        weight = names[own.weight]
        bias = None if own.bias is None else names.get(own.bias)
        layer = layers.setdefault(weight, MatrixLayer({}, bias, transposed))
        if layer.transposed != transposed:
            first = next(iter(layer.modules))
            raise ValueError(
                f"{first!r} and {path!r} share the weight {weight!r}, but one of them has it "
                "transposed, so the two have no common matrix; freeze it, or protect it with EWC"
            )
        if layer.bias != bias:
            first = next(iter(layer.modules))
            raise ValueError(
                f"{first!r} and {path!r} share the weight {weight!r}, but not their bias, so the "
                "two have no common matrix; share the bias too, or freeze both biases"
            )
        layer.modules[path] = module
    return layers


def fit_layers(
    model: nn.Module,
    processes: Processes,
    kind: type[_Sums],
    add: Callable[[dict[str, MatrixLayer], dict[str, _Sums]], int],
) -> tuple[dict[str, MatrixLayer], Iterator[tuple[str, _Sums]], int]:
    """Let every process add up its own samples, then the sums of all.

    Args:
        model: The model.
        processes: Whose samples are added up.
        kind: Of the sums of one layer: a tuple of tensors.
        add: Adds this process's samples, given the layers and the sums by the names of their
            weights, none at first; returns how many samples there were.

    Returns:
        The layers; name and sums of each layer that ran in any process, in the model's order, one
        at a time; the samples of all processes.

    Raises:
        ValueError: No process had a sample.
    """
    sums: dict[str, _Sums] = {}
    parameters = dict(model.named_parameters())
    with gathered(model, processes):
        layers = matrix_layers(model)

        def add_own() -> tuple[dict[str, list[Any]], int]:
            seen = add(layers, sums)
            return {n: [(t.shape, t.dtype) for t in one] for n, one in sums.items()}, seen

        own = processes.each(add_own)
    seen = sum(samples for _, samples in own)
    if seen == 0:
        raise ValueError("batches is empty in every process: at least one sample is needed")
    # A layer may have run in some processes alone.
    known = processes.agreed([shapes for shapes, _ in own], everywhere=False)

    def totals() -> Iterator[tuple[str, _Sums]]:
        for name in layers:
            if name in known:
                device = parameters[name].device
                zeros = (torch.zeros(s, dtype=dtype, device=device) for s, dtype in known[name])
                total = sums.pop(name, None) or kind(*zeros)
                processes.add_up_(total)
                yield name, total

    return layers, totals(), seen


def proven_batches(
    model: nn.Module,
    uses: list[Use],
    samples: Iterable[tuple[Any, ...]],
    check_outputs: Callable[[Any, Tensor, int], Any],
    check_order: Callable[[Samples, Any, int], Tensor],
    *,
    ordered: bool = False,
) -> Iterator[tuple[Samples, Tensor, Any]]:
    """Run a model on each batch, and yield it once the rows are known to be the samples'.

    Args:
        model: The model.
        uses: The record of its layers' calls; of the batch's alone when it is yielded.
        samples: Inputs and targets.
        check_outputs: Refuses what the model returned for targets, or returns it; given the
            batch's number too.
        check_order: Refuses rows that are not in the samples' order, given the inputs, what the
            model returned and the batch's number; returns which rows could be told.
        ordered: Whether the order matters even where nothing is masked.

    Yields:
        Inputs, targets and what the model returned.

    Raises:
        ValueError: No layer was called, or one has other rows than as many for each sample as for
            the first by itself; names the weight.
    """
    passes, orders = Passes(model), Passes(model)
    for number, (inputs, targets) in enumerate(samples):
        uses.clear()
        in_order = ordered or bool((targets == IGNORE_INDEX).any())
        checks = orders if in_order else passes
        outputs = check_outputs(checks.run(inputs), targets, number)
        _check_rows(model, uses, inputs, proven=not checks.needs_proof)
        if len(inputs) > 1 and checks.needs_proof:
            told = check_order(inputs, outputs, number) if in_order else torch.tensor(True)
            checks.mark_proven(outputs, told)
        yield inputs, targets, outputs


@contextmanager
def recorded_uses(model: nn.Module, layers: dict[str, MatrixLayer]) -> Iterator[list[Use]]:
    """Run ``model`` in evaluation mode and record every call of its layers.

    Training flags and hooks are as before afterwards, whatever happens.

    Args:
        model: The model.
        layers: What :func:`matrix_layers` found in it.

    Yields:
        The record, in the order of the calls; empty it before each forward pass.
    """
    uses: list[Use] = []

    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if name in layers}

    def record(
        parameter: Tensor,
        module: MatrixModule | None,
        inputs: Tensor,
        output: Tensor,
        block: Block | None = None,
        routed: Routed | None = None,
    ) -> None:
        if parameter in names:
            name = names[parameter]
            edge = get_gradient_edge(output) if output.requires_grad else None
            width = output.shape[1 if isinstance(module, Convolution) else -1]
            uses.append(Use(name, module, inputs.detach(), edge, width, block, routed))

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        record(module.weight, module, args[0] if args else next(iter(kwargs.values())), output)

    modules = {module for layer in layers.values() for module in layer.modules.values()}
    others = [module for module in modules if own_matrices(module)]
    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in modules.difference(others)
    ]
    try:
        with evaluation_mode(model), replaced_by_products(others, record):
            yield uses
    finally:
        for handle in handles:
            handle.remove()


def input_rows(module: MatrixModule, inputs: Tensor) -> Tensor:
    """Return what a layer multiplies its weight matrix with, one row a position.

    Args:
        module: A linear layer, GPT-2's too, or a convolution with one group.
        inputs: What it read: (..., d), or (B, C, pixels...).

    Returns:
        Shape (positions, d); d = C * kernel elements for a convolution.
    """
    if isinstance(module, Convolution):
        return patches_of(module, inputs).mT.flatten(0, 1)
    return inputs.reshape(-1, inputs.shape[-1])


def output_rows(module: MatrixModule, outputs: Tensor) -> Tensor:
    """Return a layer's outputs, or their gradient, one row a position.

    Args:
        module: A linear layer, or a convolution.
        outputs: Of the shape it returns: (..., p), or (B, p, pixels...).

    Returns:
        Shape (positions, p), positions in the order of :func:`input_rows`.
    """
    if isinstance(module, Convolution):
        outputs = outputs.movedim(1, -1)
    return outputs.reshape(-1, outputs.shape[-1])


def batched_rows(uses: list[Use], targets: Tensor, *, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Return what one weight multiplied in a batch, and which of it belongs to a target.

    Args:
        uses: All calls with that weight, at least one.
        targets: int64, (B,) or (B, T), -100 where masked.
        with_bias: Append a 1 to every row.

    Returns:
        Rows (B, t, d) in float32 at least, and Booleans (B, t). Where a layer has as many positions
        as there are targets, each position goes by its own; otherwise those of a sample with any
        target all count.

    Raises:
        ValueError: The positions of a layer are not a multiple of B.
    """
    rows, valid = [], []
    batch = len(targets)
    unmasked = (targets != IGNORE_INDEX).reshape(batch, -1)  # (B, T)
    for use in uses:
        part = use.rows()
        if len(part) % batch:
            raise ValueError(
                f"the layer of {use.weight!r} has {len(part)} positions for {batch} samples: each "
                "sample must pass through it by itself; fit on batches of one sample"
            )
        part = part.to(accumulation_dtype(part.dtype)).unflatten(0, (batch, -1))
        rows.append(functional.pad(part, (0, 1), value=1.0) if with_bias else part)
        own = part.shape[1] == unmasked.shape[1]
        each = unmasked if own else unmasked.any(1, keepdim=True).expand(part.shape[:2])
        if use.routed is not None:
            here = use.routed.spread(torch.ones_like(use.routed.places, dtype=torch.bool))
            each = each & here.view_as(each)
        valid.append(each)
    return torch.cat(rows, 1), torch.cat(valid, 1)


def uses_by_matrix(uses: list[Use]) -> dict[tuple[str, Block | None], list[Use]]:
    """Group a record by the matrix that was used: the weight's name, and which one in it."""
    found: dict[tuple[str, Block | None], list[Use]] = {}
    for use in uses:
        found.setdefault((use.weight, use.block), []).append(use)
    return found


def check_blocks(weight: str, positions: Tensor, block: Block | None) -> None:
    """Refuse a weight that is one matrix in one use and several in another.

    Args:
        weight: Its name.
        positions: How many rows there were so far, one number for each matrix.
        block: Which of them is used now.

    Raises:
        ValueError: That is so.
    """
    if positions.shape != (() if block is None else (block.of,)):
        raise ValueError(
            f"attention uses {weight!r} on one tensor (query, key and value) and on several, so it "
            "is one matrix and three; freeze it, protect it with EWC, or fit a model whose calls "
            "are of one kind"
        )


def outer_products(rows: Tensor) -> Tensor:
    """Sum the outer products of rows, (n, d) -> (d, d), in their own precision."""
    with torch.autocast(device_type=rows.device.type, enabled=False):
        return rows.T @ rows


def _check_rows(model: nn.Module, uses: list[Use], inputs: Samples, *, proven: bool) -> None:
    """Refuse layers whose rows cannot be divided among the samples.

    Raises:
        ValueError: There is such a layer, or no layer was called.
    """
    if not uses:
        raise ValueError(
            f"{type(model).__name__} calls no trained linear or ungrouped convolution layer; "
            "protect it with EWC"
        )
    if len(inputs) == 1 or proven:
        return
    for one, both in zip_longest(_uses_of(model, uses, inputs[:1]), uses):
        weight = (both or one).weight
        rows, own = _rows_of(weight, both), _rows_of(weight, one)
        if len(rows) != len(inputs) * len(own):
            raise ValueError(
                f"the layer of {weight!r} has {len(rows)} positions for {len(inputs)} samples, but "
                f"{len(own)} for one: each sample must pass through it by itself; fit on "
                "batches of one sample"
            )


def check_order(model: nn.Module, uses: list[Use], inputs: Samples) -> Tensor:
    """Refuse layers that do not hold the samples one after another, by what they read.

    They must begin with the rows of the first sample; and with every sample in the place of the one
    before, each must have the other's rows. So none is left that could be in another's place.

    Args:
        model: The model whose uses are recorded.
        uses: The record of ``inputs``, as many rows for each sample; it is as before
            afterwards.
        inputs: Several samples.

    Returns:
        Which rows could be told from the next sample's, flat Booleans on the CPU.

    Raises:
        ValueError: There is such a layer; names the weight.
    """
    alone = _uses_of(model, uses, inputs[:1])
    moved = _uses_of(model, uses, inputs.rolled())
    told = [torch.ones(0, dtype=torch.bool)]
    for one, both, other in zip_longest(alone, uses, moved):
        weight = (both or other).weight
        own, rows, others = (_rows_of(weight, use) for use in (one, both, other))
        if rows.shape != others.shape:
            raise ValueError(_not_in_order(weight))
        rounding = torch.finfo(rows.dtype).eps ** (1 / 3) * rows.abs().max()
        step = len(own)
        begins = (own - rows[:step]).abs().max() <= rounding
        follows = (rows.roll(step, 0) - others).abs().max() <= rounding
        # What is not finite is an error of its own.
        if not (begins and follows) and rows.isfinite().all():
            raise ValueError(_not_in_order(weight))
        difference = (rows.roll(step, 0) - rows).abs().unflatten(0, (len(inputs), -1))
        told.append((difference.flatten(1).amax(1) > rounding).cpu())
    return torch.cat(told)


def check_order_by_gradients(
    uses: list[Use],
    edges: list[GradientEdge],
    logits: Tensor,
    generator: torch.Generator,
    *,
    float16: bool,
) -> Tensor:
    """Refuse layers that do not hold the samples one after another, by what they send backwards.

    Args:
        uses: A record whose rows are a multiple of the samples.
        edges: Where their outputs appear in the graph.
        logits: What the model returned.
        generator: Of the logits' device.
        float16: Whether any gradient is in float16.

    Returns:
        Which samples have reached which layers, flat Booleans on the CPU.

    Raises:
        ValueError: There is such a layer; names the weight.
    """
    proof = RowProof(logits.detach(), generator, float16=float16)
    for cotangent in proof.cotangents():
        found = torch.autograd.grad(logits, edges, cotangent, retain_graph=True, allow_unused=True)
        for number, (use, gradient) in enumerate(zip(uses, found, strict=True)):
            if gradient is not None:
                rows = use.gradient_rows(gradient)
                proof.add(number, rows.unflatten(0, (len(logits), -1)))
    evidence = proof.evidence()
    if evidence.misplaced is not None and evidence.finite:
        raise ValueError(_not_in_order(uses[evidence.misplaced].weight))
    return evidence.seen


def _not_in_order(weight: str) -> str:
    """Return what is wrong with a layer, by the name of its weight."""
    return (
        f"the layer of {weight!r} does not hold the samples one after another in its first "
        "dimension (is it the second, behind the positions? are they sorted?), so a masked or "
        "averaged position cannot be told; fit on batches of one sample"
    )


def _uses_of(model: nn.Module, uses: list[Use], inputs: Samples) -> list[Use]:
    """Return the record of other inputs, and put the present one back."""
    kept = list(uses)
    uses.clear()
    try:
        with torch.no_grad():
            inputs.run(model)
        return list(uses)
    finally:
        uses[:] = kept


def _rows_of(weight: str, use: Use | None) -> Tensor:
    if use is None or use.weight != weight:
        return torch.empty(0, 0)
    return use.rows()


def warn_of_others(
    what: str, model: nn.Module, layers: dict[str, MatrixLayer], found: Collection[str]
) -> None:
    """Warn of the trained parameters, and further uses of them, that no layer covers, by name.

    Args:
        what: Who says so.
        model: The model.
        layers: What :func:`matrix_layers` found in it.
        found: The weights among them that were used.
    """
    covered = {name for weight in found for name in (weight, layers[weight].bias)}
    matrices = {module for weight in found for module in layers[weight].modules.values()}
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    others = [
        f"{names[p]} as used by {path!r}"
        for path, module in model.named_modules()
        for p in module.parameters(recurse=False)
        if module not in matrices and p in names and names[p] in found
    ]
    others += [name for name in names.values() if name not in covered]
    if others:
        shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        warnings.warn(
            f"{what} covers linear and ungrouped convolution layers, attention and experts that "
            f"run; nothing is known of {shown}: protect them with EWC, or freeze them",
            stacklevel=3,
        )
