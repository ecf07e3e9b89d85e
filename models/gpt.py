r"""A GPT whose block is made to be grown: no biases, no norm weights, head-wise projections.

The residual stream x (B, T, D) of a model with L blocks is

    x <- norm(wte[tokens])
    x <- x + attn_l(norm(x)),   x <- x + mlp_l(norm(x))      l = 1..L
    logits = lm_head(norm(x))

    norm(x)   = x / sqrt(mean(x^2) + eps)
    attn(h)   = proj(softmax(norm(rope(q h)) . norm(rope(k h)) / sqrt(hd)) v h), causal, per head
    mlp(h)    = proj(relu(fc h)^2),  4 D hidden units

It is the block of the first nanochat miniseries (Karpathy, github.com/karpathy/nanochat) without
the logit softcap. The head is not tied to the embedding.

Two of the norms take an eps that depends on the width, for a reason given in :class:`GPT`.
"""

import math

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ars.models.config import GPTConfig

__all__ = ["GPT", "GPTConfig", "initial_values"]

_MLP_RATIO = 4
_WTE_STD = 0.8
_LM_HEAD_STD = 0.001


class _Linear(nn.Linear):
    """Linear map without a bias, left uninitialised: :class:`GPT` draws every weight itself."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draw nothing, so that building a model leaves the global random state alone."""


class _Embedding(nn.Embedding):
    """Embedding left uninitialised, like :class:`_Linear`."""

    def reset_parameters(self) -> None:
        """Draw nothing, so that building a model leaves the global random state alone."""


def _norm(x: Tensor, eps: float) -> Tensor:
    return nn.functional.rms_norm(x, (x.size(-1),), eps=eps)


def _rotary_tables(length: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first ``length`` positions, each (T, hd/2), in ``like.dtype``."""
    # Rebuilt in every forward pass: T * hd / 2 cosines cost nothing beside the model (0.1 ms for
    # T = 2048 on one core), and a stored table would keep the precision of whatever dtype the model
    # once had. Angles of half-precision models are formed in fp32: bf16 cannot count beyond 256.
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    channel = torch.arange(0, head_dim, 2, dtype=dtype, device=like.device)  # (hd/2,)
    position = torch.arange(length, dtype=dtype, device=like.device)  # (T,)
    angle = position[:, None] * base ** (-channel / head_dim)  # (T, hd/2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i against channel i + hd/2 of x (B, H, T, hd)."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, hd/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Under vmap the fused CPU kernel has no batching rule: torch would warn and loop over samples.
    if torch._C._are_functorch_transforms_active():
        with sdpa_kernel(SDPBackend.MATH):
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class _Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # q, k and v are separate so that new heads are new rows at the end of each.
        self.q = _Linear(config.n_embd, config.n_embd)
        self.k = _Linear(config.n_embd, config.n_embd)
        self.v = _Linear(config.n_embd, config.n_embd)
        self.proj = _Linear(config.n_embd, config.n_embd)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = h.shape  # (B, T, D)
        config = self.config
        heads = (batch, length, config.n_head, config.head_dim)
        q = self.q(h).view(heads).transpose(1, 2)  # (B, H, T, hd)
        k = self.k(h).view(heads).transpose(1, 2)  # (B, H, T, hd)
        v = self.v(h).view(heads).transpose(1, 2)  # (B, H, T, hd)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)  # under autocast q is narrower than the stream
        eps = config.norm_eps * config.n_head
        q = _norm(_rotate(q, cos, sin), eps)
        k = _norm(_rotate(k, cos, sin), eps)
        y = _causal_attention(q, k, v)  # (B, H, T, hd)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class _MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = _Linear(config.n_embd, _MLP_RATIO * config.n_embd)
        self.proj = _Linear(_MLP_RATIO * config.n_embd, config.n_embd)

    def forward(self, h: Tensor) -> Tensor:
        return self.proj(nn.functional.relu(self.fc(h)).square())


class _Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.attn = _Attention(config)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(_norm(x, self.norm_eps), cos, sin)
        return x + self.mlp(_norm(x, self.norm_eps))


def initial_values(
    name: str, values: Tensor, n_embd: int, generator: torch.Generator | None
) -> Tensor:
    """Draw a parameter of a new model by the law of :class:`GPT`.

    Args:
        name: The parameter's, in the model.
        values: Of its shape, on the generator's device; overwritten.
        n_embd: D.
        generator: Source of the numbers; ``None`` for torch's own of the device.

    Returns:
        ``values``.
    """
    bound = math.sqrt(3.0 / n_embd)
    if name == "wte.weight":
        return values.normal_(0.0, _WTE_STD, generator=generator)
    if name == "lm_head.weight":
        return values.normal_(0.0, _LM_HEAD_STD, generator=generator)
    if name.endswith(".proj.weight"):
        return values.zero_()
    return values.uniform_(-bound, bound, generator=generator)


class GPT(nn.Module):
    r"""Decoder-only transformer with parameter-free RMSNorm, RoPE, QK-norm and relu^2.

    Parameters are ``wte.weight`` (V, D), ``blocks.{i}.attn.{q,k,v,proj}.weight`` (D, D),
    ``blocks.{i}.mlp.fc.weight`` (4D, D), ``blocks.{i}.mlp.proj.weight`` (D, 4D) and
    ``lm_head.weight`` (V, D). Initially

        wte ~ N(0, 0.8^2),  lm_head ~ N(0, 0.001^2),  attn.proj = mlp.proj = 0,
        q, k, v, fc ~ U(-sqrt(3/D), sqrt(3/D)), whose deviation is 1/sqrt(D).

    Why two eps depend on the width. Growing from D to D' = s^2 D channels
    (:func:`ars.models.grow`) appends zeros to the embedding and makes the stream s [x; 0], so

        norm after the embedding   reads [x; 0],    mean square D/D' of the old one
        norms inside and at the end  read s [x; 0],   the old mean square
        query-key norm             reads s q,       D'/D times the old mean square (head_dim fixed)

    A norm commutes with the growth only if its eps follows its mean square. With a fixed head
    width D is proportional to ``n_head``, so the three use ``norm_eps / n_head``, ``norm_eps`` and
    ``norm_eps * n_head``, and growing is exact for every ``norm_eps``, not only for 0.

    Args:
        config: sizes of the model.
        generator: source of the initial weights, on any device; ``None`` uses torch's default
            generator of the parameters' device.

    Raises:
        TypeError: ``config`` is not a :class:`GPTConfig`.

    Example:
        >>> config = GPTConfig(vocab_size=256, sequence_len=64, n_layer=2, n_head=2, n_embd=128)
        >>> model = GPT(config, torch.Generator().manual_seed(0))
        >>> model(torch.zeros(1, 8, dtype=torch.int64)).shape
        torch.Size([1, 8, 256])
        >>> model.num_parameters(), model.num_scaling_parameters()
        (458752, 425984)

    References:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
        Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
        Su et al., "RoFormer", arXiv:2104.09864. Henry et al., "Query-Key Normalization for
        Transformers", arXiv:2010.04245. So et al., "Primer", arXiv:2109.08668 (relu^2).
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not isinstance(config, GPTConfig):
            raise TypeError(f"config must be a GPTConfig, got {type(config).__name__}")
        self.config = config
        self.recompute = False  # whether blocks keep only their inputs for the backward pass
        self.wte = _Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.lm_head = _Linear(config.n_embd, config.vocab_size)
        self._initialize(generator)

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator | None) -> None:
        for name, weight in self.named_parameters():
            # On the generator's device: one seed gives one model wherever it will live.
            device = weight.device if generator is None else generator.device
            like = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            weight.copy_(initial_values(name, like, self.config.n_embd, generator))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at every position.

        Args:
            tokens: (B, T) int64 or int32, values in [0, V), 1 <= T <= ``sequence_len``.

        Returns:
            (B, T, V) logits; position t depends on tokens 0..t only. fp32 for half-precision
            models, since a loss formed in bf16 keeps only 8 bits, else the parameters' dtype.

        Raises:
            ValueError: ``tokens`` has the wrong number of dimensions, dtype or length.
        """
        if tokens.ndim != 2:
            raise ValueError(
                f"tokens must have shape (B, T), got {tuple(tokens.shape)}; "
                "add the batch dimension with tokens.unsqueeze(0)"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}; use tokens.long()")
        if not 1 <= tokens.size(1) <= self.config.sequence_len:
            raise ValueError(
                f"tokens have length {tokens.size(1)}, outside 1..sequence_len="
                f"{self.config.sequence_len}; crop them or raise GPTConfig.sequence_len"
            )
        config = self.config
        x = _norm(self.wte(tokens), config.norm_eps / config.n_head)  # (B, T, D)
        cos, sin = _rotary_tables(tokens.size(1), config.head_dim, config.rope_base, x)
        # torch.func cannot recompute, and Dynamo cannot trace the question.
        able = torch.compiler.is_compiling() or not is_functorch_wrapped_tensor(x)
        again = self.recompute and torch.is_grad_enabled() and able
        for block in self.blocks:
            x = checkpoint(block, x, cos, sin, use_reentrant=False) if again else block(x, cos, sin)
        logits: Tensor = self.lm_head(_norm(x, config.norm_eps))  # (B, T, V)
        return logits if logits.dtype == torch.float64 else logits.float()

    def num_parameters(self) -> int:
        """Number of all parameters, 12 L D^2 + 2 V D."""
        return sum(weight.numel() for weight in self.parameters())

    def num_scaling_parameters(self) -> int:
        """Number of parameters in matrix products, 12 L D^2 + V D: all but the embedding table.

        The count whose scaling exponents came out cleanest in the nanochat miniseries.
        """
        return self.num_parameters() - self.wte.weight.numel()

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token at the full ``sequence_len`` T.

            6 (12 L D^2 + V D) + 12 L D T

        Six per matrix parameter (a multiply-add forward, two backward) and the two attention
        products, counted over all T positions without credit for the causal mask, as nanochat does.
        """
        config = self.config
        attention = 12 * config.n_layer * config.n_embd * config.sequence_len
        return 6 * self.num_scaling_parameters() + attention

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each row by tokens sampled from softmax(logits / temperature).

        Args:
            tokens: (B, T) int64, T >= 1; only the last ``sequence_len`` tokens are read.
            max_new_tokens: tokens to append to each row, >= 0.
            temperature: >= 0; 0 takes the most probable token.
            generator: source of the samples, on the model's device; ``None`` uses torch's default.

        Returns:
            (B, T + max_new_tokens), the prompt followed by the new tokens.

        Raises:
            ValueError: ``max_new_tokens`` or ``temperature`` is negative or not finite, or
                ``tokens`` is not accepted by :meth:`forward`.

        Example:
            >>> config = GPTConfig(vocab_size=9, sequence_len=4, n_layer=1, n_head=1, n_embd=8)
            >>> model = GPT(config, torch.Generator().manual_seed(0))
            >>> model.generate(torch.tensor([[1, 2]]), 6, temperature=0.0).shape
            torch.Size([1, 8])
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
        divisor = max(temperature, torch.finfo(torch.float32).tiny)  # what is below it becomes 0
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.config.sequence_len :])[:, -1]  # (B, V)
            if temperature == 0.0:
                following = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                # Below 0 the quotients may overflow: the likeliest token is then taken.
                below = logits - logits.amax(dim=-1, keepdim=True)
                probabilities = torch.softmax(below / divisor, dim=-1)
                following = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat((tokens, following.to(tokens.dtype)), dim=1)
        return tokens
