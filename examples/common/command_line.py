"""Command lines: options out of dataclasses, YAML files below them, one line for a mistake.

A dataclass defines its options, once: a field is the option's name and default and, by `option`,
what it may be; the line of the docstring is its help. Words of the command line, values of files
and the arguments of the class itself are held to the same. Of what is said several times the last
holds, and the command line over files.

Only the standard library is imported, so that a missing package is reported like any mistake.
"""

import argparse
import inspect
import math
import re
from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UsageError

__all__ = [
    "CommandLine", "Kind", "OptionError", "check_fields", "choice", "integer", "items", "nearest",
    "number", "option", "optional", "path", "shortened", "text", "word_or",
]  # fmt: skip

# Makes a value of a word or of a file's value, or raises `OptionError`; its own values stay.
Kind = Callable[[Any], Any]

_LEAST = 2.0**-126  # what is closer to 0 loses digits in float32, or becomes 0
_MOST_SHOWN = 60
_NOTHING = ("none", "null")
# In the text of a field's type -> what stands for a value in the help; the first that is found.
_METAVARS = (("Path", "PATH"), ("tuple", "A,B"), ("int", "N"), ("float", "X"), ("", "NAME"))


class OptionError(argparse.ArgumentTypeError, ValueError):
    """What is wrong with a value: argparse expects the one, readers of files the other."""


def option(default: Any, kind: Kind, *, many: bool = False) -> Any:
    """A field of a dataclass that is an option; a field of type bool is a switch without it.

    Args:
        default: its value if it is not given.
        kind: what it may be.
        many: whether it takes several words, which become a tuple.
    """
    return field(default=default, metadata={"kind": kind, "many": many})


def check_fields(settings: Any) -> None:
    """Hold the fields of a dataclass to what its options may be.

    Raises:
        OptionError: one is not; the message begins with its name.
    """
    for each in fields(settings):
        if "kind" in each.metadata:
            value = getattr(settings, each.name)
            for part in value if each.metadata["many"] else (value,):
                try:
                    each.metadata["kind"](part)
                except OptionError as error:
                    raise OptionError(f"{each.name}: {error}") from None


def integer(low: int, high: int) -> Kind:
    """Whole numbers from ``low`` to ``high``."""

    def parse(given: Any) -> int:
        try:
            value = int(given) if type(given) in (int, str) else low - 1
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise OptionError(f"{shortened(given)} is not a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float, *, above: bool = False, or_zero: bool = False) -> Kind:
    """Numbers from ``low``, or ``above`` it, to ``high``, or 0 where that is allowed besides.

    Numbers other than 0 that float32 cannot hold with all its digits are refused everywhere.
    """

    def parse(given: Any) -> float:
        try:
            value = float(given) if type(given) in (int, float, str) else math.nan
        except (ValueError, OverflowError):
            value = math.nan
        if or_zero and value == 0:
            return 0.0
        if not low <= value <= high or (above and value == low):
            between = f"above {low:g} and up to" if above else f"from {low:g} to"
            other = ", nor 0" if or_zero else ""
            raise OptionError(f"{shortened(given)} is not a number {between} {high:g}{other}")
        if 0 < abs(value) < _LEAST:
            least = f"use at least {_LEAST:.3g}"
            raise OptionError(f"{shortened(given)} is closer to 0 than float32 can tell: {least}")
        return value + 0.0  # of -0.0 it makes 0.0

    return parse


def text(given: Any) -> str:
    """A word or more."""
    if not isinstance(given, str) or not given:
        raise OptionError(f"{given!r} is not a text")
    return given


def path(given: Any) -> Path:
    """A file or folder."""
    return given if isinstance(given, Path) else Path(text(given))


def choice(*names: str) -> Kind:
    """One of the names."""

    def parse(given: Any) -> str:
        if given not in names:
            listed = ", ".join(repr(name) for name in names)
            found = get_close_matches(str(given), names, 1)
            hint = f"; did you mean {found[0]}?" if found else ""
            raise OptionError(f"{given!r} is not one of {listed}{hint}")
        return str(given)

    return parse


def word_or(word: str, kind: Kind) -> Kind:
    """What another kind takes, or a word that stays as it is."""

    def parse(given: Any) -> Any:
        try:
            return word if given == word else kind(given)
        except OptionError as error:
            raise OptionError(f"{error}, nor '{word}'") from None

    return parse


def optional(kind: Kind) -> Kind:
    """What another kind takes, or "none", so that a file can be overruled."""

    def parse(given: Any) -> Any:
        return None if given is None or given in _NOTHING else kind(given)

    return parse


def items(given: Any) -> list[Any]:
    """The parts of a list, or of words with commas between them, or the one value."""
    if isinstance(given, str):
        return given.split(",")
    return list(given) if isinstance(given, (list, tuple)) else [given]


def nearest(word: str, names: Iterable[str]) -> str:
    """What to say to a word that is none of the names."""
    known = list(names)
    found = get_close_matches(word, known, 1)
    return f"did you mean {found[0]}?" if found else f"use {', '.join(known)}"


def shortened(given: Any) -> str:
    """A value as it was given, or its beginning if it is long."""
    shown = repr(given)
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."


class CommandLine(argparse.ArgumentParser):
    """The options of a program or of one of its modes.

    Args:
        program: its name, and the mode's if it has several.
        description: what it does.
        epilog: what comes after the options in the help.
        quick: what a switch --quick makes of the defaults, by the names of fields; empty for no
            such switch.
        rivals: pairs of fields of which one can hold: the last one said.
    """

    def __init__(
        self,
        program: str,
        description: str,
        epilog: str = "",
        *,
        quick: Mapping[str, Any] | None = None,
        rivals: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(
            prog=program,
            usage=f"{program} [options]",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._fallbacks: dict[str, Any] = {}
        self._in_files: dict[str, Kind | None] = {}
        self._quick = {} if quick is None else quick
        self._rivals = rivals
        if quick:
            self.add_switch(
                "--quick",
                "the whole path in under a minute: smaller defaults for the options that name a "
                "value with --quick",
            )

    def add_switch(self, name: str, meaning: str) -> None:
        """Add a switch that no file can set."""
        action = self.add_argument(
            name, action="store_true", default=SUPPRESS, help=f"{meaning} (default: off)"
        )
        self._fallbacks[action.dest] = False

    def add_settings_file(self) -> None:
        """Add --config and --print-config."""
        self.add_argument(
            "--config", action="append", type=path, default=SUPPRESS, metavar="FILE",
            help="YAML file of options, with underscores, such as examples/config.yaml; of several "
            "the later win, and the command line over all (default: none)",
        )  # fmt: skip
        self.add_switch("--print-config", "print all options as such a file and end")

    def add_settings(
        self,
        title: str,
        settings: type,
        *,
        defaults: Mapping[str, Any] | None = None,
        in_files: bool = True,
    ) -> None:
        """Add an option for each field of a dataclass.

        Args:
            title: of the options in the help.
            settings: the class.
            defaults: that differ from those of the class.
            in_files: whether files can set them.
        """
        group = self.add_argument_group(title)
        meanings = _meanings(settings)
        for each in fields(settings):
            default = (defaults or {}).get(each.name, each.default)
            kind: Kind | None = each.metadata.get("kind")
            shown = _in_words(default)
            if each.name in self._quick:
                shown += f", with --quick {_in_words(self._quick[each.name])}"
            meaning = f"{meanings.get(each.name, '')} (default: {shown})".replace("%", "%%")
            name = f"--{each.name.replace('_', '-')}"
            if kind is None:
                switch = argparse.BooleanOptionalAction if in_files else "store_true"
                group.add_argument(name, action=switch, default=SUPPRESS, help=meaning)
            else:
                metavar = next(shown for word, shown in _METAVARS if word in str(each.type))
                many: dict[str, Any] = {"nargs": "+"} if each.metadata["many"] else {}
                group.add_argument(
                    name, type=kind, default=SUPPRESS, metavar=metavar, help=meaning, **many
                )
            self._fallbacks[each.name] = default
            if in_files:
                self._in_files[each.name] = kind

    def parse(self, words: Sequence[str] | None) -> dict[str, Any]:
        """The value of every option, or the end of the program with status 2 and one line.

        Args:
            words: after the program's name and mode; ``None`` for those of this process.
        """
        found, unknown = self.parse_known_args(words)
        if unknown:
            self._refuse(unknown[0].split("=")[0], self._option_string_actions, "options")
        said = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(found).items()}
        values = {**self._fallbacks, **(self._quick if said.get("quick") else {})}
        for file in said.pop("config", ()):
            self._add(values, self._read(file), f"{file}: ")
        self._add(values, said, "argument --")
        return values

    def build(self, settings: Any, values: Mapping[str, Any]) -> Any:
        """An instance of a dataclass out of the values of its options.

        Args:
            settings: the class; an `OptionError` that it raises ends the program.
            values: those of `parse`.
        """
        try:
            return settings(**{each.name: values[each.name] for each in fields(settings)})
        except OptionError as error:
            name, _, what = str(error).partition(": ")
            self.error(f"argument --{name.replace('_', '-')}: {what}")

    def as_file(self, values: Mapping[str, Any]) -> str:
        """A settings file that says what the values say."""
        import yaml

        plain = {
            key: str(value) if isinstance(value, Path)
            else list(value) if isinstance(value, tuple) else value
            for key, value in ((key, values[key]) for key in self._in_files)
        }  # fmt: skip
        return str(yaml.safe_dump(plain, sort_keys=False))

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line."""
        line = " ".join(message.split())
        self.exit(2, f"error: {line}{'' if '--help' in line else ' (see --help)'}\n")

    def _refuse(self, word: str, known: Iterable[str], what: str, where: str = "") -> NoReturn:
        if what == "options" and not word.startswith("-"):
            hint = "options begin with --"
        else:
            hint = nearest(word, (name for name in known if name != "-h"))
        self.error(f"{where}there is no {word}; {hint if len(hint) < 80 else 'see --help'}")

    def _add(self, values: dict[str, Any], said: Mapping[str, Any], where: str) -> None:
        """Put what a file or the command line says over what was said before."""
        for pair in self._rivals:
            named = [key for key in pair if said.get(key) is not None]
            if len(named) > 1:
                first, second = (name.replace("_", "-") for name in pair)
                prefix = where if where.startswith("argument") else ""
                self.error(f"{where}{second}: not allowed with {prefix}{first}")
            if named:
                values.update(dict.fromkeys(pair))
        values.update(said)

    def _read(self, file: Path) -> dict[str, Any]:
        """The options that a file names."""
        from common.plain_files import read_yaml

        try:
            content = read_yaml(file, remedy="name another")
        except UsageError as error:
            self.error(str(error))
        if not isinstance(content, dict):
            self.error(f"{file}: holds no options; write them as name: value, one a line")
        return {key: self._value(file, key, value) for key, value in content.items()}

    def _value(self, file: Path, key: Any, value: Any) -> Any:
        if key not in self._in_files:
            if key in self._fallbacks or key == "config":
                self.error(f"{file}: {key} goes on the command line only")
            self._refuse(str(key), self._in_files, "names", f"{file}: ")
        kind, default = self._in_files[key], self._fallbacks[key]
        has_rival = any(key in pair for pair in self._rivals)  # which may be named in its place
        if value is None and default is not None and not has_rival:
            self.error(f"{file}: {key}: it has no value; its default is {default}")
        if kind is None:
            if not isinstance(value, bool):
                self.error(f"{file}: {key}: {value!r} is neither true nor false")
            return value
        try:
            return kind(value)
        except OptionError as error:
            self.error(f"{file}: {key}: {error}")


def _meanings(settings: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each field."""
    arguments = (inspect.getdoc(settings) or "").partition("Args:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE)
    return {
        name: " ".join(said.split()).rstrip(".").replace("``", "").replace("None", "none")
        for name, said in found
    }


def _in_words(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
