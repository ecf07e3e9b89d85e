"""What the benchmarks share: the device, contests, and what pytest-benchmark's JSON says of both.

`pytest benchmarks --benchmark-json=FILE` keeps the figures; `benchmarks/plot.py` draws them.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

if importlib.util.find_spec("pytest_benchmark") is None:
    raise pytest.UsageError(
        "the benchmarks need pytest-benchmark: pip install -c constraints.txt pytest-benchmark"
    )

from contest import Contest
from interleaved import bandwidth

collect_ignore = [] if torch.cuda.is_available() else ["test_graph.py"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTESTS: list[Contest] = []  # of this session, for what is said at its end
TABLES: dict[str, list[dict[str, Any]]] = {}  # what was measured and is no time


@functools.cache
def copy_speed() -> float:
    """Return the bytes per second of a copy, measured once."""
    return bandwidth(DEVICE)


@pytest.fixture(scope="session")
def device() -> str:
    """Return where the benchmarks run: the GPU if there is one."""
    return DEVICE


@pytest.fixture(scope="session")
def contest(request: pytest.FixtureRequest) -> Callable[..., Contest]:
    """Return a function that makes a contest whose results are listed at the end."""
    enabled = not request.config.getoption("benchmark_disable")

    def make(name: str, baseline: str, **fields: Any) -> Contest:
        if enabled and fields.get("numel") is not None:
            fields["copy_bandwidth"] = copy_speed()
        made = Contest(name, baseline, DEVICE, **fields)
        made.rounds = max(made.rounds, request.config.getoption("benchmark_min_rounds"))
        CONTESTS.append(made)
        return made

    return make


@pytest.fixture
def table() -> Callable[[str, list[dict[str, Any]]], None]:
    """Return a function that keeps rows of what is no time, for the end and for the JSON."""
    return TABLES.__setitem__


def pytest_configure(config: pytest.Config) -> None:
    """Show the columns that say something of a dozen rounds, unless others were asked for."""
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Say what matters here, and leave out a name and a clock rate that differ at every look."""
    del config
    machine_info.pop("node", None)
    for key in [key for key in machine_info.get("cpu", {}) if key.startswith("hz_actual")]:
        del machine_info["cpu"][key]
    machine_info |= {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton")
        if importlib.util.find_spec("triton")
        else None,
    }


def left_out() -> dict[str, dict[str, str]]:
    """Return the candidates without times and why, by contest."""
    return {each.name: each.left_out for each in CONTESTS if each.left_out}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    """Add what belongs to no single benchmark."""
    del config, benchmarks
    if copy_speed.cache_info().currsize:
        output_json["copy_gb_per_s"] = round(copy_speed() / 1e9, 1)
    output_json |= {"left_out": left_out(), "tables": TABLES}


def lines(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a line a candidate."""
    for name, row in rows.items():
        told = {k: v for k, v in row.items() if k not in {"candidate", "baseline", "check"}}
        yield f"  {name}: " + ", ".join(f"{key} {value}" for key, value in told.items())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the tables of pytest-benchmark lack: ratios, bytes, and who was left out."""
    for each in CONTESTS:
        if each.rows or each.left_out:
            terminalreporter.section(f"{each.name}; baseline: {each.baseline}")
        for line in lines(each.rows):
            terminalreporter.write_line(line)
        for name, reason in each.left_out.items():
            terminalreporter.write_line(f"  left out: {name}: {reason}")
    for title, rows in TABLES.items():
        terminalreporter.section(title)
        for row in rows:
            terminalreporter.write_line("  " + ", ".join(f"{k} {v}" for k, v in row.items()))
