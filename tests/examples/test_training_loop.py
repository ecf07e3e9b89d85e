"""A step accumulated, recomputed, compiled or in several processes; bits per byte."""

import json
import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_series import TINY, Series, results
from torch import Tensor, nn
from torch._dynamo import config as dynamo

import miniseries
from ars.models import GPT
from trainer.step_log import read_log
from trainer.training_loop import bits_per_byte

SCRIPT = Path(miniseries.__file__)
ARMS = ("--arms", "scratch,grown+ewc+subspace+distill+ars", "--batch-size", "4")


def bits(folder: Path) -> dict[str, float]:
    records = json.loads((folder / "metrics.json").read_text())
    return {record["name"]: record["val_bpb"] for record in records}


@pytest.fixture(scope="module")
def whole(series: Series, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    series(folder, None, *ARMS)
    return folder


@pytest.mark.parametrize("size", ["1", "2"])
def test_accumulating_a_batch_changes_rounding_alone(
    series: Series, whole: Path, tmp_path: Path, size: str
) -> None:
    series(tmp_path, None, *ARMS, "--device-batch-size", size)
    assert bits(tmp_path) == pytest.approx(bits(whole), abs=2e-4)
    for name in bits(whole):
        ours, theirs = (read_log(folder / f"log_{name}.csv") for folder in (tmp_path, whole))
        assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], abs=1e-6)
        assert ours[1]["grad_norm"] == pytest.approx(theirs[1]["grad_norm"], rel=1e-5)


def test_no_pass_of_a_device_takes_more_than_its_batch(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = set()
    forward = GPT.forward

    def count(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
        sizes.add(len(tokens))
        return forward(model, tokens)

    monkeypatch.setattr(GPT, "forward", count)
    # Training, evaluation, teacher and Fisher pass, which checks its rules on two sequences.
    series(tmp_path, None, *ARMS, "--device-batch-size", "2", "--fisher-samples", "9")
    assert max(sizes) == 2


def test_recomputing_blocks_changes_no_bit(series: Series, whole: Path, tmp_path: Path) -> None:
    series(tmp_path, None, *ARMS, "--recompute")
    assert results(tmp_path) == results(whole)


def test_compiled_models_are_the_same_and_compiled_once_each(
    series: Series, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    # As many versions of one forward as torch keeps, but for the last, may be those of models that
    # have been trained: one must do for each model.
    with dynamo.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        series(tmp_path, None, *ARMS, "--compile")
    assert compiled == len(bits(whole)) + 1 == 5  # and the branch beside the grown one
    assert results(tmp_path) == results(whole)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near(
    series: Series, whole: Path, tmp_path: Path, precision: str
) -> None:
    series(tmp_path, None, *ARMS, "--precision", precision)
    assert bits(tmp_path) == pytest.approx(bits(whole), abs=0.02)
    assert bits(tmp_path) != bits(whole)
    content = torch.load(tmp_path / "checkpoints/d1-scratch+ars.pt", weights_only=True)
    assert {w.dtype for w in content["model"].values()} == {torch.float32}


def test_gradients_that_overflow_move_nothing(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = torch.amp.GradScaler.__init__

    def start_too_high(self: Any, device: str) -> None:
        create(self, device, init_scale=2.0**40)

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", start_too_high)
    series(tmp_path, None, "--arms", "scratch,grown", "--precision", "fp16")
    rows = read_log(tmp_path / "log_d1-scratch.csv")
    assert rows[0]["val_bpb"] == rows[1]["val_bpb"] == pytest.approx(8.0, abs=0.05)
    assert all(value < 20 for value in bits(tmp_path).values())


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _two_processes(words: list[str]) -> list["subprocess.CompletedProcess[str]"]:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    done = []
    for process in started:
        output, errors = process.communicate()
        done.append(subprocess.CompletedProcess(words, process.returncode, output, errors))
    return done


@pytest.mark.slow
def test_two_processes_are_one(text: Path, whole: Path, tmp_path: Path) -> None:
    words = [*TINY, "--data", str(text), "--out", str(tmp_path / "two"), *ARMS]
    first, second = _two_processes(words)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.startswith((tmp_path / "two/table.md").read_text())
    assert second.stdout == ""
    assert bits(tmp_path / "two") == pytest.approx(bits(whole), abs=2e-4)
    records = json.loads((tmp_path / "two/metrics.json").read_text())
    assert {record["devices"] for record in records} == {2}
    again = _two_processes(words)
    assert [done.returncode for done in again] == [0, 0]
    assert "already trained" in again[0].stdout


@pytest.mark.slow
def test_a_mistake_is_told_once_by_each_of_two_processes(tmp_path: Path) -> None:
    words = [*TINY, "--data", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]
    for done in _two_processes(words):
        assert done.returncode == 2
        assert [line for line in done.stderr.splitlines() if "Warning" not in line][-1].startswith(
            "error: --data"
        )
    assert not (tmp_path / "out").exists()


BYTES = torch.ones(256, dtype=torch.int64)


class _Fixed(nn.Module):
    """Gives byte 7 the probability p at every position and the others the rest."""

    def __init__(self, p: float) -> None:
        super().__init__()
        logits = torch.full((256,), math.log((1 - p) / 255))
        logits[7] = math.log(p)
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.logits.expand(*tokens.shape, 256))


def test_uniform_logits_cost_eight_bits() -> None:
    windows = torch.randint(0, 256, (70, 33))
    assert bits_per_byte(_Fixed(1 / 256), windows, BYTES) == pytest.approx(8.0, abs=1e-6)


def test_the_first_byte_of_a_window_is_context_only() -> None:
    windows = torch.full((40, 5), 7)
    windows[:, 0] = 9
    assert bits_per_byte(_Fixed(0.25), windows, BYTES) == pytest.approx(2.0, abs=1e-5)
    windows[:20, 1] = 9  # 20 of 160 targets
    expected = (140 * 2.0 + 20 * math.log2(255 / 0.75)) / 160
    assert bits_per_byte(_Fixed(0.25), windows, BYTES) == pytest.approx(expected, abs=1e-5)


def test_the_model_is_evaluated_without_dropout_and_left_as_it_was() -> None:
    windows = torch.full((3, 5), 7)
    model = _Fixed(0.25).train()
    assert bits_per_byte(model, windows, BYTES) == pytest.approx(2.0, abs=1e-5)
    assert model.training
    assert model.logits.grad is None
    model.eval()
    bits_per_byte(model, windows, BYTES)
    assert not model.training


@pytest.mark.parametrize("batch_size", [1, 7, 70, 100])
def test_the_batch_bounds_the_memory_and_changes_nothing(batch_size: int) -> None:
    windows = torch.full((70, 5), 7)
    windows[:20, 1] = 9
    model, sizes = _Fixed(0.25), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    expected = (260 * 2.0 + 20 * math.log2(255 / 0.75)) / 280
    found = bits_per_byte(model, windows, BYTES, batch_size=batch_size)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(sizes) == min(batch_size, 70)
    assert sum(sizes) == 70


def test_it_can_be_stopped_between_batches() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    model = _Fixed(0.25).train()
    with pytest.raises(KeyboardInterrupt):
        bits_per_byte(model, torch.full((3, 5), 7), BYTES, between=stop)
    assert model.training


def test_bits_are_counted_for_the_bytes_that_tokens_stand_for() -> None:
    windows = torch.full((4, 5), 7)
    windows[:, 3] = 9  # one of four targets, of three bytes
    windows[:, 1] = 255  # a separator: neither its nats nor its bytes count
    token_bytes = BYTES.clone()
    token_bytes[9], token_bytes[255] = 3, 0
    expected = (2 * 2.0 + math.log2(255 / 0.75)) / 5
    assert bits_per_byte(_Fixed(0.25), windows, token_bytes) == pytest.approx(expected, abs=1e-5)
