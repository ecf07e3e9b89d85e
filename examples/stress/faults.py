"""Faults that happen in training: of the data, the settings, the precision, the model, the state.

Each is a scenario beside those of `stress.scenarios`. It begins half-way, for some steps or for
good, or is there from the first step.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ars.models import GPT, GPTConfig

__all__ = ["FAULTS", "Fault", "PlainAttention", "fault_settings"]

_NOISE = 0.2  # of the targets are replaced by random bytes
_SHORT = 4  # a sequence keeps this fraction of its length
_SMALL_EPS = 1e-16
_VALUES = 256  # of a byte

_Batch = tuple[Tensor, Tensor]  # inputs and targets, each (B, T)


def _random(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> _Batch:
    rows, length = inputs.shape
    windows = torch.randint(0, _VALUES, (rows, length + 1), generator=generator)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _repeated(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> _Batch:
    value = int(torch.randint(0, _VALUES, (), generator=generator))
    return torch.full_like(inputs, value), torch.full_like(targets, value)


def _swapped(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> _Batch:
    return inputs, targets.roll(1, 0)  # each sequence gets those of its neighbour in the batch


def _short(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> _Batch:
    length = max(1, inputs.size(1) // _SHORT)
    return inputs[:, :length].contiguous(), targets[:, :length].contiguous()


def _noisy(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> _Batch:
    wrong = torch.rand(targets.shape, generator=generator) < _NOISE
    others = torch.randint(0, _VALUES, targets.shape, generator=generator)
    return inputs, torch.where(wrong.to(targets.device), others.to(targets.device), targets)


_DATA: dict[str, Callable[[Tensor, Tensor, torch.Generator], _Batch]] = {
    "random": _random,
    "repeated": _repeated,
    "swapped": _swapped,
    "short": _short,
    "noisy": _noisy,
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Args:
        title: of its row.
        begins: what happens, in words.
        data: what becomes of the batches, a key of the functions above; empty for nothing.
        steps: for how many steps from half-way on the batches are so; ``None``: to the end.
        rate: factor of the learning rate from half-way on.
        warmup: whether the learning rate begins low.
        bf16: whether weights and gradients are bfloat16 throughout; the moments are as each
            optimizer keeps them, in bfloat16 but for `ARSAdamW`, which keeps them in float32.
        eps: of the optimizer; ``None`` leaves its own.
        qk_norm: whether attention normalises its queries and keys.
        forgets: whether what the optimizer knows is lost half-way.
        control: the scenario of the undisturbed run that this one is held against.

    Raises:
        ValueError: ``data`` is none of the functions.

    Example:
        >>> fault = Fault("one byte repeated", "...", data="repeated", steps=1)
        >>> text = torch.arange(6).reshape(2, 3)
        >>> generator = torch.Generator().manual_seed(0)
        >>> [bool((fault.spoil(text, text, s, generator)[0] == text).all()) for s in (-1, 0, 1)]
        [True, False, True]
    """

    title: str
    begins: str
    data: str = ""
    steps: int | None = None
    rate: float = 1.0
    warmup: bool = True
    bf16: bool = False
    eps: float | None = None
    qk_norm: bool = True
    forgets: bool = False
    control: str = "ordinary"

    def __post_init__(self) -> None:
        if self.data and self.data not in _DATA:
            raise ValueError(f"data must be one of {', '.join(_DATA)}, got {self.data!r}")

    def spoil(
        self, inputs: Tensor, targets: Tensor, since: int, generator: torch.Generator
    ) -> _Batch:
        """The batch as the model gets it.

        Args:
            inputs: (B, T).
            targets: (B, T).
            since: steps since half-way, negative before.
            generator: of this step, on the CPU.
        """
        over = self.steps is not None and since >= self.steps
        if not self.data or since < 0 or over:
            return inputs, targets
        spoiled = _DATA[self.data](inputs, targets, generator)
        return spoiled[0].to(inputs.device), spoiled[1].to(targets.device)

    def changed(self, model: nn.Module) -> nn.Module:
        """The model that the fault happens to, changed in place; its weights stay.

        Args:
            model: the undisturbed one.

        Raises:
            TypeError: the fault is one of the attention, and the model is no `GPT`.
        """
        if not self.qk_norm:
            if not isinstance(model, GPT):
                name = type(model).__name__
                raise TypeError(f"{self.title!r} is a fault of a GPT's attention; {name} has none")
            for block in model.blocks:
                block.attn = PlainAttention(block.attn)
        return model.to(torch.bfloat16) if self.bf16 else model


class PlainAttention(nn.Module):
    """The attention of `ars.models.GPT` without the norm of queries and keys.

        attn(h) = proj(softmax(rope(q h) . rope(k h) / sqrt(hd)) v h),  causal, per head

    Its logits can grow with the weights, and a softmax of large logits looks at one position only:
    the entropy of the attention is lost (Zhai et al., arXiv:2303.06296).

    Args:
        attention: the one of a block, whose weights it takes.

    Example:
        >>> config = GPTConfig(vocab_size=256, sequence_len=8, n_layer=1, n_head=1, n_embd=32)
        >>> model = GPT(config, torch.Generator().manual_seed(0))
        >>> names = [name for name, _ in model.named_parameters()]
        >>> model.blocks[0].attn = PlainAttention(model.blocks[0].attn)
        >>> [name for name, _ in model.named_parameters()] == names
        True
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.config: GPTConfig = attention.config
        self.q, self.k, self.v = attention.q, attention.k, attention.v
        self.proj = attention.proj

    def queries_and_keys(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turned by their positions, each (B, H, T, hd).

        Args:
            h: (B, T, D).
            cos: (T, hd/2).
            sin: (T, hd/2).
        """

        def turned(x: Tensor) -> Tensor:
            near, far = self._heads(x).chunk(2, dim=-1)  # (B, H, T, hd/2)
            return torch.cat((near * cos - far * sin, near * sin + far * cos), dim=-1)

        return turned(self.q(h)), turned(self.k(h))

    def _heads(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        return x.view(rows, length, self.config.n_head, self.config.head_dim).transpose(1, 2)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend.

        Args:
            h: (B, T, D).
            cos: (T, hd/2).
            sin: (T, hd/2).

        Returns:
            (B, T, D).
        """
        q, k = self.queries_and_keys(h, cos, sin)
        y = nn.functional.scaled_dot_product_attention(q, k, self._heads(self.v(h)), is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(h.shape))
        return out


def _shards() -> dict[str, Fault]:
    kinds = {
        "random": ("random bytes", "the text becomes random bytes"),
        "repeated": ("repeated byte", "every batch is one repeated byte"),
        "swapped": ("swapped targets", "every sequence gets the targets of another"),
    }
    return {
        f"{kind}-{steps}": Fault(f"{title}, {steps}", f"{begins} for {steps} steps", kind, steps)
        for kind, (title, begins) in kinds.items()
        for steps in (1, 5, 50)
    }


FAULTS = {
    **_shards(),
    "rate-3": Fault("rate x 3", "the learning rate is multiplied by 3", rate=3.0),
    "rate-10": Fault("rate x 10", "the learning rate is multiplied by 10", rate=10.0),
    "no-warmup": Fault("no warm-up", "the learning rate does not begin low", warmup=False),
    "bf16": Fault(
        "bfloat16, eps 1e-16", "weights are bfloat16, eps is too small", bf16=True, eps=_SMALL_EPS
    ),
    "plain-attention": Fault("no QK-norm", "attention has no QK-norm", qk_norm=False),
    "entropy": Fault(
        "no QK-norm, x 10",
        "without QK-norm, the learning rate is multiplied by 10",
        rate=10.0,
        qk_norm=False,
        control="plain-attention",
    ),
    "short": Fault("sequences / 4", "sequences have a quarter of their length", "short"),
    "lost-moments": Fault("lost moments", "the optimizer's state is lost", forgets=True),
    "noisy": Fault("20 % wrong targets", "a fifth of the targets are random", "noisy"),
}  # fmt: skip


def fault_settings(name: str) -> dict[str, Any]:
    """Every setting that decides the numbers of a scenario: its own and what all share.

    Args:
        name: of the fault.

    Example:
        >>> fault_settings("rate-3")["rate"]
        3.0
    """
    settings = asdict(FAULTS[name])
    del settings["title"], settings["begins"]
    return settings | {"noise": _NOISE, "short": _SHORT}
