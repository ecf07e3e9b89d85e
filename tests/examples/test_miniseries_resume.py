"""Interrupted and resumed is the same, bit for bit, as never interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import miniseries
from trainer import report
from trainer import train as train_module
from trainer.cli import parse_arguments
from trainer.errors import RunInterruptedError, UsageError
from trainer.log import read_log
from trainer.prepare import prepare
from trainer.report import markdown_table
from trainer.series import run_series
from trainer.signals import StopRequest

SCRIPT = Path(miniseries.__file__)
TINY = [
    "--depths", "1,2", "--batch-size", "2", "--sequence-len", "16", "--fisher-samples", "3",
    "--ewc-strength", "1", "--threads", "1", "--steps", "8",
]  # fmt: skip
LONG = "60"  # enough steps for a signal to arrive in the middle of a model


class _KilledError(BaseException):
    """Stands for a kill: nothing is saved on the way out."""


class _Stop(StopRequest):
    """Asks to stop, or kills, after a number of training steps."""

    def __init__(self, step: int, *, kill: bool = False) -> None:
        super().__init__()
        self._left = step
        self._kill = kill

    @property
    def requested(self) -> bool:
        """Read by the loop once a step."""
        self._left -= 1
        if self._left == 0 and not self._kill:
            self._handle(signal.SIGTERM, None)
        return super().requested

    def check(self) -> None:
        if self._kill and self._left <= 0:
            raise _KilledError
        super().check()


Series = Callable[..., tuple[str, bool]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    words = [bytes(torch.randint(97, 123, (4,), generator=generator).tolist()) for _ in range(20)]
    picks = torch.randint(0, 20, (4000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b" ".join(words[i] for i in picks))
    return path


@pytest.fixture(scope="module")
def series(text: Path) -> Iterator[Series]:
    threads = torch.get_num_threads()

    def run(out: Path, stop: StopRequest | None = None, *words: str) -> tuple[str, bool]:
        arguments = parse_arguments([*TINY, "--data", str(text), "--out", str(out), *words])
        config, corpus = prepare(arguments)
        torch.manual_seed(time.monotonic_ns())  # nothing may depend on the global state
        with pytest.MonkeyPatch.context() as patch:
            # The figures are tested elsewhere, and drawing them takes longer than training here.
            patch.setattr(report, "write_report", lambda _, records, __: markdown_table(records))
            return run_series(arguments.out, config, corpus, stop or StopRequest())

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(series: Series, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("straight")
    series(folder)
    return results(folder)


@pytest.fixture(scope="module")
def long_straight(series: Series, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("long")
    series(folder, None, "--steps", LONG)
    return results(folder)


def results(folder: Path) -> dict[str, Any]:
    """Everything a run produced, but for the times."""
    records = json.loads((folder / "metrics.json").read_text())
    for record in records:
        record.pop("seconds")
    logs = {}
    for path in folder.glob("log_*.csv"):
        rows = read_log(path)
        for row in rows:
            row.pop("seconds")
        logs[path.name] = rows
    models = {
        path.name: _bits(torch.load(path, weights_only=True)["model"])
        for path in (folder / "checkpoints").iterdir()
    }
    return {"records": records, "logs": logs, "models": models}


def _bits(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: value.view(torch.int32).flatten().tolist() for name, value in state.items()}


# d1 trains 10 steps and d2-inherited 10: within a trunk, at its end, at the end of a model, at the
# first step of the next one, at its end.
@pytest.mark.parametrize("step", [5, 8, 10, 11, 20])
def test_stopped_and_resumed(
    series: Series, straight: dict[str, Any], tmp_path: Path, step: int
) -> None:
    with pytest.raises(RunInterruptedError) as stopped:
        series(tmp_path, _Stop(step))
    assert stopped.value.signum == signal.SIGTERM
    series(tmp_path)
    assert results(tmp_path) == straight


def test_stopping_at_every_step_gets_there_too(
    series: Series, straight: dict[str, Any], tmp_path: Path
) -> None:
    stops = 0
    done = False
    while not done:
        try:
            series(tmp_path, _Stop(1))
            done = True
        except RunInterruptedError:
            stops += 1
    assert stops == sum(record["steps"] for record in straight["records"])
    assert results(tmp_path) == straight


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["checkpoints each step", "none within a model"])
@pytest.mark.parametrize("step", [4, 9, 14])
def test_killed_and_resumed(
    series: Series,
    straight: dict[str, Any],
    tmp_path: Path,
    step: int,
    every: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_module, "CHECKPOINT_SECONDS", every)
    with pytest.raises(_KilledError):
        series(tmp_path, _Stop(step, kill=True))
    series(tmp_path)
    assert results(tmp_path) == straight


@pytest.mark.parametrize(
    "choice", [("--ars", "off"), ("--ars", "paper"), ("--ewc-strength", "0")], ids=" ".join
)
def test_resuming_with_every_kind_of_state(
    series: Series, tmp_path: Path, choice: tuple[str, str]
) -> None:
    series(tmp_path / "straight", None, *choice)
    with pytest.raises(RunInterruptedError):
        series(tmp_path / "stopped", _Stop(14), *choice)
    series(tmp_path / "stopped", None, *choice)
    assert results(tmp_path / "stopped") == results(tmp_path / "straight")


def test_seeds_differ(series: Series, straight: dict[str, Any], tmp_path: Path) -> None:
    series(tmp_path, None, "--seed", "1")
    assert results(tmp_path)["models"].keys() == straight["models"].keys()
    for name, model in results(tmp_path)["models"].items():
        assert model != straight["models"][name]


def test_a_finished_series_is_left_as_it_is(
    series: Series, straight: dict[str, Any], tmp_path: Path
) -> None:
    assert series(tmp_path)[1] is False
    table, nothing_to_do = series(tmp_path, _Stop(1))
    assert nothing_to_do
    assert table == markdown_table(json.loads((tmp_path / "metrics.json").read_text()))
    (tmp_path / "metrics.json").unlink()
    series(tmp_path)
    assert results(tmp_path) == straight


def test_a_damaged_checkpoint_is_refused_and_the_remedy_works(
    series: Series, straight: dict[str, Any], tmp_path: Path
) -> None:
    series(tmp_path)
    for name in ("d1-scratch.pt", "d2-inherited.pt"):
        path = tmp_path / "checkpoints" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} is damaged .*delete it and run") as error:
            series(tmp_path)
        assert "\n" not in str(error.value)
        path.unlink()
        series(tmp_path)
        assert results(tmp_path) == straight


def test_a_damaged_or_missing_trunk(
    series: Series, straight: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RunInterruptedError):
        series(tmp_path, _Stop(10))  # d1 is done, d2 has not begun
    trunk = tmp_path / "checkpoints/d1-scratch-trunk.pt"
    trunk.write_bytes(b"")
    with pytest.raises(UsageError, match=r"d1-scratch-trunk\.pt is damaged"):
        series(tmp_path)
    trunk.unlink()
    series(tmp_path)  # trains d1 again, since d2 has to grow out of it
    assert results(tmp_path) == straight


def command(text: Path, out: Path, *, checkpoint_each_step: bool = False) -> list[str]:
    words = [*TINY, "--data", str(text), "--out", str(out), "--steps", LONG]
    if not checkpoint_each_step:
        return [sys.executable, str(SCRIPT), *words]
    code = (
        "import sys, miniseries, trainer.train as t; t.CHECKPOINT_SECONDS = 0.0; "
        "sys.exit(miniseries.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, *words]


def run(words: list[str], *, when: Path | None = None, send: int = 0) -> tuple[int, str, str]:
    """Run a command; send it a signal as soon as a file exists."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while when is not None and not when.exists():
            assert process.poll() is None
            time.sleep(0.002)
        if when is not None:
            process.send_signal(send)
        output, errors = process.communicate()
        return process.returncode, output, errors


def test_signals_save_and_say_how_to_resume(
    text: Path, long_straight: dict[str, Any], tmp_path: Path
) -> None:
    for number, name in ((signal.SIGINT, "d2-inherited"), (signal.SIGTERM, "d2-scratch")):
        begun = tmp_path / f"log_{name}.csv"
        status, output, errors = run(command(text, tmp_path), when=begun, send=number)
        assert status == 128 + number
        assert output == ""
        assert "Traceback" not in errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith("interrupted: run `python ")
        assert last.endswith("` again to resume")
        assert f"--out {tmp_path}" in last
        saved = torch.load(tmp_path / f"checkpoints/{name}.pt", weights_only=True)
        assert 0 < saved["step"] < 75  # in the middle of the model
    assert run(command(text, tmp_path))[0] == 0
    assert results(tmp_path) == long_straight


def test_killed_for_real(text: Path, long_straight: dict[str, Any], tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints/d2-inherited.pt"
    words = command(text, tmp_path, checkpoint_each_step=True)
    assert run(words, when=saved, send=signal.SIGKILL)[0] == -signal.SIGKILL
    assert 0 < torch.load(saved, weights_only=True)["step"] < 75
    assert run(command(text, tmp_path))[0] == 0
    assert results(tmp_path) == long_straight


def test_a_signal_before_training_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import signal, sys, miniseries, trainer.cli as cli\n"
        "parse = cli.parse_arguments\n"
        "def parse_and_interrupt(argv):\n"
        "    arguments = parse(argv)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    return arguments\n"
        "cli.parse_arguments = parse_and_interrupt\n"
        "sys.exit(miniseries.main(sys.argv[1:]))"
    )
    out = tmp_path / "early"
    status, output, errors = run([sys.executable, "-c", code, "--out", str(out)])
    assert (status, output) == (130, "")
    assert errors == "interrupted before training: nothing was written\n"
    assert not out.exists()


def test_the_second_signal_ends_at_once() -> None:
    code = (
        "import signal\n"
        "from trainer.signals import StopRequest\n"
        "with StopRequest():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('first', flush=True)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('second', flush=True)\n"
    )
    assert run([sys.executable, "-c", code]) == (130, "first\n", "")


def test_the_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) != before
        stop.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(RunInterruptedError):
            stop.check()
    assert signal.getsignal(signal.SIGINT) == before
