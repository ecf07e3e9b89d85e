"""What the numbers of the controller must be, wherever they are given."""

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["GATES", "SURPRISES", "check_settings"]

# What Phi can multiply.
GATES = ("betas", "lr", "grad")
# What the controller can watch, besides what a callable returns.
SURPRISES = ("auto", "loss", "grad_norm", "entropy")

_Rule = tuple[type, Callable[[Any], bool], str]

_NOT_NEGATIVE: _Rule = (float, lambda x: 0 <= x < math.inf, "be finite and >= 0")
_RULES: dict[str, _Rule] = {
    "window": (int, lambda x: x >= 3, "be at least 3"),
    "alpha": _NOT_NEGATIVE,
    "phi_min": (float, lambda x: 0 <= x <= 1, "lie in [0, 1]"),
    "eps": (float, lambda x: 0 < x <= 1, "lie in (0, 1]"),
    "jitter": (float, lambda x: 0 <= x < 1, "lie in [0, 1)"),
    "standardize": (bool, lambda x: True, ""),
    "detrend": (bool, lambda x: True, ""),
    "threshold": _NOT_NEGATIVE,
    "significance": _NOT_NEGATIVE,
    "alternating": (bool, lambda x: True, ""),
    "resonance": _NOT_NEGATIVE,
    "release": (float, lambda x: 1 <= x < math.inf, "be finite and >= 1"),
    "first_release": (float, lambda x: 1 <= x < math.inf, "be finite and >= 1"),
    "seed": (int, lambda x: 0 <= x < 2**63, "lie in [0, 2^63)"),
}


def check_settings(owner: str, settings: Mapping[str, Any]) -> None:
    """Raise unless every setting has its type and lies in its range.

    Args:
        owner: Whose settings they are, for the message.
        settings: Name -> value.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of its range.
    """
    for name, value in settings.items():
        if name == "gate":
            _check_gate(owner, value)
        elif name == "surprise":
            _check_surprise(owner, value)
        else:
            kind = _RULES[name][0]
            accepted = (int, float) if kind is float else kind
            if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
                article = "an" if kind is int else "a"
                raise TypeError(f"{owner}: {name} must be {article} {kind.__name__}, got {value!r}")
    for name, value in settings.items():
        if name in _RULES and not _RULES[name][1](value):
            raise ValueError(f"{owner}: {name} must {_RULES[name][2]}, got {value!r}")


def _check_gate(owner: str, gate: Any) -> None:
    if not isinstance(gate, tuple):
        raise TypeError(f"{owner}: gate must be a tuple of names such as ('lr',), got {gate!r}")
    if not set(gate) <= set(GATES) or len(set(gate)) < len(gate):
        raise ValueError(f"{owner}: gate must name some of {GATES}, each once, got {gate!r}")


def _check_surprise(owner: str, surprise: Any) -> None:
    if not isinstance(surprise, str) and not callable(surprise):
        raise TypeError(f"{owner}: surprise must be a name or a callable, got {surprise!r}")
    if isinstance(surprise, str) and surprise not in SURPRISES:
        raise ValueError(f"{owner}: surprise must be one of {SURPRISES}, got {surprise!r}")
