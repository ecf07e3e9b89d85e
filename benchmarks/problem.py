"""The tensors that the step's benchmarks work on, and how results are compared."""

from typing import Any

import torch

from ars.regularizers import EWC

SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
STRENGTH = 100.0
# Some round once where others round twice; the gradients and parameters are of order one.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
Shapes = list[tuple[int, ...]]
CPU_SHAPES: dict[str, Shapes] = {
    "50 x 512 x 512": [(512, 512)] * 50,
    "200 x 64 x 64": [(64, 64)] * 200,
}
# The grid of PyTorch's own work on its fused optimizer (pull request 178641).
GPU_SHAPES: dict[str, Shapes] = {
    "200 x 1M": [(1024, 1024)] * 200,
    "10 x 16.8M": [(4096, 4096)] * 10,
    "1000 x 1024": [(1024,)] * 1000,
    "10000 x 64": [(64,)] * 10000,
}
SHAPES = GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES


class Weights(torch.nn.Module):
    """The tensors to be optimized, their gradients, and what a penalty needs."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        """Draw everything from one seed, so that all candidates start alike."""
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.weights = torch.nn.ParameterList(draw(shape) for shape in shapes)
        for weight in self.weights:
            weight.grad = draw(tuple(weight.shape))


class Penalized(Weights):
    """The same with anchors, importances, and the task's gradients set aside."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        """Draw what the penalty needs from another seed."""
        super().__init__(shapes, device)
        generator = torch.Generator(device).manual_seed(1)
        draws = [
            torch.randn(2, *shape, generator=generator, device=device).unbind() for shape in shapes
        ]
        self.task = [weight.grad.clone() for weight in self.weights]
        self.anchor = [
            w.detach() + 0.01 * noise for w, (noise, _) in zip(self.weights, draws, strict=True)
        ]
        names = [name for name, _ in self.named_parameters()]
        self.importance = {n: o.abs() for n, (_, o) in zip(names, draws, strict=True)}

    def penalty(self) -> EWC:
        """Return the penalty towards the anchors."""
        moved = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            for weight, anchor in zip(self.weights, self.anchor, strict=True):
                weight.copy_(anchor)
            ewc = EWC(self, self.importance, strength=STRENGTH)
            for weight, value in zip(self.weights, moved, strict=True):
                weight.copy_(value)
        return ewc

    def penalty_by_autograd(self) -> torch.Tensor:
        """The same penalty as users write it."""
        terms = zip(self.weights, self.anchor, self.importance.values(), strict=True)
        return 0.5 * STRENGTH * sum((f * (w - a).pow(2)).sum() for w, a, f in terms)

    def restore_gradients(self) -> None:
        """Put back what the task's backward pass would have left."""
        for weight, gradient in zip(self.weights, self.task, strict=True):
            weight.grad.copy_(gradient)


def check_equal(
    ours: torch.optim.Optimizer,
    theirs: torch.optim.Optimizer,
    *,
    moments: bool = True,
    parameters: bool = True,
) -> dict[str, Any]:
    """Assert that two optimizers have taken the same steps, up to rounding.

    Args:
        ours: One optimizer.
        theirs: The other.
        moments: Compare the moments; off for a peer that stores them in its own way.
        parameters: Compare the parameters; off where a gradient and a penalty may cancel, so that
            Adam's first step is the sign of a rounding error.

    Returns:
        What was compared, within which tolerance, and the largest difference.
    """
    compared = ["exp_avg", "exp_avg_sq"] * moments + ["parameters"] * parameters
    largest = 0.0
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        for name in compared:
            x, y = (a, b) if name == "parameters" else (ours.state[a][name], theirs.state[b][name])
            torch.testing.assert_close(x, y, **TOLERANCE)
            largest = max(largest, float((x - y).detach().abs().max()))
    return {"compared": compared, "largest difference": largest, **TOLERANCE}
