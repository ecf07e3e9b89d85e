"""What the examples' command lines share: one line for a mistake, and numbers within bounds."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["OptionError", "Parser", "integer", "number"]


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
            raise OptionError(f"{given!r} is not a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float, *, above: bool = False) -> Callable[[Any], float]:
    """Return a type for numbers from ``low``, or ``above`` it, to ``high``."""

    def parse(given: Any) -> float:
        try:
            value = float(given) if type(given) in (int, float, str) else math.nan
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            kind = f"above {low:g}" if above else f"from {low:g}"
            limit = f" and up to {high:g}" if above else f" to {high:g}"
            raise OptionError(f"{given!r} is not a number {kind}{limit}")
        return value

    return parse
