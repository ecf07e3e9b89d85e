"""Every mistake ends with status 2 and one line that helps, and leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from program_helpers import Refused

import miniseries
from common.output_folder import OutputFolder
from common.program import StopRequest
from trainer.arguments import parse_arguments
from trainer.series_run import Run, prepare

SCRIPT = Path(miniseries.__file__)


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(1, 256)) * 40)
    return path


def prepared(*words: str) -> Run:
    arguments = parse_arguments(words)
    with OutputFolder(arguments.out) as output:
        return prepare(arguments, StopRequest(), output)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--colour"], "there is no --colour; did you mean --column?"),
        (["--quic"], "did you mean --quick?"),
        (["--depth=2-3"], "there is no --depth; did you mean --depths?"),
        (["--quick", "extra"], "there is no extra"),
        (["extra"], "there is no mode extra; "),
        (["4"], "there is no mode 4; use train, plan, sample"),
        (["trian"], "there is no mode trian; did you mean train?"),
        (["train", "--colour"], "--colour"),
        (["--depths", "4-2"], "ascending depths"),
        (["--depths", "2"], "two or more"),
        (["--depths", "2,2,3"], "2,2,3 are not ascending"),
        (["--depths", "3x48,4x40"], "4 layers of width 40 do not grow out of 3 of width 48"),
        (["--depths", "0-2"], "from 1 to 20"),
        (["--depths", "2-21"], "from 1 to 20"),
        (["--depths", "1-2-3"], "such as 2-4 or 2,3,4"),
        (["--depths", "2,,3"], "such as 2-4 or 2,3,4"),
        (["--depths", "3x48,4by48"], "layers x width, such as 3x48,4x48"),
        (["--parents", "two"], "'two' is not a series"),
        (["--depths", "2-4", "--parents", "2,9"], "--parents: 9 is not among --depths 2,3,4"),
        (["--depths", "3x48,3x56", "--head-dim", "16"], "16 is no even divisor of the width 56"),
        (["--shares", "0.3,0.2"], "'0.3,0.2' are not ascending shares, such as 0.2,0.3,0.4"),
        (["--shares", "0.1"], "0.1 is not above the cooldown, 0.1, which is a part of it"),
        (
            ["--scratch-shares", "0.5"],
            "--scratch-shares: the last is 0.5, not 1, the whole model from scratch",
        ),
        (["--grow-at", "1.5"], "up to 1"),
        (["--blocks", "insert"], "did you mean inserted?"),
        (["--cooldown-shape", "sqrt"], "not one of '1-sqrt', 'linear'"),
        (["--arms", "scratch,grwn"], "there is no 'grwn'; did you mean grown?"),
        (["--arms", "grown+ecw"], "there is no 'ecw'; did you mean ewc?"),
        (["--arms", "scratch+ewc"], "ewc goes with grown only"),
        (["--arms", "grown+muon+ewc"], "ewc is a penalty of AdamW's step"),
        (["--arms", "grown+ewc+ars,grown+ars+ewc"], "grown+ewc+ars stands there twice"),
        (["--arms", ""], "there is no ''"),
        (["--steps", "0"], "whole number from 1"),
        (["--steps", "50,50"], "2 numbers for 4 sizes"),
        (["--steps", "3"], "the 3 steps of a model from scratch are too few for cooled branches"),
        (["--steps", "5", "--ratio", "1"], "not allowed with"),
        (["--ratio=1", "--steps=5"], "not allowed with"),
        (["--ratio", "0"], "above 0"),
        (["--ratio", "nan"], "not a number"),
        (["--seed", "-1"], "whole number from 0"),
        (["--batch-size", "0"], "whole number from 1 to 4096"),
        (["--batch-size", "1e3"], "whole number from 1 to 4096, nor 'rule'"),
        (["--sequence-len", "4"], "whole number from 8 to 8192"),
        (["--lr", "0"], "above 0"),
        (["--lr", "nan"], "not a number"),
        (["--lr", "2"], "up to 1"),
        (["--muon-lr", "ruel"], "nor 'rule'"),
        (["--weight-decay", "-1"], "from 0"),
        (["--ewc-strength", "-1"], "from 0"),
        (["--ewc-strength", "inf"], "from 0"),
        (["--distill-temperature", "0"], "from 0.01 to 1000"),
        (["--fisher-samples", "0"], "whole number from 1"),
        (["--betas", "0.9"], "a pair of numbers from 0 to 0.999999"),
        (["--betas", "0.9,1"], "a pair of numbers from 0 to 0.999999"),
        (["--precision", "8"], "not one of 'fp32', 'bf16', 'fp16' (see --help)"),
        (["--cooldown", "0"], "above 0"),
        (["--threads", "0"], "whole number from 1"),
        (["--keep", "0"], "whole number from 1"),
        (["--device-batch-size", "3"], "3 does not divide the 4 sequences"),
        (["--batch-size", "rule", "--device-batch-size", "3"], "'s by rule"),
        (["--peak-flops", "h10"], "nor a device; did you mean h100?"),
        (["--compile=maybe"], "--compile"),
        (["--out"], "expected one argument"),
        (["--out", ""], "not a text"),
        (["--device", "tpu"], "use cpu, cuda or cuda:N"),
        (["--device", "meta"], "use cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "use --device cpu"),
        (["--tokenizer", "bpe:many"], "--tokenizer bpe:many"),
        (["--tokenizer", "byts"], "--tokenizer byts"),
        (["--data", "missing.txt"], "does not exist"),
        (["--data", "empty.txt"], "is empty"),
        (["--data", "short.txt"], "has 300 bytes, but --sequence-len 128 needs at least 1290"),
        (["--data", "text.txt", "--column", "text"], "--column"),
        (["--out", "text.txt"], "is a file"),
        (["--out", "text.txt/sub/demo"], "text.txt is a file"),
        (["--cache", "text.txt/sub"], "--cache text.txt/sub cannot be created"),
        (["--out", "."], "not a run of this program"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["--config"], "expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(words: list[str], says: str, text: Path, refused: Refused) -> None:
    Path("empty.txt").touch()
    Path("short.txt").write_bytes(b"x" * 300)
    assert says in refused(miniseries.main, words)


def test_an_output_folder_that_cannot_be_written(
    text: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("locked").mkdir(mode=0o555)
    # The superuser may write anywhere, so what the system answers is given here.
    allowed = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode)
    )
    line = refused(miniseries.main, ["--data", "text.txt", "--out", "locked/demo"])
    assert "not writable" in line


def test_a_tracker_that_is_not_installed(
    text: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert "pip install tensorboardX" in refused(miniseries.main, ["--tensorboard"])


def test_a_folder_that_the_system_refuses_to_create(refused: Refused) -> None:
    line = refused(miniseries.main, ["--quick", "--out", "/proc/demo"])
    assert "/proc/demo" in line


def test_a_broken_config_file(text: Path, refused: Refused) -> None:
    Path("run").mkdir()
    for content in ("", "{", "[]", '{"settings": {}}', '{"settings": 1, "data": {"sha256": ""}}'):
        Path("run/config.json").write_text(content)
        line = refused(miniseries.main, ["--data", "text.txt", "--out", "run"])
        assert "run/config.json is " in line
        assert "--out" in line


def test_the_command_itself_prints_one_line(tmp_path: Path) -> None:
    for words in (["--depths", "9-1"], ["--data", "missing.txt"]):
        done = subprocess.run(
            [sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "count"), [([], 52), (["plan"], 56), (["sample"], 8)])
def test_help_explains_every_option_with_its_default(words: list[str], count: int) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *words, "--help"], capture_output=True, text=True, check=True
    )
    options = done.stdout.split("\n  --")[1:]
    assert len(options) == count
    for option in options:
        assert "(default: " in " ".join(option.split()), option


def test_a_run_with_other_settings_or_data_is_left_alone(text: Path, refused: Refused) -> None:
    words = ["--data", "text.txt", "--out", "run", "--quick"]
    run = prepared(*words)
    stored = {"settings": run.config.to_dict(), "data": {"sha256": run.corpus.sha256}}
    Path("run/config.json").write_text(json.dumps(stored))
    prepared(*words)
    prepared(*words, "--keep", "5", "--device-batch-size", "2")  # nothing that changes the numbers

    line = refused(miniseries.main, [*words, "--batch-size", "3", "--seed", "4"])
    assert "batch_size 4 (now 3)" in line
    assert "seed 0 (now 4)" in line
    assert "--out" in line
    text.write_bytes(text.read_bytes() + b"x")
    assert "other training data" in refused(miniseries.main, words)


def test_tokens_are_all_that_preparing_writes(text: Path) -> None:
    prepared("--data", "text.txt", "--out", "run")
    assert [path.name for path in Path("run").iterdir()] == ["data"]
    prepared("--data", "text.txt", "--out", "run")  # a run that ended here can be begun again
    prepared("--data", "text.txt", "--out", "other", "--cache", "tokens")
    assert Path("tokens").is_dir()
    assert not Path("other").exists()


def test_what_the_user_keeps_beside_the_tokens_stays(text: Path, refused: Refused) -> None:
    Path("short.txt").write_bytes(b"x" * 300)
    Path("run/data").mkdir(parents=True)
    Path("run/data/kept").write_text("mine")
    refused(miniseries.main, ["--data", "short.txt", "--out", "run"])  # compares the whole folder


def test_several_processes_share_the_batch(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "4 is not divisible by the 3 processes" in refused(miniseries.main, [])
    words = ["--batch-size", "12", "--device-batch-size", "6"]
    assert "6 does not divide the 4 sequences" in refused(miniseries.main, words)
    assert parse_arguments(["--batch-size", "6"]).config.batch_size == 6


def test_the_command_line_is_read_without_torch() -> None:
    code = (
        "import sys, trainer.arguments as cli\n"
        "cli.parse_arguments(['--quick']), cli.parse_plan([])\n"
        "cli.parse_sample(['--checkpoint', 'x'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['yaml'] = None\nimport miniseries; sys.exit(miniseries.main([]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: the module yaml is missing: pip install 'ars-triton[examples]'\n"
    )


def test_threads_are_set(text: Path) -> None:
    before = torch.get_num_threads()
    try:
        prepared("--data", "text.txt", "--threads", "3")
        assert torch.get_num_threads() == 3
        prepared("--data", "text.txt", "--depths", "2-3")  # 192 channels: torch's choice stays
        assert torch.get_num_threads() == 3
        prepared("--data", "text.txt")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
