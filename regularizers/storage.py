r"""Importance in one byte a parameter: blocks of 64 values, companded by the square root.

    scale_b = max of block b,   q_i = round(255 sqrt(Omega_i / scale_b))
    Omega_i ~ scale_b (q_i / 255)^2,   b = i // 64 over the flattened tensor

1 + 4/64 bytes a parameter. Zeros and each block's maximum are exact up to the rounding of fp32; for
the others, with r_i = sqrt(Omega_i / scale_b) in [0, 1],

    |error_i| <= scale_b (2 r_i + 1/510) / 510,

at most 0.4 % of the block's maximum. Values below scale_b / 510^2 become 0.

The square root halves the range that the levels must cover: in a linear code everything below
1/510 of a block's maximum, which is most of a Fisher diagonal, would be 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ars.reference import decode_importance
from ars.reference.penalties import SCALED

__all__ = ["Quantized", "dequantize", "quantize"]

_LEVELS = 255


class Quantized(NamedTuple):
    """An importance in uint8: the values, of the parameter's shape, and their blocks' scales."""

    values: Tensor
    scale: Tensor


def quantize(importance: Tensor) -> Quantized:
    r"""Compress an importance to uint8, :math:`q_i = 255 \sqrt{\Omega_i / \text{scale}}`.

    Args:
        importance: Any shape, floating point, finite, >= 0 and at most the largest float32.
            Flattened in its logical (row-major) order.

    Returns:
        ``values``, uint8, contiguous, of the shape of ``importance``; ``scale``, float32, of shape
        (ceil(numel / 64),), the maximum of each block.

    Raises:
        TypeError: ``importance`` is not floating point.
        ValueError: A value is negative or not finite in float32.

    Example:
        >>> import torch
        >>> from ars.regularizers import dequantize, quantize
        >>> values, scale = quantize(torch.tensor([0.0, 1.0, 4.0, 16.0]))
        >>> values, scale
        (tensor([  0,  64, 128, 255], dtype=torch.uint8), tensor([16.]))
        >>> dequantize(values, scale)
        tensor([ 0.0000,  1.0079,  4.0314, 16.0000])

    References:
        Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861.
    """
    if not importance.is_floating_point():
        raise TypeError(
            f"importance must be floating point, got {importance.dtype}; is it quantized already?"
        )
    flat = importance.detach().to(torch.float32).reshape(-1)
    if not (flat.isfinite() & (flat >= 0)).all():
        raise ValueError(
            "importance holds a value that is negative or not finite in float32; importances are "
            "mean squares, look for an overflow where it was computed"
        )
    blocks = math.ceil(flat.numel() / SCALED)
    padded = torch.nn.functional.pad(flat, (0, blocks * SCALED - flat.numel())).view(blocks, SCALED)
    scale = padded.amax(1) if blocks else flat.new_zeros(0)
    # Where a block is all 0, 0 / 1; a subnormal scale divides without overflow, as ratios are <= 1.
    ratio = padded / torch.where(scale > 0, scale, 1.0)[:, None]
    values = (ratio.sqrt() * _LEVELS).round().to(torch.uint8)
    return Quantized(values.view(-1)[: flat.numel()].reshape(importance.shape).clone(), scale)


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    r"""Expand what :func:`quantize` returned, :math:`\Omega_i = \text{scale} (q_i / 255)^2`.

    Args:
        values: uint8, any shape.
        scale: float32, shape (ceil(numel / 64),).

    Returns:
        The importance, float32, of the shape of ``values``.

    Raises:
        TypeError: ``values`` are not uint8 or ``scale`` is not float32.
        ValueError: ``scale`` does not have one entry for each block of 64 values.
    """
    if values.dtype != torch.uint8 or scale.dtype != torch.float32:
        raise TypeError(
            f"expected uint8 values and a float32 scale, got {values.dtype} and {scale.dtype}; "
            "pass both as quantize returned them"
        )
    blocks = math.ceil(values.numel() / SCALED)
    if scale.shape != (blocks,):
        raise ValueError(
            f"{values.numel()} values need a scale of shape ({blocks},), got {tuple(scale.shape)}; "
            "pass both as quantize returned them"
        )
    return decode_importance(values, scale)
