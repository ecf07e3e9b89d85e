"""A series whose models are divided among processes: trained, killed, resumed, grown, evaluated."""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from small_series import CHAIN, TINY, KilledError, Series, Stop, results

from ars.sharded import is_sharded
from common.errors import UsageError
from common.output_folder import OutputFolder
from common.program import StopRequest
from ranks import run_worlds
from trainer import series_report
from trainer.arguments import parse_arguments
from trainer.series_report import markdown_table
from trainer.series_run import prepare
from trainer.train_series import run_series

ARM = "grown+ewc+subspace+distill+ars"
WORDS = ("--arms", f"scratch,{ARM}", "--batch-size", "6", "--curve-windows", "4",
         "--eval-windows", "7", "--checkpoint-seconds", "0")  # fmt: skip
ROOT = "d1-scratch+ars"
GROWN = f"d2-{ARM}"
# Inside the grown model: 10 steps of each of three models from scratch, and some of its own.
KILLED_AT = 38


def train(rank: int, world: int, out: Path, text: Path, *words: str, kill: int = 0) -> list[str]:
    """Train in one of several processes; return the names of the weights that are divided."""
    divided: list[str] = []

    environment = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    arguments = parse_arguments([*TINY, "--data", str(text), "--out", str(out), *WORDS, *words])
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(series_report, "write_report", lambda _, rows, __: markdown_table(rows)),
        OutputFolder(out) as output,
    ):
        run = prepare(arguments, Stop(kill, kill=True) if kill else StopRequest(), output)
        divide = run.parallel.divide

        def look(model: Any) -> Any:
            found = divide(model)
            divided.extend(n for n, p in found.named_parameters() if is_sharded(p))
            return found

        with mock.patch.object(run.parallel, "divide", look):
            try:
                run_series(run)
            except KilledError:
                divided.append("killed")
    return divided


def in_two(rank: int, folder: Path, text: Path) -> tuple[list[str], list[str]]:
    straight = train(rank, 2, folder / "two", text, "--fsdp")
    killed = train(rank, 2, folder / "killed", text, "--fsdp", kill=KILLED_AT)
    if rank == 0:
        shutil.copytree(folder / "killed", folder / "by one")
        shutil.copytree(folder / "killed", folder / "by three")
    return straight, killed


def in_three(rank: int, folder: Path, text: Path) -> list[str]:
    return train(rank, 3, folder / "by three", text, "--fsdp")


@pytest.fixture(scope="module")
def runs(
    series: Series, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    series(folder / "one", None, *WORDS, "--device-batch-size", "3")
    works = [(n, functools.partial(work, folder=folder, text=text))
             for n, work in ((2, in_two), (3, in_three))]  # fmt: skip
    found = run_worlds(works, folder)
    assert (folder / f"by one/checkpoints/{ROOT}.pt").exists()
    assert not (folder / f"by one/checkpoints/{GROWN}.pt").exists()
    assert list((folder / f"by one/checkpoints/{GROWN}").glob("*.pt"))
    series(folder / "by one", None, *WORDS, "--device-batch-size", "2")
    return folder, found


def bits(folder: Path) -> dict[str, float]:
    records = json.loads((folder / "metrics.json").read_text())
    return {record["name"]: record["val_bpb"] for record in records}


def pulls(folder: Path) -> dict[str, list[float]]:
    return json.loads((folder / "metrics.json").read_text())[-1]["pulls"]


@pytest.mark.slow
def test_weights_are_divided(runs: tuple[Path, list[Any]]) -> None:
    _, (in_two, in_three) = runs
    for straight, killed in in_two:
        assert {"wte.weight", "blocks.0.attn.q.weight", "blocks.1.attn.q.weight"} <= {*straight}
        assert "killed" not in straight
        assert killed[-1] == "killed"
    assert all("blocks.1.attn.q.weight" in divided for divided in in_three)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "by one", "by three"])
def test_divided_models_are_those_of_one_process(runs: tuple[Path, list[Any]], name: str) -> None:
    folder, _ = runs
    assert bits(folder / name) == pytest.approx(bits(folder / "one"), abs=2e-4)
    one, other = (pulls(folder / run) for run in ("one", name))
    assert one.keys() == other.keys() == {"step", "wte", "blocks.0", "blocks.1", "lm_head"}
    for column, values in one.items():
        assert other[column] == pytest.approx(values, rel=0.01), column
    for path in (folder / "one/checkpoints").glob("*.pt"):
        expected, found = (
            torch.load(folder / run / "checkpoints" / path.name, weights_only=True)["model"]
            for run in ("one", name)
        )
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=2e-3, msg=f"{path} {key}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--arms", "scratch+muon,grown"), r"--fsdp: scratch\+muon has Muon"),
        (("--compile",), "--fsdp and --compile do not go together here"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    series: Series, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        series(tmp_path, None, "--fsdp", *words)


def test_one_process_has_nothing_to_divide(
    series: Series, straight: dict[str, Any], tmp_path: Path
) -> None:
    series(tmp_path, None, "--fsdp")
    assert results(tmp_path) == straight
    assert CHAIN in bits(tmp_path)
