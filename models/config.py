"""Sizes and constants of the GPT, and its miniseries: one integer, the depth, gives a whole model.

    n_layer = n_head = depth,   n_embd = 64 depth

Every member has heads of 64 channels, so the step from depth d to d + 1 adds one head, 64 channels
and one block, and :func:`ars.models.grow` can take it exactly. (The first nanochat miniseries has
the same widths but a different head width at every odd depth; those models cannot be grown into
one another, because the rotary tables differ.)
"""

import math
from dataclasses import dataclass

__all__ = ["GPTConfig", "miniseries_config"]

_MINISERIES_HEAD_DIM = 64


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a :class:`ars.models.GPT`; every value is checked on construction.

    Args:
        vocab_size: V, number of token values, >= 1.
        sequence_len: longest input in tokens, >= 1.
        n_layer: L, number of blocks, >= 1.
        n_head: H, attention heads, >= 1; divides ``n_embd``.
        n_embd: D, width of the residual stream; ``n_embd / n_head`` must be even (rotary pairs).
        norm_eps: eps of the norms before attention, MLP and head, >= 0. The norm after the
            embedding uses ``norm_eps / n_head`` and the query-key norm ``norm_eps * n_head``.
        rope_base: base of the rotary wavelengths, > 1.

    Raises:
        TypeError: a size is not an ``int`` or a constant is not a number.
        ValueError: a value is outside its range or the width does not fit the heads.

    Example:
        >>> config = GPTConfig(vocab_size=256, sequence_len=64, n_layer=2, n_head=2, n_embd=128)
        >>> config.head_dim
        64
    """

    vocab_size: int
    sequence_len: int
    n_layer: int
    n_head: int
    n_embd: int
    norm_eps: float = 1e-6
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sequence_len", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("norm_eps", "rope_base"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a float, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                "choose n_embd = n_head * head_dim"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim = n_embd / n_head = {self.head_dim} is odd; "
                "rotary embeddings rotate pairs, so choose an even head_dim"
            )
        if not 0.0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be finite and >= 0, got {self.norm_eps}")
        if not 1.0 < self.rope_base < math.inf:
            raise ValueError(f"rope_base must be finite and > 1, got {self.rope_base}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head


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
        n_embd=_MINISERIES_HEAD_DIM * depth,
    )
