"""Sizes and constants of the GPT, and its miniseries: one integer, the depth, gives a whole model.

    n_layer = depth,   n_embd = 64 depth,   n_head = n_embd / 64

Every member has heads of 64 channels, so the step from depth d to d + 1 adds one head, 64 channels
and one block, and :func:`ars.models.grow` can take it exactly. (The first nanochat miniseries has
the same widths but a different head width at every odd depth; those models cannot be grown into
one another, because the rotary tables differ.) A smaller series has another width per depth, or
widths of its own, and one head width throughout.
"""

import math
from dataclasses import dataclass

__all__ = ["GPTConfig", "miniseries_config"]

_WIDTH_PER_DEPTH = 64


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


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
            _check_count(name, getattr(self, name))
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


def miniseries_config(
    depth: int,
    *,
    vocab_size: int = 256,
    sequence_len: int = 256,
    width_per_depth: int | None = None,
    head_dim: int = 64,
    width: int | None = None,
) -> GPTConfig:
    """Return the configuration of the miniseries model of the given depth.

        n_layer = depth,   n_embd = width_per_depth depth (or width),   n_head = n_embd / head_dim

    Args:
        depth: number of blocks, >= 1.
        vocab_size: number of token values, >= 1; 256 is one per byte.
        sequence_len: longest input in tokens, >= 1.
        width_per_depth: channels of the residual stream per block, >= 1; ``None`` is 64.
        head_dim: channels of an attention head, even, >= 2; divides the width. Members of a series
            that are grown out of one another must have the same.
        width: channels of the residual stream, >= 1, in place of ``width_per_depth``.

    Returns:
        The configuration, with the default norm eps and rotary base.

    Raises:
        TypeError: an argument is not an ``int``.
        ValueError: an argument is below 1, ``head_dim`` is odd or does not divide the width, or
            both ``width`` and ``width_per_depth`` are given.

    Example:
        >>> config = miniseries_config(10)
        >>> config.n_layer, config.n_head, config.n_embd, config.head_dim
        (10, 10, 640, 64)
        >>> config = miniseries_config(5, width_per_depth=16, head_dim=16)
        >>> config.n_layer, config.n_head, config.n_embd
        (5, 5, 80)
        >>> config = miniseries_config(4, width=56, head_dim=8)
        >>> config.n_layer, config.n_head, config.n_embd
        (4, 7, 56)

    References:
        Karpathy, "nanochat", github.com/karpathy/nanochat, miniseries v1.
    """
    _check_count("depth", depth)
    _check_count("head_dim", head_dim)
    for name, value in (("width_per_depth", width_per_depth), ("width", width)):
        if value is not None:
            _check_count(name, value)
    if width is not None and width_per_depth is not None:
        raise ValueError(
            f"width={width} and width_per_depth={width_per_depth} both set the width; name one"
        )
    if head_dim % 2:
        raise ValueError(
            f"head_dim={head_dim} is odd; rotary embeddings rotate pairs, so choose an even one"
        )
    if width is None:
        width = (_WIDTH_PER_DEPTH if width_per_depth is None else width_per_depth) * depth
    if width % head_dim:
        raise ValueError(
            f"the width {width} of depth {depth} is not a multiple of head_dim={head_dim}; choose "
            "a head_dim that divides the widths of all members of the series"
        )
    return GPTConfig(
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        n_layer=depth,
        n_head=width // head_dim,
        n_embd=width,
    )
