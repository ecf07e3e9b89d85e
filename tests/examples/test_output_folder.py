"""The output folder: one program at a time writes to it, and notices when it is gone."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from filelock import FileLock
from small_series import TINY, Series, Stop

import analysis.run_report
import analyze
import continual.digits_results
import continual_digits
import miniseries
import narcissus
import stability
import stress.oscillation
from common.errors import UsageError
from common.output_folder import LOCK_FILE, OutputFolder
from trainer import series_report

HELD = "is being written to by another run: wait for it to end"
GONE = "was removed or replaced while it was written to"

Program = Callable[[list[str]], int]

PROGRAMS: dict[str, tuple[Program, list[str]]] = {
    "miniseries": (miniseries.main, [*TINY, "--data", "text.txt"]),
    "continual_digits": (continual_digits.main, ["--methods", "none", "--quick"]),
    "narcissus": (narcissus.main, ["--oscillation", "--seeds", "1"]),
    "stability": (stability.main, []),
    "analyze": (analyze.main, ["--metrics", "metrics.json", "--bootstraps", "0"]),
}


@pytest.fixture(autouse=True)
def _surroundings(own_folder: None, text: Path) -> None:
    shutil.copy(text, "text.txt")
    Path("metrics.json").write_text(
        '[{"name": "d1-scratch", "depth": 1, "arm": "scratch", "parent": null, "params": 10,'
        ' "tokens": 10, "flops": 600, "lineage_flops": 600, "seconds": 1.0, "val_bpb": 2.0,'
        ' "seed": 0}]'
    )


def ended(program: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a program that does not get to its end; return its last line."""
    main, words = PROGRAMS[program]
    assert main([*words, "--out", "out"]) == 2
    printed = capsys.readouterr()
    assert "Results are in" not in printed.out
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in printed.err
    return last


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_second_run_is_refused(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with OutputFolder(Path("out")) as other:
        other.hold()
        assert f"out {HELD}" in ended(program, capsys)
        assert os.listdir("out") == [LOCK_FILE]
        other.check()
    assert not Path("out").exists()


def test_what_was_made_for_a_refused_run_is_taken_away() -> None:
    for inner in ("new", "old/new"):
        Path("old").mkdir(exist_ok=True)
        with suppress(UsageError), OutputFolder(Path(inner)) as output:
            output.hold()
            assert Path(inner, LOCK_FILE).exists()
            raise UsageError
        assert not Path(inner).exists()
    assert os.listdir("old") == []
    with OutputFolder(Path("old")) as output:
        output.hold()
        Path("old/result").write_text("")
    assert os.listdir("old") == ["result"]


def test_a_killed_run_holds_nothing() -> None:
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from common.output_folder import OutputFolder\n"
        "with OutputFolder(Path('out')) as output:\n"
        "    output.hold()\n"
        "    Path('begun').write_text('')\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        while not Path("begun").exists():
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(UsageError, match=HELD), OutputFolder(Path("out")) as output:
            output.hold()
        process.kill()
    assert os.listdir("out") == [LOCK_FILE]
    with OutputFolder(Path("out")) as output:
        output.hold()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: FileLock, **_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with OutputFolder(Path("out")) as output:
        output.hold()
        output.check()
    assert capsys.readouterr().err.startswith("warning: out is on a file system without locks")


def _remove(*_: Any) -> None:
    shutil.rmtree("out")


def _replace(*_: Any) -> None:
    shutil.rmtree("out")
    with OutputFolder(Path("out")) as other:
        other.hold()
        shutil.copytree("out", "other")  # as another run would leave it while it goes on
    Path("other").rename("out")


def after(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, then: Callable[..., None]
) -> None:
    """Let a function of a module be followed by something else."""
    original = getattr(module, name)

    def call(*given: Any, **named: Any) -> Any:
        result = original(*given, **named)
        then()
        return result

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("happens", [_remove, _replace])
@pytest.mark.parametrize(
    ("program", "module", "name"),
    [
        ("miniseries", series_report, "write_metrics"),
        ("miniseries", series_report, "write_report"),
        ("continual_digits", continual.digits_results, "run_tasks"),
        ("narcissus", stress.oscillation, "write_atomically"),
        ("analyze", analysis.run_report, "write_json"),
        ("stability", matplotlib.figure.Figure, "savefig"),
    ],
)
def test_a_folder_that_goes_is_noticed(
    program: str,
    module: Any,
    name: str,
    happens: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name != "write_report":
        monkeypatch.setattr(series_report, "write_report", lambda *_: "")
    after(monkeypatch, module, name, happens)
    line = ended(program, capsys)
    assert GONE in line or "removed or replaced meanwhile" in line


@pytest.mark.parametrize("happens", [_remove, _replace])
def test_a_folder_that_goes_while_a_model_trains(
    series: Series, happens: Callable[..., None]
) -> None:
    class Then(Stop):
        @property
        def requested(self) -> bool:
            if self._left == 3:
                happens()
            return super().requested

    with pytest.raises(UsageError, match=GONE):
        series(Path("out"), Then(9), "--checkpoint-seconds", "0")


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "make room there and run the same command again"),
        (errno.EROFS, "make it writable and run the same command again"),
        (errno.EACCES, "make it writable and run the same command again"),
        (errno.EIO, "mend that and run the same command again"),
    ],
)
def test_a_disk_that_takes_no_more(
    code: int, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    line = ended("continual_digits", capsys)
    assert line == f"error: writing to out failed ({os.strerror(code)}): {remedy}" + (
        "" if code == errno.EIO else ", or name another folder with --out"
    )
