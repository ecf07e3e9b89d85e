"""Signals, to the program itself: what is saved, what is said, with what status it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_series import CHAIN, LONG, TINY, results

import miniseries
from common.errors import RunInterruptedError
from common.program import StopRequest

SCRIPT = Path(miniseries.__file__)


def command(text: Path, out: Path, *, checkpoint_each_step: bool = False) -> list[str]:
    words = [*TINY, "--data", str(text), "--out", str(out), "--steps", LONG]
    if checkpoint_each_step:
        words += ["--checkpoint-seconds", "0"]
    return [sys.executable, str(SCRIPT), *words]


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
    for number, name in ((signal.SIGINT, "d2-scratch+ars"), (signal.SIGTERM, CHAIN)):
        begun = tmp_path / f"log_{name}.csv"
        status, output, errors = run(command(text, tmp_path), when=begun, send=number)
        assert status == 128 + number
        assert output == ""
        assert "Traceback" not in errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith("interrupted: run `python ")
        assert last.endswith("` again to resume")
        assert f"--out {tmp_path}" in last
        (saved,) = (tmp_path / "checkpoints" / name).glob("*.pt")
        assert 0 < int(saved.stem) < 60  # in the middle of the model
    assert run(command(text, tmp_path))[0] == 0
    assert results(tmp_path) == long_straight


def test_killed_for_real(text: Path, long_straight: dict[str, Any], tmp_path: Path) -> None:
    saved = tmp_path / f"checkpoints/{CHAIN}/00000002.pt"
    words = command(text, tmp_path, checkpoint_each_step=True)
    assert run(words, when=saved, send=signal.SIGKILL)[0] == -signal.SIGKILL
    newest = max(saved.parent.glob("*.pt"))
    assert 2 <= torch.load(newest, weights_only=True)["step"] < 48
    assert run(command(text, tmp_path))[0] == 0
    assert results(tmp_path) == long_straight


def test_a_signal_before_training_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import signal, sys, miniseries, trainer.arguments as cli\n"
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
        "from common.program import StopRequest\n"
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
