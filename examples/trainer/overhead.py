"""What an arm adds to the operations of a training step, counted from its formulas.

    ewc        5 a parameter     difference, product, gradient, value
    subspace   4 a parameter     difference, mask, gradient, value
    distill    a third of the parent's training operations (its forward pass) on the same tokens
    muon       5 iterations of X <- a X + (b A + c A A) X, A = X X^T, for X of m x n, m <= n:
               5 (4 m^2 n + 2 m^3) a matrix, whatever the batch

AdamW itself, the controller and clipping are left out everywhere: some 20 operations a parameter.
"""

from dataclasses import dataclass

from trainer.arms import Arm

__all__ = ["GROWTH_OPERATIONS", "Shape", "step_overhead"]

# Growing multiplies each weight, its two moments and its Fisher information by one factor each.
GROWTH_OPERATIONS = 4
_EWC_OPERATIONS = 5
_SUBSPACE_OPERATIONS = 4
_MUON_ITERATIONS = 5


@dataclass(frozen=True)
class Shape:
    """Sizes and operations of a model.

    Args:
        params: number of all parameters.
        scaling_params: in matrix products, all but the embedding table.
        flops_per_token: of a training step.
        matrices: (rows, columns) of the matrices inside the blocks.
    """

    params: int
    scaling_params: int
    flops_per_token: int
    matrices: tuple[tuple[int, int], ...]


def step_overhead(
    arm: Arm, shape: Shape, parent: Shape | None, batch_tokens: int, ewc_strength: float
) -> int:
    """Operations a step beyond forward and backward.

    Args:
        arm: how the model is trained.
        shape: of the model.
        parent: of the model it was grown out of, ``None`` for none.
        batch_tokens: tokens a step.
        ewc_strength: the run's; an EWC penalty of strength 0 is not built.

    Example:
        >>> from trainer.arms import parse_arm
        >>> shape = Shape(params=100, scaling_params=80, flops_per_token=480, matrices=((4, 8),))
        >>> step_overhead(parse_arm("scratch+muon"), shape, None, 10, ewc_strength=1.0)
        3200
    """
    total = 0
    if arm.has("ewc") and arm.strength("ewc", ewc_strength) > 0:
        total += _EWC_OPERATIONS * shape.params
    if arm.has("subspace"):
        total += _SUBSPACE_OPERATIONS * shape.params
    if arm.has("distill") and parent is not None:
        total += parent.flops_per_token * batch_tokens // 3
    if arm.has("muon"):
        for rows, columns in shape.matrices:
            m, n = sorted((rows, columns))
            total += _MUON_ITERATIONS * (4 * m * m * n + 2 * m**3)
    return total
