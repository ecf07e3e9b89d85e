"""The methods that are compared, and the strengths of their penalties."""

from dataclasses import dataclass

__all__ = ["JOINT", "METHODS", "Method"]

JOINT = "joint"


@dataclass(frozen=True)
class Method:
    """One way not to forget.

    Args:
        label: what the figures call it.
        strength: of its penalty; 0 where there is none.
        grid: strengths that ``--sweep`` tries; empty where there is no penalty, and where the
            strength is that of another method on purpose.
    """

    label: str
    strength: float = 0.0
    grid: tuple[float, ...] = ()


METHODS = {
    "none": Method("nothing"),
    "ewc": Method("EWC", 100.0, (10.0, 30.0, 100.0, 300.0, 1000.0)),
    "ewc-proximal": Method("EWC, proximal", 100.0),
    "ewc-online": Method("EWC, online", 100.0),
    "ewc-compact": Method("EWC, 3.06 bytes a parameter", 100.0),
    "kfac": Method("KFAC", 30.0, (3.0, 10.0, 30.0, 100.0)),
    "activations": Method("activation covariance", 0.3, (0.1, 0.3, 1.0)),
    "subspace": Method("inside the input subspace", 5.0, (0.5, 1.5, 5.0)),
    "subspace-outside": Method("outside the input subspace", 0.05),
    "subspace-output": Method("inside the output subspace", 0.05),
    JOINT: Method("all tasks at once"),
}
