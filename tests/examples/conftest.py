"""A folder for programs, one that refuses; the small series: its text and its runs."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from program_helpers import Main, Refused, snapshot
from small_series import LONG, TINY, Series, results

from common.output_folder import OutputFolder
from common.program import StopRequest
from trainer import series_report
from trainer.arguments import parse_arguments
from trainer.series_report import markdown_table
from trainer.series_run import prepare
from trainer.train_series import run_series


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory; afterwards signals and threads are what they were."""
    monkeypatch.chdir(tmp_path)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(own_folder: None, capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function that gives a program wrong words and returns the one line that it says."""

    def run(main: Main, words: list[str]) -> str:
        before = snapshot(Path.cwd())
        try:
            status = main(words)
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        assert (status, captured.out) == (2, "")
        assert captured.err.startswith("error: ")
        assert captured.err.find("\n") == len(captured.err) - 1
        assert snapshot(Path.cwd()) == before
        return captured.err

    return run


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
        with OutputFolder(out) as output, pytest.MonkeyPatch.context() as patch:
            prepared = prepare(arguments, stop or StopRequest(), output)
            torch.manual_seed(time.monotonic_ns())  # nothing may depend on the global state
            # The figures are tested elsewhere, and drawing them takes longer than training here.
            patch.setattr(
                series_report, "write_report", lambda _, records, __: markdown_table(records)
            )
            return run_series(prepared)

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
