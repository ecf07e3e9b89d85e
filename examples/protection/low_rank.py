r"""Fine-tuning of few parameters: low-rank additions to the weights, which themselves stay.

    W = W_0 + B A,        A (r, in) drawn, B (out, r) = 0,        W_0 fixed

They can be held by what the change of the whole weight means for the first text, F being the
diagonal Fisher information of W_0:

    E = 1/2 lambda sum_ij F_ij (B A)_ij^2

It is no quadratic of A and B, so that it joins the loss and is differentiated with it, where the
package's `EWC` gives its gradient to the optimizer.

References:
    Hu et al., "LoRA: Low-rank adaptation of large language models", arXiv:2106.09685; the penalty:
    "EWC-LoRA", arXiv:2602.17559.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

__all__ = ["add_low_rank", "merged_ewc"]


class _Addition(nn.Module):
    """Low-rank addition to a weight (out, in)."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, width = weight.shape
        bound = (3.0 / width) ** 0.5  # A x then has about the size of x
        self.a = nn.Parameter(torch.empty(rank, width).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(out, rank))

    def change(self) -> Tensor:
        """B A, (out, in)."""
        return self.b @ self.a

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.change()


def add_low_rank(
    model: nn.Module, rank: int, generator: torch.Generator
) -> dict[str, Callable[[], Tensor]]:
    """Fix all weights and add trained matrices of a low rank to those of the linear maps.

    Args:
        model: whose embeddings stay as they are; changed in place, its output is not.
        rank: r >= 1, of each addition.
        generator: of the first factors.

    Returns:
        What computes the change B A of a weight, by the weight's name.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2, bias=False))
        >>> list(add_low_rank(model, 1, torch.Generator()))
        ['1.weight']
        >>> [p.numel() for p in model.parameters() if p.requires_grad]
        [4, 2]
    """
    found: dict[str, Callable[[], Tensor]] = {}
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            addition = _Addition(layer.weight, rank, generator)
            register_parametrization(layer, "weight", addition)
            found[f"{name}.weight"] = addition.change
    return found


def merged_ewc(
    changes: Mapping[str, Callable[[], Tensor]], importance: Mapping[str, Tensor], strength: float
) -> Tensor:
    """The penalty E above.

    Args:
        changes: of `add_low_rank`.
        importance: F, by the weights' names.
        strength: lambda.

    Example:
        >>> change = torch.tensor([[1.0, 2.0]])
        >>> float(merged_ewc({"w": lambda: change}, {"w": torch.tensor([[3.0, 1.0]])}, 10.0))
        35.0
    """
    parts = [(importance[name] * change().square()).sum() for name, change in changes.items()]
    return 0.5 * strength * torch.stack(parts).sum()
