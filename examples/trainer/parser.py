"""Command lines with YAML files below them: what is said last wins, a mistake is one line."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from trainer.errors import UsageError
from trainer.reading import read_yaml
from trainer.values import nearest

__all__ = ["OptionParser"]

_FILE = "--config"


class OptionParser(ArgumentParser):
    """A parser of `jsonargparse` whose errors are one line that names what exists.

    Args:
        prog: the program, and its mode if it has several.
        description: what it does.
        epilog: what comes after the options.
    """

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} [options]",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            print_config=None,
        )
        self._on_command_line_only: set[str] = set()
        self._rivals: tuple[str, ...] = ()
        self.reading: Path | None = None

    def add_settings_file(self) -> None:
        """Add --config and --print-config."""
        self.add_argument(
            _FILE,
            action=_SettingsFile,
            metavar="FILE",
            help="YAML file of options, with underscores, such as examples/config.yaml; of several "
            "the later win, and the command line over all (default: none)",
        )
        self._on_command_line_only.add("config")
        self.add_command_switch(
            "--print-config", "print all options as such a file and end (default: off)"
        )

    def add_command_switch(self, name: str, meaning: str) -> None:
        """Add a switch that files cannot set."""
        action = self.add_argument(name, action="store_true", help=meaning)
        self._on_command_line_only.add(action.dest)

    def add_command_option(
        self, name: str, convert: Callable[[Any], Any], default: Any, metavar: str, meaning: str
    ) -> None:
        """Add an option that files cannot set.

        Args:
            name: of the option.
            convert: its type.
            default: its value if it is not given.
            metavar: stands for a value.
            meaning: one line for --help, with the default.
        """
        action = self.add_argument(
            name, type=convert, default=default, metavar=metavar, help=meaning
        )
        self._on_command_line_only.add(action.dest)

    def set_rivals(self, *keys: str) -> None:
        """Let at most one of these options hold: the last one said."""
        self._rivals = keys

    def file_keys(self) -> list[str]:
        """The names that a file may set."""
        return [key for key in vars(self.get_defaults()) if key not in self._on_command_line_only]

    def parse_words(self, words: Sequence[str]) -> Namespace:
        """Parse a command line; files first, wherever in it they stand.

        Args:
            words: after the program's name and mode.
        """
        files: list[str] = []
        others: list[str] = []
        remaining = iter(words)
        for word in remaining:
            if word == _FILE:
                files += [word, *[value for value in [next(remaining, None)] if value is not None]]
            else:
                (files if word.startswith(f"{_FILE}=") else others).append(word)
        named = {word.split("=")[0].removeprefix("--") for word in others}
        said = self._said([key for key in self._rivals if key in named], "argument --")
        found: Namespace = self.parse_args([*files, *others])
        self._silence(found, said)
        return found

    def _said(self, rivals: Sequence[str], prefix: str = "") -> str | None:
        """The one of the rivals that is said, if any."""
        if len(rivals) > 1:
            first, second = rivals[:2]
            self.error(f"{prefix}{second}: not allowed with {prefix}{first}")
        return rivals[0] if rivals else None

    def _silence(self, found: Namespace, said: str | None) -> None:
        if said is not None:
            for key in self._rivals:
                if key != said:
                    found[key] = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2 and one line.

        Args:
            message: what is wrong.
            ex: what was raised.
        """
        line = " ".join(str(message).split()).removeprefix("Validation failed: ")
        line = re.sub(r'^Parser key "(\w+)":', r"\1:" if self.reading else r"argument \1:", line)
        unknown = re.fullmatch(r"unrecognized arguments: (.*)", line)
        if unknown:
            word = unknown[1].split()[0].split("=")[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            hint = nearest(word, known) if word.startswith("-") else "options begin with --"
            line = f"there is no {word}; {hint if len(hint) < 80 else 'see --help'}"
        where = f"{self.reading}: " if self.reading else ""
        self.exit(2, f"error: {where}{line}{'' if '--help' in line else ' (see --help)'}\n")

    def read_file(self, path: Path) -> Namespace:
        """The checked options of a YAML file, and no others.

        Args:
            path: of the file.
        """
        self.reading = path
        try:
            content = read_yaml(path, remedy="name another")
        except UsageError as error:
            self.reading = None  # it is named already
            self.error(str(error))
        if not isinstance(content, dict):
            self.error("holds no options; write them as name: value, one a line")
        for key, value in content.items():
            self._check_key(str(key), value)
        checked: Namespace = self.parse_object(content, defaults=False)
        rivals = [key for key in self._rivals if content.get(key) is not None]
        self._silence(checked, self._said(rivals))
        self.reading = None
        return checked

    def _check_key(self, key: str, value: Any) -> None:
        keys = self.file_keys()
        if key in self._on_command_line_only:
            self.error(f"{key} goes on the command line only")
        if key not in keys:
            hint = nearest(key, keys)
            self.error(f"there is no {key}; {hint if len(hint) < 80 else 'see --help'}")
        if isinstance(self.get_default(key), bool) and not isinstance(value, bool):
            self.error(f"{key}: {value!r} is neither true nor false")
        if value is None and self.get_default(key) is not None:
            self.error(f"{key}: it has no value; its default is {self.get_default(key)}")


class _SettingsFile(argparse.Action):
    """Puts the options of a file into what has been parsed so far."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Any,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, OptionParser)
        namespace.update(parser.read_file(Path(values)))
