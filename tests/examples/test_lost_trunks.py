"""States of trunks that are lost: whatever others begin with is trained again, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from small_series import Series, Stop, results

from common.errors import RunInterruptedError

# Questions before each model and after each step: 1 to 11 of d1, to 20 of d2, to 23 of its branch,
# to 32 of d3, to 35 of its branch.
WORDS = ("--arms", "grown", "--depths", "1,2,3")
FIRST, SECOND = "d1-scratch-trunk-00000008.pt", "d2-grown-trunk-00000006.pt"
SECOND_BRANCH, THIRD_BRANCH = "d2-grown-trunk-00000003.pt", "d3-grown-trunk-00000003.pt"
MODELS = {"d1-scratch.pt", "d2-grown.pt", "d2-grown@0.5.pt", "d3-grown.pt", "d3-grown@0.5.pt"}


@pytest.fixture(scope="module")
def chain(series: Series, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("chain")
    series(folder, None, *WORDS)
    found = results(folder)
    assert found["models"].keys() == MODELS  # and no trunk is left
    return found


def finish(series: Series, folder: Path) -> None:
    """Run to the end, with a stop after each three steps."""
    for _ in range(30):
        try:
            series(folder, Stop(4), *WORDS)
        except RunInterruptedError:
            continue
        return
    raise AssertionError("it makes no progress")


@pytest.mark.parametrize(
    ("stop", "lost", "kept"),
    [
        (11, FIRST, set()),  # in the cooled branch of d1
        (12, FIRST, set()),  # d1 is finished, and nothing has grown out of it
        (16, FIRST, {"d1-scratch.pt"}),  # d2 has a state of its own and needs it no more
        (21, SECOND_BRANCH, set()),  # d2 is finished, and so d1's trunk is gone already
        (24, SECOND, {"d2-grown@0.5.pt"}),  # as is the branch, which nothing depends on
        (28, SECOND, {"d1-scratch.pt", "d2-grown.pt", "d2-grown@0.5.pt"}),
        (33, THIRD_BRANCH, {"d2-grown@0.5.pt"}),  # the whole chain, for a branch at its end
    ],
)
def test_a_lost_trunk(
    series: Series,
    chain: dict[str, Any],
    tmp_path: Path,
    stop: int,
    lost: str,
    kept: set[str],
) -> None:
    with pytest.raises(RunInterruptedError):
        series(tmp_path, Stop(stop), *WORDS)
    folder = tmp_path / "checkpoints"
    (folder / lost).unlink()
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    finish(series, tmp_path)
    assert results(tmp_path) == chain
    left = {name for name, time in finished.items() if name in MODELS
            and (folder / name).stat().st_mtime_ns == time}  # fmt: skip
    assert left == kept


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("d1-scratch.pt", MODELS),
        ("d2-grown.pt", MODELS - {"d1-scratch.pt"}),
        ("d2-grown@0.5.pt", MODELS - {"d1-scratch.pt", "d2-grown.pt"}),
        ("d3-grown@0.5.pt", {"d2-grown@0.5.pt"}),
    ],
)
def test_a_lost_model(
    series: Series, chain: dict[str, Any], tmp_path: Path, name: str, kept: set[str]
) -> None:
    series(tmp_path, None, *WORDS)
    folder = tmp_path / "checkpoints"
    (folder / name).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    finish(series, tmp_path)
    assert results(tmp_path) == chain
    left = {other for other in before if (folder / other).stat().st_mtime_ns == before[other]}
    assert left == kept - {name}


def test_trunks_are_kept_as_long_as_something_begins_with_them(
    series: Series, tmp_path: Path
) -> None:
    expected = {
        12: {FIRST},
        23: {SECOND_BRANCH, SECOND},
        24: {SECOND},
        33: {THIRD_BRANCH},
        35: {THIRD_BRANCH},
    }
    for stop, trunks in expected.items():
        with pytest.raises(RunInterruptedError):
            series(tmp_path / str(stop), Stop(stop), *WORDS)
        found = {path.name for path in (tmp_path / f"{stop}/checkpoints").glob("*-trunk-*.pt")}
        assert found == trunks, stop
