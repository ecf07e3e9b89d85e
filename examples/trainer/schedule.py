"""The learning rate of a step: warm-up, constant trunk, cooled branch.

    step < warmup              peak (step + 1) / warmup
    step < trunk               peak
    step < trunk + cooldown    peak (trunk + cooldown - step) / cooldown

A child grows out of the end of the trunk, where the rate is still the peak, and never out of the
cooled branch: warming up again would throw away what cooling gained.
"""

__all__ = ["cooldown_steps", "learning_rate", "split_steps"]


def learning_rate(step: int, *, peak: float, warmup: int, trunk: int, cooldown: int) -> float:
    """The rate of the update that follows ``step`` earlier ones.

    Example:
        >>> [learning_rate(s, peak=1.0, warmup=2, trunk=4, cooldown=2) for s in range(7)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    if step < trunk:
        return peak * min(1.0, (step + 1) / warmup) if warmup else peak
    return peak * (max(0, trunk + cooldown - step) / cooldown)


def cooldown_steps(trunk: int, share: float) -> int:
    """Steps of the cooled branch of a trunk, at least one.

    Example:
        >>> cooldown_steps(150, 0.25)
        38
    """
    return max(1, round(trunk * share))


def split_steps(total: int, share: float) -> tuple[int, int]:
    """Divide a total into a trunk and a cooled branch of ``share`` times the trunk.

    Example:
        >>> split_steps(250, 0.25)
        (200, 50)
    """
    trunk = min(total - 1, max(1, round(total / (1 + share))))
    return trunk, total - trunk
