"""The values of options: each type takes a word of the command line or a value of a YAML file.

A type also takes what it returned, unchanged, because values are checked once more at the end.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.arguments import OptionError, integer, number, shortened
from trainer.arms import parse_arm
from trainer.config import RULE
from trainer.errors import UsageError
from trainer.peak_flops import PEAK_FLOPS

__all__ = [
    "LARGEST_DEPTH", "arms", "betas", "choice", "depths", "nearest", "optional", "parents", "path",
    "peak_flops", "rule_or", "steps", "text", "zero_or",
]  # fmt: skip

LARGEST_DEPTH = 20
_LARGEST_BETA = 0.999999  # those beyond it come too close to 1 for float32
_NOTHING = ("none", "null")


def nearest(word: str, names: Iterable[str]) -> str:
    """What to say to a word that is none of the names."""
    known = list(names)
    found = get_close_matches(word, known, 1)
    return f"did you mean {found[0]}?" if found else f"use {', '.join(known)}"


def text(given: Any) -> str:
    """A word or more."""
    if not isinstance(given, str) or not given:
        raise OptionError(f"{given!r} is not a text")
    return given


def path(given: Any) -> Path:
    """A file or folder."""
    return given if isinstance(given, Path) else Path(text(given))


def choice(*names: str) -> Callable[[Any], str]:
    """Return a type for one of the names."""

    def parse(given: Any) -> str:
        if given not in names:
            listed = ", ".join(repr(name) for name in names)
            found = get_close_matches(str(given), names, 1)
            hint = f"; did you mean {found[0]}?" if found else ""
            raise OptionError(f"{given!r} is not one of {listed}{hint}")
        return str(given)

    return parse


def rule_or(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a type for what another takes, or "rule"."""

    def parse(given: Any) -> Any:
        if given == RULE:
            return RULE
        try:
            return convert(given)
        except OptionError as error:
            raise OptionError(f"{error}, nor '{RULE}'") from None

    return parse


def zero_or(convert: Callable[[Any], float]) -> Callable[[Any], float]:
    """Return a type for what another takes, or 0."""

    def parse(given: Any) -> float:
        try:
            return convert(given)
        except OptionError as error:
            try:
                return number(0, 0)(given)
            except OptionError:
                raise OptionError(f"{error}, nor 0") from None

    return parse


def optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a type for what another takes, or "none", so that a file can be overruled."""

    def parse(given: Any) -> Any:
        return None if given is None or given in _NOTHING else convert(given)

    return parse


def _items(given: Any) -> list[Any]:
    if isinstance(given, str):
        return given.split(",")
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _shown(given: Any) -> str:
    return shortened(given if isinstance(given, str) else ",".join(map(str, _items(given))))


def arms(given: Any) -> tuple[str, ...]:
    """Ways to train, as `trainer.arms` reads them."""
    try:
        names = [parse_arm(str(word)).name for word in _items(given)]
    except UsageError as error:
        raise OptionError(str(error).removeprefix("--arms ")) from None
    if not names:
        raise OptionError("no way to train is named, such as scratch")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise OptionError(f"{name} stands there twice; name it once")
    return tuple(names)


def _ascending(given: Any) -> tuple[int, ...]:
    convert = integer(1, LARGEST_DEPTH)
    try:
        if isinstance(given, str) and "-" in given:
            first, last = (convert(part) for part in given.split("-"))
            found = tuple(range(first, last + 1))
        else:
            found = tuple(convert(part) for part in _items(given))
    except ValueError:
        return ()
    return found if all(a < b for a, b in pairwise(found)) else ()


def depths(given: Any) -> tuple[int, ...]:
    """Depths of a series: 2-4, or 2,3,4, or a list; or one."""
    found = _ascending(given)
    if not found:
        raise OptionError(
            f"{_shown(given)} is not a series: give ascending depths from 1 to "
            f"{LARGEST_DEPTH}, such as 2-4 or 2,3,4"
        )
    return found


def parents(given: Any) -> tuple[int, ...]:
    """Depths that larger ones are grown out of."""
    found = _ascending(given)
    if not found:
        raise OptionError(
            f"{_shown(given)} is no choice of parents: give ascending depths from 1 to "
            f"{LARGEST_DEPTH}, such as 10,13,17"
        )
    return found


def steps(given: Any) -> tuple[int, ...]:
    """Numbers of steps: one, or one for each depth."""
    convert = integer(1, 10_000_000)
    found = tuple(convert(part) for part in _items(given))
    if not found:
        raise OptionError("no number is named, such as 450,240,240")
    return found


def betas(given: Any) -> tuple[float, float]:
    """The two of Adam, below 1."""
    try:
        first, second = (number(0, _LARGEST_BETA)(part) for part in _items(given))
    except ValueError:
        raise OptionError(
            f"{_shown(given)} is not a pair of numbers from 0 to {_LARGEST_BETA}, such as 0.9,0.95"
        ) from None
    return first, second


def peak_flops(given: Any) -> float:
    """Operations a second, or the name of a device."""
    if isinstance(given, str) and given.lower() in PEAK_FLOPS:
        return PEAK_FLOPS[given.lower()]
    try:
        return number(1, 1e18)(given)
    except OptionError as error:
        raise OptionError(f"{error}, nor a device; {nearest(str(given), PEAK_FLOPS)}") from None
