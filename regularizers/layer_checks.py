"""What layers as matrices must do to be fitted, and a warning of what they leave out."""

import warnings
from collections.abc import Collection
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ars.regularizers.layers import MatrixLayer, Use, input_rows, output_rows
from ars.regularizers.row_proof import RowProof

__all__ = [
    "check_counts", "check_order", "check_order_by_gradients", "check_used", "warn_of_others",
]  # fmt: skip


def check_used(model: nn.Module, uses: list[Use]) -> None:
    """Raise ValueError if no layer was called: attention reads its projection's weight itself."""  # noqa: DOC501
    if not uses:
        raise ValueError(
            f"{type(model).__name__} calls no trained linear or ungrouped convolution layer; "
            "protect it with EWC"
        )


def check_counts(model: nn.Module, uses: list[Use], inputs: Tensor) -> None:
    """Refuse layers whose rows cannot be divided equally among the samples of a batch.

    Args:
        model: The model whose uses are recorded.
        uses: The record of ``inputs``; it is as before afterwards.
        inputs: Several samples, the first of which is run by itself to compare.

    Raises:
        ValueError: A layer has other rows than as many for each sample as for the first by itself;
            names the weight.
    """
    for one, both in zip_longest(_uses_of(model, uses, inputs[:1]), uses):
        weight = (both or one).weight
        rows, own = _rows_of(weight, both), _rows_of(weight, one)
        if len(rows) != len(inputs) * len(own):
            raise ValueError(
                f"the layer of {weight!r} has {len(rows)} positions for {len(inputs)} samples, but "
                f"{len(own)} for one: each sample must pass through it by itself; fit on "
                "batches of one sample"
            )


def check_order(model: nn.Module, uses: list[Use], inputs: Tensor) -> Tensor:
    """Refuse layers that do not hold the samples one after another, by what they read.

    They must begin with the rows of the first sample; and with every sample in the place of the one
    before, each must have the other's rows. So none is left that could be in another's place.

    Args:
        model: The model whose uses are recorded.
        uses: The record of ``inputs``, which passed :func:`check_counts`; it is as before
            afterwards.
        inputs: Several samples.

    Returns:
        Which rows could be told from the next sample's, flat Booleans on the CPU.

    Raises:
        ValueError: There is such a layer; names the weight.
    """
    alone = _uses_of(model, uses, inputs[:1])
    moved = _uses_of(model, uses, inputs.roll(1, 0))
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
                rows = output_rows(use.module, gradient)
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


def _uses_of(model: nn.Module, uses: list[Use], inputs: Tensor) -> list[Use]:
    """Return the record of other inputs, and put the present one back."""
    kept = list(uses)
    uses.clear()
    try:
        with torch.no_grad():
            model(inputs)
        return list(uses)
    finally:
        uses[:] = kept


def _rows_of(weight: str, use: Use | None) -> Tensor:
    if use is None or use.weight != weight:
        return torch.empty(0, 0)
    return input_rows(use.module, use.inputs)


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
            f"{what} covers linear and ungrouped convolution layers that run; nothing is known of "
            f"{shown}: protect them with EWC, or freeze them",
            stacklevel=3,
        )
