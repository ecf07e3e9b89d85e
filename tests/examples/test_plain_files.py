"""Readers of files: whatever a file holds, they give its value or one line that says what to do."""

import contextlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest

from analysis.bundle import load_bundle
from analysis.records import read_metrics
from common.checkpoint_file import load_checkpoint
from common.command_line import CommandLine, option, text
from common.errors import DamagedError, UsageError
from common.plain_files import open_file, read_csv, read_json, read_text, read_yaml
from continual.digit_tasks import Settings
from continual.digits_results import check_folder as check_digits_folder
from corpus.sources import open_source
from corpus.tokenizer import choose_tokenizer, load_tokenizer
from trainer.series_run import check_folder as check_series_folder
from trainer.settings import SeriesConfig
from trainer.step_log import read_log

_DEEP = 20_000
_DIGITS = "9" * 5_000

READERS: dict[str, Callable[..., Any]] = {
    "text": read_text, "json": read_json, "yaml": read_yaml, "csv": read_csv,
}  # fmt: skip

# What a file may hold -> the readers that refuse it; the others take it.
DAMAGES: dict[str, tuple[bytes, set[str]]] = {
    "no UTF-8": (b'{"a": "\xff\xfe"}', {"text", "json", "yaml", "csv"}),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), {"text", "json", "yaml", "csv"}),
    "empty": (b"", {"json"}),
    "cut": (b'{"a": [1, 2', {"json", "yaml"}),
    "NUL": (b'{"a": "\x00"}', {"json", "yaml"}),
    "nested lists": (b"[" * _DEEP + b"]" * _DEEP, {"json", "yaml"}),
    "nested objects": (b'{"a": ' * _DEEP + b"1" + b"}" * _DEEP, {"json", "yaml", "csv"}),
    "a number of 5,000 digits": (f'{{"a": {_DIGITS}}}'.encode(), {"json", "yaml"}),
    "half a character": (b'{"a": "\\ud800"}', {"json", "yaml"}),
    "half a character as a key": (b'{"\\udcff": 1}', {"json", "yaml"}),
    "a date that is none": (b"a: 2024-99-99", {"json", "yaml"}),
    "a tag's argument": (b"a: !!timestamp x", {"json", "yaml"}),
    "another tag's": (b"a: !!bool x", {"json", "yaml"}),
    "a Python object": (b"!!python/object/apply:os.getcwd []", {"json", "yaml"}),
    "an alias inside of itself": (b"&a [*a]", {"json", "yaml"}),
    "a few lines of billions": (
        b"a: &a [0,0,0,0,0,0,0,0,0]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9))
                   for c in b"bcdefghij"),
        {"json", "yaml"},
    ),
    "a cell of 200,000 characters": (b"a,b\n" + b"x" * 200_000 + b",1\n", {"json", "csv"}),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_damaged_content_is_one_line(reader: str, damage: str, tmp_path: Path) -> None:
    content, refusing = DAMAGES[damage]
    path = tmp_path / "file"
    path.write_bytes(content)
    if reader not in refusing:
        READERS[reader](path, remedy="name another")
        return
    with pytest.raises(DamagedError) as refused:
        READERS[reader](path, remedy="name another")
    line = str(refused.value)
    assert line.startswith(f"{path} is ")
    assert line.endswith(": name another")
    assert line.isprintable()
    assert len(line) < len(str(path)) + 300


def unreadable(kind: str, folder: Path) -> Path:
    """A path of which nothing can be read."""
    path = folder / "file"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a NUL in the name":
        path = folder / "a\0b"
    elif kind == "half a character in the name":
        path = folder / "a\ud800b"
    elif kind == "a name too long":
        path = folder / ("x" * 300)
    return path


UNREADABLE = (
    "absent", "a folder", "a pipe", "a link to a device", "a link to itself", "a NUL in the name",
    "half a character in the name", "a name too long",
)  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_read_is_one_line_at_once(reader: str, kind: str, tmp_path: Path) -> None:
    path = unreadable(kind, tmp_path)
    with pytest.raises(UsageError) as refused:
        READERS[reader](path, remedy="name another", label="--file X")
    assert not isinstance(refused.value, DamagedError)  # nothing is known of its content
    assert str(refused.value).startswith("--file X cannot be read (")
    assert str(refused.value).endswith("): name another")


def test_whole_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b'{"a": [1, 2.5, "\\ud83d\\ude00"]}')
    assert read_json(path, remedy="x") == {"a": [1, 2.5, "😀"]}
    path.write_bytes(b"a: &x {b: 1}\nc: [*x, *x]\n")
    assert read_yaml(path, remedy="x") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}
    path.write_bytes(b'a,b\n1,"x\ny"\n2\n')
    assert read_csv(path, remedy="x") == [{"a": "1", "b": "x\ny"}, {"a": "2", "b": None}]
    link = tmp_path / "link"
    link.symlink_to(path)
    with open_file(link) as file:
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        assert file.read(3) == b"a,b"


TWICE = {
    "at the top": ("lr: 1\nseed: 2\nlr: 3\n", "lr", 3),
    "inside": ("a:\n- b: {c: 1,\n   c: 2}\n", "c", 3),
    "as numbers": ("1: a\n0x1: b\n", "0x1", 2),
    "quoted": ("lr: 1\n'lr': 1\n", "lr", 2),
    "behind a merge": ("a: &a {b: 1}\nc:\n  <<: *a\n  d: 1\n  d: 2\n", "d", 5),
    "in the second merge": ("a: &a {b: 1, b: 2}\nc: {<<: *a}\n", "b", 1),
    "in a set": ("!!set\n? a\n? a\n", "a", 3),
}


@pytest.mark.parametrize("kind", TWICE)
def test_a_key_that_stands_twice_is_refused(kind: str, tmp_path: Path) -> None:
    text, key, line = TWICE[kind]
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(DamagedError) as refused:
        read_yaml(path, remedy="remove one")
    said = f"{key} stands there twice, again in line {line}"
    assert str(refused.value) == f"{path} is not YAML ({said}): remove one"


def test_what_a_merge_brings_may_be_overruled(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: &a {b: 1, c: 2}\nd: &d {<<: *a, b: 3}\ne: {<<: [*a, *d], c: 4}\n")
    found = read_yaml(path, remedy="x")
    assert found["d"] == {"b": 3, "c": 2}
    assert found["e"] == {"b": 1, "c": 4}


@pytest.mark.parametrize("text", ['{"a": 1, "b": 2, "a": 3}', '[{"b": {"a": 1, "a": 1}}]'])
def test_a_name_that_stands_twice_in_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(DamagedError, match=r"is not JSON \(a stands there twice\): remove one"):
        read_json(path, remedy="remove one")


# Who reads files of each kind for the programs; each refuses a damaged one, or does without it.


def _options(path: Path) -> None:
    line = CommandLine("x", "")
    line.add_settings_file()
    line.add_settings("files", make_dataclass("Options", [("a", str, option("", text))]))
    try:
        line.parse(["--config", str(path)])
    except SystemExit:  # the mistake was said
        raise UsageError from None


def _config(path: Path) -> None:
    check_series_folder(path.parent, SeriesConfig(), None)


def _bundle(path: Path) -> None:
    (path.parent / "eval_meta_data.csv").write_text("Eval Task,Random baseline\na,0\n")
    load_bundle(path.parent)


def _items(path: Path) -> None:
    entry = {"label": "a", "dataset_uri": "../file", "num_fewshot": [0]}
    content = {"icl_tasks": [{**entry, "icl_task_type": "language_modeling"}]}
    (path.parent / "core.yaml").write_text(json.dumps(content))
    (path.parent / "eval_data").mkdir(exist_ok=True)
    (path.parent / "eval_meta_data.csv").write_text("Eval Task,Random baseline\na,0\n")
    load_bundle(path.parent)


def _baselines(path: Path) -> None:
    (path.parent / "core.yaml").write_text("icl_tasks: []")
    load_bundle(path.parent)


def _rows(path: Path) -> None:
    list(open_source(str(path), "a").pieces())


PROGRAMS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "--config": ("file.yaml", _options),
    "config.json": ("config.json", _config),
    "metrics.json": ("metrics.json", lambda path: read_metrics([path])),
    "results.json": ("results.json", lambda path: check_digits_folder(path.parent, Settings())),
    "core.yaml": ("core.yaml", _bundle),
    "eval_meta_data.csv": ("eval_meta_data.csv", _baselines),
    "items": ("file", _items),
    "rows.jsonl": ("rows.jsonl", _rows),
    "rows.csv": ("rows.csv", _rows),
    "rows.parquet": ("rows.parquet", _rows),
    "tokenizer": ("tokenizer.json", load_tokenizer),
    "--tokenizer": ("tokenizer.json", lambda path: choose_tokenizer(str(path))),
    "checkpoint": ("a.pt", lambda path: load_checkpoint(path, remedy="name another")),
    "log": ("log.csv", read_log),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_meets_more_than_one_line(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, read = PROGRAMS[program]
    for damage, (content, _) in DAMAGES.items():
        folder = tmp_path / damage
        folder.mkdir()
        (folder / name).write_bytes(content)
        with contextlib.suppress(UsageError):
            read(folder / name)
    for kind in ("a folder", "a pipe", "a link to a device", "a link to itself"):
        folder = tmp_path / kind
        folder.mkdir()
        unreadable(kind, folder).rename(folder / name)
        with contextlib.suppress(UsageError):
            read(folder / name)
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith(("error: ", "warning: "))
