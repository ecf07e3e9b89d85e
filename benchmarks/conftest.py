"""The benchmarks' command line: ``pytest benchmarks --save`` keeps the figures."""

import datetime
import functools
import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from interleaved import bandwidth

RESULTS = Path(__file__).parent / "results"
collect_ignore = [] if torch.cuda.is_available() else ["test_graph.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--save``."""
    parser.addoption(
        "--save", action="store_true", help="write benchmarks/results/<device>/<file>.json"
    )


def device_name() -> str:
    """Return a folder name for the device the benchmarks run on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-threads"


@pytest.fixture(scope="session")
def device() -> str:
    """Return where the benchmarks run: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy, read and written: what a step is measured against."""
    return bandwidth(device)


@pytest.fixture
def report(request: pytest.FixtureRequest, copy_bandwidth: float):
    """Return a function that prints a benchmark's rows, and saves them if asked to."""

    def write(name: str, rows: list[dict]) -> None:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{name}")
            for row in rows:
                print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))
        if request.config.getoption("--save"):
            path = RESULTS / device_name() / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                json.dumps(environment(copy_bandwidth) | {"rows": rows}, indent=1, allow_nan=False)
                + "\n"
            )

    return write


@functools.cache
def commit() -> str:
    """Return what was measured: the commit, and whether files differed from it."""
    command = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    return git.stdout.strip()


def pytest_sessionstart() -> None:
    """Look at the commit before the first saved result changes a file."""
    commit()


def environment(copy_bandwidth: float) -> dict:
    """Describe the machine and the versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "copy_gb_per_s": round(copy_bandwidth / 1e9, 1),
    }
