"""Numbers on command lines: each numeric option of each program, and what it makes of bad ones."""

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest

import analyze
import stability
from common.command_line import CommandLine, OptionError, integer, number
from common.errors import UsageError
from continual import digits_options
from experiment import experiment_run
from stress import steady_options, stress_options
from trainer import arguments
from trainer.arms import parse_arm

FLOAT32_LEAST = 2.0**-126
FLOAT32_MOST = 2.0**128 * (1 - 2**-24)

PROGRAMS: dict[str, Callable[[list[str]], Any]] = {
    "miniseries.py": arguments.parse_arguments,
    "plan": arguments.parse_plan,
    "sample": arguments.parse_sample,
    "analyze.py": analyze.parse_arguments,
    "continual_digits.py": digits_options.parse_options,
    "inheritance.py": experiment_run.parse_options,
    "narcissus.py": stress_options.parse_options,
    "steady.py": steady_options.parse_options,
    "stability.py": stability.main,
}

# Option -> what is inside of its range at either end, and what is just outside. Those of `plan` are
# those of miniseries.py and its own.
LIMITS: dict[str, tuple[list[str], list[str]]] = {
    "--ewc-strength": (["0", "1e-37", "1e12"], ["-1", "1.1e12"]),
    "--subspace-strength": (["0", "1e-37", "1e12"], ["-1", "1.1e12"]),
    "--distill-strength": (["0", "1e-37", "1e12"], ["-1", "1.1e12"]),
    "--distill-temperature": (["0.01", "2", "1000"], ["0", "-1", "0.0099", "1e-30", "1001"]),
    "--fisher-samples": (["1", "1000000"], ["0", "1000001", "1.5"]),
    "--eval-windows": (["1", "10000000"], ["0", "10000001"]),
    "--curve-windows": (["1", "10000000"], ["0", "10000001"]),
    "--curve-points": (["1", "100000"], ["0", "100001"]),
    "--depths": (["1", "20", "1-20"], ["0", "21", "1.5", "2-1", "2x1", "2x8193", "21x8", "x8"]),
    "--parents": (["1", "20"], ["0", "21", "1.5"]),
    "--width-per-depth": (["2", "1024"], ["1", "1025", "64.0"]),
    "--head-dim": (["2", "1024"], ["1", "1025"]),
    "--shares": (["1e-37", "10", "0.2,10"], ["0", "10.1", "0.2,0.2", "0.3,0.2"]),
    "--scratch-shares": (["1e-37", "1", "0.2,1"], ["0", "1.1", "1,1"]),
    "--lineage": (["1e-37", "10", "0.2,10"], ["0", "10.1", "0.2,0.2", "0.3,0.2"]),
    "--grow-at": (["1e-37", "1"], ["0", "1.1"]),
    "--steps": (["1", "10000000", "1,2,3"], ["0", "10000001", "1.5"]),
    "--ratio": (["1e-37", "1000"], ["0", "1001"]),
    "--batch-size": (["1", "4096"], ["0", "4097", "1.5"]),
    "--sequence-len": (["8", "8192"], ["7", "70000", "8.5"]),
    "--lr": (["1e-37", "1"], ["0", "1.1"]),
    "--muon-lr": (["1e-37", "1"], ["0", "1.1"]),
    "--muon-adamw-lr": (["1e-37", "1"], ["0", "1.1"]),
    "--rate-exponent": (["0", "0.5", "1"], ["-0.1", "1.1"]),
    "--weight-decay": (["0", "10"], ["-0.1", "10.1"]),
    "--betas": (["0,0", "0.999999,0.999999"], ["-0.1,0.9", "0.9,1", "0.9,0.9999999999", "0.9"]),
    "--max-grad-norm": (["0", "1e12"], ["-1", "1.1e12"]),
    "--warmup-steps": (["0", "10000000"], ["-1", "10000001"]),
    "--cooldown": (["1e-37", "0.9"], ["0", "1"]),
    "--seed": (["0", "4294967295"], ["-1", "4294967296"]),
    "--threads": (["1", "1024"], ["0", "1025"]),
    "--device-batch-size": (["1", "4096"], ["0", "4097"]),
    "--keep": (["1", "1000"], ["0", "1001"]),
    "--checkpoint-seconds": (["0", "86400"], ["-1", "86401"]),
    "--peak-flops": (["1", "1e18"], ["0", "0.9", "1.1e18"]),
    "--mfu": (["1e-37", "1"], ["0", "1.1"]),
    "--devices": (["1", "1000000"], ["0", "1000001"]),
    "--price": (["0", "1e6"], ["-1", "1.1e6"]),
    "--tokens": (["1", "1000000"], ["0", "1000001"]),
    "--temperature": (["0", "0.001", "100"], ["-1", "0.0009", "1e-30", "101"]),
    "--top-k": (["1", "1000000"], ["0", "1000001"]),
    "--count": (["1", "1000"], ["0", "1001"]),
    "--bootstraps": (["0", "100000"], ["-1", "100001"]),
    "--max-per-task": (["1", "1000000000"], ["0", "1000000001"]),
    "--seeds": (["1", "100"], ["0", "1001"]),
    "--tasks": (["2", "100"], ["1", "101"]),
    "--epochs": (["1", "1000"], ["0", "1001"]),
    "--first-seed": (["0", "2147483648"], ["-1", "2147483649"]),
    "--minutes": (["1e-37", "1e6"], ["0", "1.1e6"]),
    "--workers": (["1", "256"], ["0", "257"]),
}
HOSTILE = [
    "nan", "-nan", "inf", "-inf", "infinity", "1e400", "-1e400", "1e308", "1e39", "1e-320",
    "-1e-320", "5e-324", "1e-45", "1e-39", "-1e-30", "9" * 5000, "0x10", "1e", "--1", "1,", ",1",
    "", " ", "true", "None", "1j", "1/2", "½", "٣٫٥", "1\x00",
]  # fmt: skip


class _CaughtError(Exception):
    """The parser is complete."""


def parser_of(program: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a program makes, caught where it is first used."""
    caught: list[argparse.ArgumentParser] = []

    def catch(self: argparse.ArgumentParser, *_: Any) -> None:
        caught.append(self)
        raise _CaughtError

    monkeypatch.setattr(CommandLine, "parse", catch)
    monkeypatch.setattr(CommandLine, "parse_args", catch)
    with pytest.raises(_CaughtError):
        PROGRAMS[program]([])
    return caught[0]


def numbers_in(value: Any) -> list[float]:
    parts = value if isinstance(value, tuple) else (value,)
    return [part for part in parts if isinstance(part, (int, float))]


def converted(action: argparse.Action, word: str) -> Any:
    """What an option makes of a word; `OptionError` if it is refused."""
    assert callable(action.type)
    try:
        return action.type(word)
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        raise OptionError(str(error)) from None


def taken(action: argparse.Action, word: str) -> Any:
    """What an option makes of a word; ``None`` if it is refused."""
    try:
        return converted(action, word)
    except OptionError as refused:
        said = str(refused)
    assert len(said) < 200
    return None


def numeric(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options that make a number of some word."""
    for action in parser._actions:
        for word in ("1", "2", "8", "0.5", "0.5,0.5"):
            if not callable(action.type) or action.type is str:
                break
            try:
                found = numbers_in(converted(action, word))
            except OptionError:
                continue
            if found:
                yield action
                break


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_numeric_option_keeps_to_its_range(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for action in numeric(parser_of(program, monkeypatch)):
        (name,) = action.option_strings
        inside, outside = LIMITS[name]  # a new option has to be added there
        for word in inside:
            found = numbers_in(converted(action, word))
            if "-" not in word:
                wanted = [float(part) for part in word.split(",")]
                assert found == wanted
        for word in outside:
            with pytest.raises(OptionError) as refused:
                converted(action, word)
            assert len(str(refused.value)) < 200
        for word in chain(HOSTILE, (f"{word},{word}" for word in HOSTILE)):
            for value in numbers_in(taken(action, word)):
                assert value == 0 or FLOAT32_LEAST <= value <= FLOAT32_MOST, (name, word)
                assert math.copysign(1, value) == 1


def test_every_limit_is_an_option_of_some_program(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for program in PROGRAMS:
        with monkeypatch.context() as patch:
            actions = numeric(parser_of(program, patch))
            found |= {name for action in actions for name in action.option_strings}
    assert found == LIMITS.keys()


@pytest.mark.parametrize("word", [*HOSTILE, "-0.0", "-1", "1.1e12"])
def test_strengths_in_the_names_of_arms(word: str) -> None:
    if word == "-0.0":
        assert parse_arm(f"grown+ewc={word}").name == "grown+ewc=0"
        return
    with pytest.raises(UsageError, match=r"^--arms grown\+ewc=.*: ewc takes a strength from 0 to"):
        parse_arm(f"grown+ewc={word}")


def test_an_arm_keeps_all_digits_of_its_strength() -> None:
    for value in (0.1, 1.23456789, 1e-37, 0.30000000000000004, 123456789.0, 1e6, 1e12):
        for word in (f"grown+ewc={value!r}", f"grown+ewc={value:.17e}+ars"):
            arm = parse_arm(word)
            assert parse_arm(arm.name) == arm
            assert arm.parts == (("ewc", value),)
    assert parse_arm("grown+ewc=0.50").name == "grown+ewc=0.5"


def test_values_of_files_are_held_to_the_same() -> None:
    for given in (True, None, [1], {"a": 1}, math.nan, math.inf, 10**400, -(10**400), 1e-320):
        with pytest.raises(OptionError) as refused:
            number(0, 1e12)(given)
        assert len(str(refused.value)) < 200
    for given in (True, None, 1.0, 10**400):
        with pytest.raises(OptionError):
            integer(0, 10)(given)
