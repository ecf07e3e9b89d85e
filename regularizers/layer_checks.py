"""What layers as matrices must do to be fitted, and a warning of what they leave out."""

import warnings
from collections.abc import Collection
from itertools import zip_longest

import torch
from torch import Tensor, nn

from ars.regularizers.layers import MatrixLayer, Use, input_rows

__all__ = ["check_samples", "check_used", "warn_of_others"]


def check_used(model: nn.Module, uses: list[Use]) -> None:
    """Raise ValueError if no layer was called: attention reads its projection's weight itself."""  # noqa: DOC501
    if not uses:
        raise ValueError(
            f"{type(model).__name__} calls no trained linear or ungrouped convolution layer; "
            "protect it with EWC"
        )


def check_samples(model: nn.Module, uses: list[Use], inputs: Tensor, *, ordered: bool) -> None:
    """Refuse layers whose rows cannot be divided among the samples of a batch.

    Args:
        model: The model whose uses are recorded.
        uses: The record of ``inputs``; it is as before afterwards.
        inputs: Several samples, the first of which is run by itself to compare.
        ordered: Whether each layer must hold the samples one after another.

    Raises:
        ValueError: A layer has other rows than as many for each sample as for the first by itself,
            or they do not begin with those of the first; names the weight.
    """
    together = list(uses)
    uses.clear()
    with torch.no_grad():
        model(inputs[:1])
    alone, uses[:] = list(uses), together
    for one, both in zip_longest(alone, together):
        weight = (both or one).weight
        rows, own = _rows_of(weight, both), _rows_of(weight, one)
        if len(rows) != len(inputs) * len(own):
            raise ValueError(
                f"the layer of {weight!r} has {len(rows)} positions for {len(inputs)} samples, but "
                f"{len(own)} for one: each sample must pass through it by itself; fit on "
                "batches of one sample"
            )
        rounding = torch.finfo(own.dtype).eps ** (1 / 3) * own.abs().max()
        if ordered and (own - rows[: len(own)]).abs().max() > rounding:
            raise ValueError(
                f"the layer of {weight!r} does not hold the samples one after another in its first "
                "dimension (is it the second, behind the positions?), so a masked or averaged "
                "position cannot be told; fit on batches of one sample"
            )


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
