"""How the benchmarks take their times, and what pytest-benchmark and the figures make of them."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SHARED = ("conftest.py", "contest.py", "counters.py", "interleaved.py")
SMALL = """
import time
from pathlib import Path

import pytest
from contest import PLAYED_BACK, Candidate

pytestmark = PLAYED_BACK
LOG = Path("rounds.txt")


def noted(what, seconds=0.0):
    def run():
        with LOG.open("a") as log:
            log.write(what + "\\n")
        time.sleep(seconds)

    return run


def differs():
    assert 1 == 2, "the results differ"


@pytest.fixture(scope="module")
def small(contest):
    made = contest("adamw small", "quick", rounds=5, count_costs=False)
    made.candidates = {
        "quick": Candidate(noted("quick")),
        "slow": Candidate(noted("slow", 0.004), noted("prepared"), lambda: {"compared": "all"}),
        "wrong": Candidate(noted("wrong"), check=differs),
    }
    made.left_out = {"absent": "absent is not installed"}
    return made


@pytest.mark.parametrize("name", ["quick", "slow", "wrong", "absent"])
def test_small(name, small, benchmark):
    small.play(name, benchmark)
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the small benchmarks in a folder of their own."""
    for name in SHARED:
        shutil.copy(BENCHMARKS / name, folder)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (folder / "rounds.txt").unlink(missing_ok=True)
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n0", *options)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "test_small.py").write_text(SMALL)
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(folder, "--benchmark-json=first.json", "--benchmark-save=first")


@pytest.fixture(scope="module")
def saved(first: subprocess.CompletedProcess[str], folder: Path) -> dict:
    return json.loads((folder / "first.json").read_text())


def test_candidates_take_turns_and_a_wrong_one_is_not_timed(first, folder: Path) -> None:
    assert "1 failed, 2 passed, 1 skipped" in first.stdout
    assert "the results differ" in first.stdout
    run(folder)
    rounds = (folder / "rounds.txt").read_text().split()
    assert rounds == ["quick", "prepared", "slow"] * (5 + 3)  # three rounds to warm up


def test_statistics_are_of_the_samples_taken_in_turns(saved: dict) -> None:
    assert [entry["extra_info"]["candidate"] for entry in saved["benchmarks"]] == ["quick", "slow"]
    quick, slow = (entry["stats"] for entry in saved["benchmarks"])
    assert quick["rounds"] == slow["rounds"] == len(slow["data"]) == 5
    assert slow["min"] >= 0.004 > quick["min"] > 0
    info = saved["benchmarks"][1]["extra_info"]
    expected = statistics.median(slow["data"]) / statistics.median(quick["data"])
    assert info["time / baseline"] == pytest.approx(expected, rel=1e-3)
    assert info["check"] == {"compared": "all"}
    assert saved["benchmarks"][1]["group"] == "adamw small"
    assert saved["benchmarks"][1]["options"]["timer"] == "taken in turns"
    assert saved["machine_info"]["torch"]


def test_absent_candidates_are_named(first, saved: dict) -> None:
    assert saved["left_out"] == {"adamw small": {"absent": "absent is not installed"}}
    assert "left out: absent: absent is not installed" in first.stdout


def test_runs_are_compared_as_pytest_benchmark_does(first, folder: Path) -> None:
    compared = run(folder, "--benchmark-compare", "-k", "slow")
    assert re.search(r"test_small\[slow\] \(NOW\)", compared.stdout)
    assert re.search(r"test_small\[slow\] \(0001_first\)", compared.stdout)
    assert not re.search(r"machine_info is different", compared.stdout)


def test_without_benchmarking_each_runs_once(folder: Path) -> None:
    done = run(folder, "--benchmark-disable", "-k", "slow")
    assert "1 passed" in done.stdout
    assert (folder / "rounds.txt").read_text().split() == ["prepared", "slow"]


def test_a_file_without_the_timer_is_refused(folder: Path, tmp_path: Path) -> None:
    text = SMALL.replace("pytestmark = PLAYED_BACK", "")
    (tmp_path / "test_small.py").write_text(text)
    assert "the file needs `pytestmark = PLAYED_BACK`" in run(tmp_path, "-k", "slow").stdout


def test_every_benchmark_is_played_back() -> None:
    files = sorted(BENCHMARKS.glob("test_*.py"))
    assert files
    assert all("\npytestmark = PLAYED_BACK\n" in file.read_text() for file in files)


def plot(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, BENCHMARKS / "plot.py", *arguments)
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


def test_figures_are_drawn_of_either_format(saved: dict, folder: Path, tmp_path: Path) -> None:
    sources = [folder / "first.json", *sorted((BENCHMARKS / "results").glob("*h100*"))]
    assert len(sources) == 2
    assert not plot(*sources, "--out", tmp_path / "both.png").stderr
    height, width, _ = matplotlib.image.imread(tmp_path / "both.png").shape
    assert height > 300
    assert width > 1200


def test_the_figure_of_the_page_is_the_one_of_the_committed_results(tmp_path: Path) -> None:
    assert plot("--out", tmp_path / "speed.png").stdout
    drawn, page = (
        matplotlib.image.imread(path)
        for path in (tmp_path / "speed.png", ROOT / "docs" / "images" / "speed.png")
    )
    assert drawn.shape == page.shape  # the size follows the number of rows
    assert abs(drawn - page).mean() < 0.01  # fonts differ a little between versions


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "cannot be read"), ('{"rows": []}', "has no contest"),
     ('{"rows": [{"candidate": "a", "ms": 1, "time / baseline": 1}], "torch": "2", "date": "d"}',
      "no contest of adamw")],
    ids=["missing", "cut", "empty", "another"],
)  # fmt: skip
def test_a_source_that_cannot_be_drawn_is_named(content, message, tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    if content is not None:
        file.write_text(content)
    done = plot(file, "--out", tmp_path / "none.png")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "none.png").exists()


def test_the_prices_of_the_fisher_are_the_fit_of_what_was_measured(monkeypatch):
    """What `auto` predicts by is what `fisher_prices.py` makes of the committed file."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    prices = pytest.importorskip("fisher_prices")
    rows = json.loads((BENCHMARKS / "results/fisher/prices.json").read_text())["rows"]
    for way in prices.WAYS:
        fitted = [float(f"{price:.2g}") for price in prices.fitted(rows, way)]
        assert list(prices.per_sample._PRICES[way]) == fitted
    ratios = [ratio for *_, ratio in prices.choices(rows)]
    assert statistics.mean(ratios) < 1.05
    assert max(ratios) < 1.7


def test_the_prices_are_measured_once(tmp_path):
    """A run goes on with what is missing."""
    file, command = tmp_path / "prices.json", [sys.executable, BENCHMARKS / "fisher_prices.py"]
    saved = json.loads((BENCHMARKS / "results/fisher/prices.json").read_text())
    kept = [row for row in saved["rows"] if row["family"] == "mlp"]
    file.write_text(json.dumps({**saved, "rows": kept[1:]}))
    done = subprocess.run(
        [*command, file, "--families", "mlp"], capture_output=True, text=True, check=True
    )
    *before, new = json.loads(file.read_text())["rows"]
    assert before == kept[1:]
    assert done.stdout.count("'family'") == 1
    assert set(new.pop("seconds")) == {"hooks", "vmap", "loop"}
    assert new == {name: kept[0][name] for name in new}
    wrong = subprocess.run(
        [*command, tmp_path / "none.json", "--fit"], capture_output=True, text=True
    )
    assert wrong.returncode == 1
    assert "measure first" in wrong.stderr
