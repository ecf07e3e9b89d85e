"""The miniseries: one integer, the depth, gives the whole shape of a model.

    n_layer = n_head = depth,   n_embd = 64 depth

Every member has heads of 64 channels, so the step from depth d to d + 1 adds one head, 64 channels
and one block, and :func:`ars.models.grow` can take it exactly. (The first nanochat miniseries has
the same widths but a different head width at every odd depth; those models cannot be grown into
one another, because the rotary tables differ.)
"""

from ars.models.config import GPTConfig

__all__ = ["miniseries_config"]

_HEAD_DIM = 64


def miniseries_config(depth: int, *, vocab_size: int = 256, sequence_len: int = 256) -> GPTConfig:
    """Return the configuration of the miniseries model of the given depth.

    Args:
        depth: number of blocks and of heads, >= 1; the width is 64 depth.
        vocab_size: number of token values, >= 1; 256 is one per byte.
        sequence_len: longest input in tokens, >= 1.

    Returns:
        The configuration, with the default norm eps and rotary base.

    Raises:
        TypeError: an argument is not an ``int``.
        ValueError: an argument is below 1.

    Example:
        >>> config = miniseries_config(10)
        >>> config.n_layer, config.n_head, config.n_embd, config.head_dim
        (10, 10, 640, 64)

    References:
        Karpathy, "nanochat", github.com/karpathy/nanochat, miniseries v1.
    """
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth must be an int, got {depth!r}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return GPTConfig(
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        n_layer=depth,
        n_head=depth,
        n_embd=_HEAD_DIM * depth,
    )
