"""States whose digest is right and whose content is not: never a traceback, never a wrong run."""

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_series import CHAIN, TINY, Series, Stop, results
from torch import Tensor

from common.checkpoint_file import load_checkpoint, save_checkpoint
from common.errors import DamagedError, RunInterruptedError, UsageError
from common.output_folder import OutputFolder
from common.program import StopRequest
from trainer.arguments import parse_arguments
from trainer.series_plan import plans_of
from trainer.series_run import prepare
from trainer.training_state import restore

WORDS = ("--arms", "grown+ewc+ars", "--checkpoint-seconds", "0")

# What may be anything without harm: it is not used on this device, or any value is a right one.
FREE = ("/run", "/log", "/pulls", "/inheritance/penalty/estimator")


def places(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts and lists, with the way to it."""
    yield place, content
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, f"{place}/{key}")


def changed(content: Any, place: str, change: Callable[[dict[Any, Any], Any], None]) -> Any:
    """A copy in which something was done to what is at a place."""
    copied = copy.deepcopy(content)
    parent = copied
    *path, last = place.split("/")[1:]
    for part in path:
        parent = parent[next(key for key in parent if str(key) == part)]
    change(parent, next(key for key in parent if str(key) == last))
    return copied


def remove(parent: dict[Any, Any], key: Any) -> None:
    del parent[key]


def to_text(parent: dict[Any, Any], key: Any) -> None:
    parent[key] = "x"


def reshape(parent: dict[Any, Any], key: Any) -> None:
    parent[key] = torch.cat([parent[key].reshape(-1), parent[key].reshape(-1)[:1]])


@pytest.fixture(scope="module")
def stopped(series: Series, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in the middle of the second model."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(RunInterruptedError):
        series(folder, Stop(17), *WORDS)
    assert len(list(folder.glob(f"checkpoints/{CHAIN}/*.pt"))) > 1
    return folder


def test_no_part_of_a_state_is_taken_for_another(stopped: Path, text: Path) -> None:
    arguments = parse_arguments([*TINY, "--data", str(text), "--out", str(stopped), *WORDS])
    with OutputFolder(stopped) as output:
        run = prepare(arguments, StopRequest(), output)
        plan = next(p for p in plans_of(run.config, run.corpus.vocab_size) if p.name == CHAIN)
        newest = max(stopped.glob(f"checkpoints/{CHAIN}/*.pt"))
        content = load_checkpoint(newest, remedy="x")
        restore(plan, run, content)
        taken = []
        for place, value in places(content):
            if not place or place.startswith(FREE):
                continue
            for change in (remove, to_text, *([reshape] if isinstance(value, Tensor) else [])):
                with suppress(DamagedError):
                    restore(plan, run, changed(content, place, change))
                    taken.append(f"{change.__name__} {place}")
    assert taken == []


def spoil(path: Path, place: str, change: Callable[[dict[Any, Any], Any], None]) -> None:
    save_checkpoint(path, changed(load_checkpoint(path, remedy="x"), place, change))


def test_the_state_before_a_wrong_one_is_used(
    series: Series, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, wrong = tmp_path / "whole", tmp_path / "wrong"
    shutil.copytree(stopped, whole)
    shutil.copytree(stopped, wrong)
    newest = max(wrong.glob(f"checkpoints/{CHAIN}/*.pt"))
    spoil(newest, "/model/wte.weight", reshape)
    series(whole, None, *WORDS)
    capsys.readouterr()
    series(wrong, None, *WORDS)
    assert f"a state of {CHAIN} is damaged" in capsys.readouterr().err
    assert newest.with_name(f"{newest.name}.damaged").exists()
    assert results(wrong) == results(whole)


@pytest.mark.parametrize("place", ["/record", "/record/val_bpb", "/record/depth", "/record/arm"])
def test_a_wrong_record_is_put_aside(
    series: Series, stopped: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (final,) = (p for p in folder.glob("checkpoints/*.pt") if "trunk" not in p.name)
    spoil(final, place, to_text)
    with pytest.raises(RunInterruptedError):  # it trains that model again
        series(folder, Stop(1), *WORDS)
    assert "the record in " in capsys.readouterr().err
    assert final.with_name(f"{final.name}.damaged").exists()


def test_a_wrong_trunk_is_one_line_and_trained_again(
    series: Series, stopped: Path, tmp_path: Path
) -> None:
    whole, wrong = tmp_path / "whole", tmp_path / "wrong"
    for folder in (whole, wrong):
        shutil.copytree(stopped, folder)
        shutil.rmtree(folder / "checkpoints" / CHAIN)
    (trunk,) = wrong.glob("checkpoints/d1-*-trunk-*.pt")
    spoil(trunk, "/optimizer", remove)
    with pytest.raises(UsageError, match=r"cannot begin, because .*: run the same command again"):
        series(wrong, None, *WORDS)
    assert trunk.with_name(f"{trunk.name}.damaged").exists()
    series(wrong, None, *WORDS)
    series(whole, None, *WORDS)
    assert results(wrong) == results(whole)
