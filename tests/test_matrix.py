"""The sessions of noxfile.py, which run the tests on other versions."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABSENT = "3.13" if sys.version_info[:2] == (3, 10) else "3.10"  # not the one that runs this


@pytest.fixture(scope="module")
def noxfile() -> ModuleType:
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(text: str) -> dict[str, list[str]]:
    """Versions by name: two where they depend on Python."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            found.setdefault(line.split("==")[0], []).append(line.split("==")[1])
    return found


def nox(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run nox where no other Python is found."""
    environment = {**os.environ, "PATH": str(folder), "CI": ""}
    command = [sys.executable, "-m", "nox", "-f", str(ROOT / "noxfile.py"), *arguments]
    command += ["--envdir", str(folder / "nox")]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_python_is_paired_with_the_oldest_the_pinned_and_a_newer_torch(noxfile, tmp_path):
    project = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"Python :: (3\.\d+)", project) == noxfile.PYTHONS
    listed = nox("--list", folder=tmp_path).stdout
    sessions = re.findall(r"^\* tests-(\S+)\((\S+)\)", listed, re.M)
    assert sessions == [(python, pair) for python in noxfile.PYTHONS for pair in noxfile.PAIRS]
    oldest, pinned, newest = (noxfile.PAIRS[key] for key in sorted(noxfile.PAIRS))
    for name in ("torch", "triton"):
        floor = re.search(rf'"{name}>=([\d.]+)', project)[1]
        assert oldest[name] == f"{floor}.0"
    assert pinned == {}
    now = pins(noxfile.constraints({}))["torch"][0]
    assert oldest["torch"] < now < newest["torch"]


def test_a_pair_takes_the_place_of_what_is_pinned(noxfile):
    text = (ROOT / "constraints.txt").read_text()
    assert noxfile.constraints({}) == text
    usual = pins(text)
    for pair in filter(None, noxfile.PAIRS.values()):
        found = pins(noxfile.constraints(pair))
        assert {name: found[name] for name in pair} == {n: [v] for n, v in pair.items()}
        gone = usual.keys() - found.keys()
        assert "nvidia-cublas" in gone
        assert all(name.startswith(noxfile.FOLLOWERS) for name in gone)
        assert found["numpy"] == usual["numpy"]


@pytest.mark.parametrize(
    ("arguments", "must_run"),
    [([], False), (["--", "-p", "x"], False), (["-s", "tests"], True), (["-p", "3.12"], True)],
)
def test_of_all_pythons_those_that_are_not_there_are_skipped(noxfile, arguments, must_run):
    assert noxfile.must_run(["nox", *arguments]) is must_run


def test_a_session_that_was_asked_for_by_name_must_run(tmp_path):
    done = nox("-s", f"tests-{ABSENT}(2.11)", folder=tmp_path)
    assert f"Python interpreter {ABSENT} not found" in done.stderr
    assert done.returncode == 1
