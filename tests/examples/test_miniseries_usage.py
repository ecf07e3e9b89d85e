"""Every mistake ends with status 2 and one line that helps, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import miniseries
from trainer.cli import parse_arguments
from trainer.state import flops_per_token, steps_for_ratio

SCRIPT = Path(miniseries.__file__)


@pytest.fixture(autouse=True)
def _folder_and_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run with bad input; return the one line."""
    before = snapshot(Path.cwd())
    try:
        status: object = miniseries.main(words)
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert snapshot(Path.cwd()) == before
    return captured.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--colour"], "--colour"),
        (["--quic"], "--quic"),
        (["extra"], "extra"),
        (["--depths", "4-2"], "ascending depths"),
        (["--depths", "2"], "two or more"),
        (["--depths", "2,2,3"], "ascending depths"),
        (["--depths", "0-2"], "from 1 to 20"),
        (["--depths", "2-21"], "from 1 to 20"),
        (["--depths", "1-2-3"], "such as 2-4 or 2,3,4"),
        (["--depths", "two"], "such as 2-4 or 2,3,4"),
        (["--depths", "2,,3"], "such as 2-4 or 2,3,4"),
        (["--steps", "0"], "whole number from 1"),
        (["--steps", "5,5"], "2 numbers for 3 depths"),
        (["--steps", "5", "--ratio", "1"], "not allowed with"),
        (["--ratio", "0"], "above 0"),
        (["--ratio", "nan"], "not a number"),
        (["--seed", "-1"], "whole number from 0"),
        (["--batch-size", "0"], "whole number from 1 to 4096"),
        (["--batch-size", "1e3"], "whole number from 1 to 4096"),
        (["--sequence-len", "4"], "whole number from 8 to 8192"),
        (["--lr", "0"], "above 0"),
        (["--lr", "nan"], "not a number"),
        (["--lr", "2"], "up to 1"),
        (["--ewc-strength", "-1"], "from 0"),
        (["--ewc-strength", "inf"], "from 0"),
        (["--fisher-samples", "0"], "whole number from 1"),
        (["--ars", "maybe"], "'default', 'paper', 'off'"),
        (["--threads", "0"], "whole number from 1"),
        (["--out"], "expected one argument"),
        (["--device", "tpu"], "use cpu, cuda or cuda:N"),
        (["--device", "meta"], "use cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "use --device cpu"),
        (["--data", "missing.txt"], "does not exist"),
        (["--data", "."], "is a directory"),
        (["--data", "empty.txt"], "is empty"),
        (["--data", "short.txt"], "has 300 bytes, but --sequence-len 256 needs at least 2570"),
        (["--out", "text.txt"], "is a file"),
        (["--out", "text.txt/sub/demo"], "text.txt is a file"),
        (["--out", "."], "not a run of this program"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    words: list[str], says: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").touch()
    Path("short.txt").write_bytes(b"x" * 300)
    assert says in refused(words, capsys)


def test_an_output_folder_that_cannot_be_written(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("locked").mkdir(mode=0o555)
    # The superuser may write anywhere, so what the system answers is given here.
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode)
    )
    line = refused(["--data", "text.txt", "--out", "locked/demo"], capsys)
    assert "not writable" in line


def test_a_folder_that_the_system_refuses_to_create(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["--quick", "--out", "/proc/demo"], capsys)
    assert "/proc/demo" in line


def test_a_broken_config_file(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    for content in ("", "{", "[]", '{"settings": {}}', '{"settings": 1, "data": {"sha256": ""}}'):
        Path("run/config.json").write_text(content)
        line = refused(["--data", "text.txt", "--out", "run"], capsys)
        assert "config.json is damaged" in line
        assert "--out" in line


def test_the_command_itself_prints_one_line(tmp_path: Path) -> None:
    for words in (["--depths", "9-1"], ["--data", "missing.txt"]):
        done = subprocess.run(
            [sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_help_explains_every_option_with_its_default() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    options = done.stdout.split("\n  --")[1:]
    assert len(options) == 15
    for option in options:
        assert "(default: " in " ".join(option.split()), option


def test_defaults() -> None:
    full, quick = parse_arguments([]), parse_arguments(["--quick"])
    assert full.out == Path("out/demo")
    assert full.config.depths == (2, 3, 4)
    assert (full.config.batch_size, full.config.sequence_len) == (4, 256)
    assert (full.config.lr, full.config.betas, full.config.weight_decay) == (
        3e-3,
        (0.9, 0.95),
        0.05,
    )
    assert quick.out == Path("out/quick")
    assert quick.config.depths == (1, 2, 3)
    both = parse_arguments(["--quick", "--steps", "7", "--depths", "2,4", "--seed", "5"])
    assert both.config.steps == (7, 7)
    assert both.config.seed == 5
    assert parse_arguments(["--depths", "4-6"]).config.steps[1:] == (320, 320)


def test_sizes_of_the_series() -> None:
    assert flops_per_token(2, 256) == 6 * (12 * 2 * 128**2 + 256 * 128) + 12 * 2 * 128 * 256
    config = parse_arguments(["--depths", "2-3"]).config
    parameters = [12 * d * (64 * d) ** 2 + 256 * 64 * d for d in (2, 3)]
    steps = steps_for_ratio(config, 2.0)
    for count, parameter in zip(steps, parameters, strict=True):
        assert 0 <= count * 4 * 256 - 2.0 * parameter < 4 * 256


def test_a_run_with_other_settings_or_data_is_left_alone(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "text.txt", "--out", "run", "--quick"]
    arguments = parse_arguments(words)
    from trainer.prepare import prepare

    config, corpus = prepare(arguments)
    Path("run").mkdir()
    stored = {"settings": config.to_dict(), "data": {"sha256": corpus.sha256}}
    Path("run/config.json").write_text(json.dumps(stored))
    prepare(arguments)

    line = refused([*words, "--batch-size", "3", "--seed", "4"], capsys)
    assert "batch_size 8 (now 3), seed 0 (now 4)" in line
    assert "--out" in line
    text.write_bytes(text.read_bytes() + b"x")
    assert "other training data" in refused(words, capsys)


def test_threads_are_set(text: Path) -> None:
    from trainer.prepare import prepare

    before = torch.get_num_threads()
    try:
        prepare(parse_arguments(["--data", "text.txt", "--threads", "3"]))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
