"""What the examples' command lines share: one line for a mistake, and numbers within bounds."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["OptionError", "Parser", "integer", "number", "shortened"]

_LEAST = 2.0**-126  # what is closer to 0 loses digits in float32, or becomes 0
_MOST_SHOWN = 60


class OptionError(argparse.ArgumentTypeError, ValueError):
    """What is wrong with a value: argparse expects the one, readers of files the other."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line (argparse prints the usage as well)."""
        self.exit(2, f"error: {message} (see --help)\n")


def integer(low: int, high: int) -> Callable[[Any], int]:
    """Return a type for whole numbers from ``low`` to ``high``, as words or as numbers."""

    def parse(given: Any) -> int:
        try:
            value = int(given) if type(given) in (int, str) else low - 1
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise OptionError(f"{shortened(given)} is not a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[Any], float]:
    """Return a type for numbers from ``low``, or ``above`` it, to ``high``.

    Numbers other than 0 that float32 cannot hold with all its digits are refused everywhere.
    """

    def parse(given: Any) -> float:
        try:
            value = float(given) if type(given) in (int, float, str) else math.nan
        except (ValueError, OverflowError):
            value = math.nan
        if not low <= value <= high or (above and value == low):
            kind = f"above {low:g}" if above else f"from {low:g}"
            limit = f" and up to {high:g}" if above else f" to {high:g}"
            raise OptionError(f"{shortened(given)} is not a number {kind}{limit}")
        if 0 < abs(value) < _LEAST:
            least = f"use at least {_LEAST:.3g}"
            raise OptionError(f"{shortened(given)} is closer to 0 than float32 can tell: {least}")
        return value + 0.0  # of -0.0 it makes 0.0

    return parse


def shortened(given: Any) -> str:
    """A value as it was given, or its beginning if it is long."""
    text = repr(given)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
