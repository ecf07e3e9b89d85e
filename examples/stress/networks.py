"""The networks that are trained: the GPT, a recurrent and a convolutional one.

All read bytes and predict the next one at every position: (B, T) int64 -> (B, T, 256).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ars.models import GPT
from stress.scenarios import Size

__all__ = ["NETWORKS", "ByteConvolution", "ByteLSTM", "Network", "network_settings"]

_VALUES = 256  # of a byte
_KERNEL = 3  # bytes that a convolution sees; the next one sees them twice as far apart


class ByteLSTM(nn.Module):
    r"""A recurrent network, whose state begins with 0 in every sequence.

        h_t, c_t = LSTM(h_{t-1}, c_{t-1}, E x_t),  logits_t = W h_t + b

    Args:
        width: D, of the embedding and the state.

    References:
        Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (8), 1997.

    Example:
        >>> ByteLSTM(width=8)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 256])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VALUES, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, _VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict.

        Args:
            tokens: (B, T) int64.

        Returns:
            (B, T, 256).
        """
        states, _ = self.lstm(self.embedding(tokens))  # (B, T, D)
        logits: Tensor = self.head(states)
        return logits


class ByteConvolution(nn.Module):
    r"""Causal convolutions with residual connections, the k-th dilated by 2^k.

        x <- x + conv_k(relu(rms(x))),  logits = W rms(x) + b

    Args:
        width: D, of the residual stream.
        layers: convolutions, of 3 bytes each.

    References:
        Bai et al., "An empirical evaluation of generic convolutional and recurrent networks for
        sequence modeling", arXiv:1803.01271.

    Example:
        >>> network = ByteConvolution(width=8, layers=2)
        >>> first, second = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 5]])
        >>> bool((network(first)[:, :3] == network(second)[:, :3]).all())  # blind to what follows
        True
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VALUES, width)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, _KERNEL, dilation=2**k) for k in range(layers)
        )
        self.head = nn.Linear(width, _VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict.

        Args:
            tokens: (B, T) int64.

        Returns:
            (B, T, 256).
        """
        x = self.embedding(tokens)  # (B, T, D)
        for k, convolution in enumerate(self.convolutions):
            seen = nn.functional.relu(_normalized(x)).transpose(1, 2)  # (B, D, T)
            past = nn.functional.pad(seen, ((_KERNEL - 1) * 2**k, 0))
            x = x + convolution(past).transpose(1, 2)
        logits: Tensor = self.head(_normalized(x))
        return logits


def _normalized(x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:])


@torch.no_grad()
def _drawn(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw the weights: normal, of variance 1 / fan-in, and 1 for an embedding; else 0.

    Biases and the head are 0, so that the first loss is that of guessing, as with the GPT.
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 1 or name.startswith("head."):
            weight.zero_()
        else:
            summed = 1 if name.startswith("embedding.") else weight[0].numel()
            weight.normal_(0.0, summed**-0.5, generator=generator)
    return model


@dataclass(frozen=True)
class Network:
    """One of them.

    Args:
        title: in tables and figures.
        rate: best learning rate of AdamW, as a multiple of the GPT's, found on seeds 100 and 101
            at the size "small".
        make: from a size and a generator of its weights.
    """

    title: str
    rate: float
    make: Callable[[Size, torch.Generator], nn.Module]


def _gpt(size: Size, generator: torch.Generator) -> nn.Module:
    return GPT(size.model(), generator)


def _lstm(size: Size, generator: torch.Generator) -> nn.Module:
    return _drawn(ByteLSTM(size.width), generator)


def _convolutions(size: Size, generator: torch.Generator) -> nn.Module:
    return _drawn(ByteConvolution(size.width, size.layers), generator)


NETWORKS = {
    "gpt": Network("GPT", 1.0, _gpt),
    "lstm": Network("LSTM", 3.0, _lstm),
    "conv": Network("convolutions", 1.0, _convolutions),
}


def network_settings(name: str) -> dict[str, Any]:
    """Every setting that decides the numbers of a network, but for those of its size.

    Args:
        name: of `NETWORKS`.

    Example:
        >>> network_settings("lstm")
        {'name': 'lstm', 'rate': 3.0, 'kernel': 3}
    """
    return {"name": name, "rate": NETWORKS[name].rate, "kernel": _KERNEL}
