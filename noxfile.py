"""The tests on every pair of versions that is supported, each in an environment of its own.

    make matrix                                   # all, one after another; what is absent is named
    make matrix ARGS="--list"                     # the sessions
    make matrix ARGS="-s 'tests-3.12(2.11)'"      # one of them
    make matrix ARGS="-p 3.12 -- -k fisher"       # one Python, and options for pytest
    PYENV_VERSION=3.10.13:3.12.1 make matrix      # with pyenv, which hides what is not named

A session installs the package and what its tests need by constraints.txt, with the versions of its
pair in place of those pinned there, and is removed when its tests have passed (some GB each);
KEEP=1 keeps it.
"""

import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["tests"]
nox.options.download_python = "never"
HERE = Path(__file__).parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# The oldest torch with its Triton, the pinned ones, and the newest that was tested. setuptools is
# here since torch 2.11 refuses newer ones.
PAIRS: dict[str, dict[str, str]] = {
    "2.11": {"torch": "2.11.0", "triton": "3.6.0", "setuptools": "81.0.0"},
    "2.13": {},
    "2.14": {"torch": "2.14.1", "triton": "3.8.0"},
}
# They follow torch, which names the versions of most of them exactly.
FOLLOWERS = ("cuda-", "nvidia-", "torchao", "torchvision")

SAY_VERSIONS = """
import importlib.metadata, sys
print(sys.version.split()[0], *map(importlib.metadata.version, ("torch", "triton", "numpy")))
"""


def must_run(arguments: list[str]) -> bool:
    """Say whether a session was asked for by name: it may not be skipped for want of a Python.

    Args:
        arguments: The command line; what follows ``--`` is pytest's.

    Returns:
        Whether there is an option that names sessions or Pythons.
    """
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return bool({"-s", "--session", "--sessions", "-p", "--python", "--pythons"} & set(own))


nox.options.error_on_missing_interpreters = must_run(sys.argv)  # of all, they are skipped


def constraints(pins: dict[str, str]) -> str:
    """Return the text of constraints.txt, with other pins.

    Args:
        pins: Versions by name; where there are none, the text as it is.

    Returns:
        One requirement a line.
    """
    lines = (HERE / "constraints.txt").read_text("utf-8").splitlines()
    if not pins:
        return "\n".join(lines) + "\n"
    kept = [
        line for line in lines if line.split("==")[0] not in pins and not line.startswith(FOLLOWERS)
    ]
    return "\n".join([*kept, *(f"{name}=={version}" for name, version in pins.items())]) + "\n"


@nox.session(python=PYTHONS)
@nox.parametrize("pair", [nox.param(name, id=name) for name in PAIRS])
def tests(session: nox.Session, pair: str) -> None:
    """Run the tests that need no GPU."""
    pins = Path(session.create_tmp()) / "constraints.txt"
    pins.write_text(constraints(PAIRS[pair]), "utf-8")
    session.install("-c", str(pins), "setuptools")
    session.install("-c", str(pins), "--no-build-isolation", "--editable", ".[test]")
    session.run("python", "-c", SAY_VERSIONS)
    workers = os.environ.get("WORKERS", "2")
    session.run("python", "-m", "pytest", "-n", workers, "--dist", "loadscope", *session.posargs)
    if not os.environ.get("KEEP"):
        shutil.rmtree(session.virtualenv.location)
