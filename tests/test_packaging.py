"""The built distributions contain the whole package, and it imports away from the source tree."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("csrc_triton", "models", "regularizers")
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc")

# Run as `python -I -S -c IMPORT_ALL '<json>'`: isolated, and with no .pth file read, so that an
# editable installation in site-packages cannot answer for the folder under test.
IMPORT_ALL = """
import importlib, json, os, sys

job = json.loads(sys.argv[1])
sys.path[:0] = [job["target"]]
sys.path += job["site"]
for name in job["blocked"]:
    sys.modules[name] = None

names = []
for folder, folders, files in os.walk(os.path.join(job["target"], "ars")):
    folders[:] = sorted(set(folders) - {"__pycache__"})
    for file in sorted(files):
        if file.endswith(".py"):
            parts = os.path.relpath(os.path.join(folder, file[:-3]), job["target"]).split(os.sep)
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
imported = {}
for name in names:
    if not any(name == skip or name.startswith(skip + ".") for skip in job["skipped"]):
        imported[name] = importlib.import_module(name).__file__
exec(job["then"])
print(json.dumps(imported))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command away from the source tree; on failure show what it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


def site_packages() -> list[str]:
    return [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]


def import_all(
    target: Path, *, blocked: tuple[str, ...] = (), skipped: tuple[str, ...] = (), then: str = ""
) -> dict[str, str]:
    """Import every module under target/ars in a new process; return module name -> file."""
    job = {
        "target": str(target),
        "site": site_packages(),
        "blocked": blocked,
        "skipped": skipped,
        "then": then,
    }
    command = (sys.executable, "-I", "-S", "-c", IMPORT_ALL, json.dumps(job))
    return json.loads(run(*command, cwd=target.parent).splitlines()[-1])


def modules(files: list[str]) -> set[str]:
    """Dotted names of the Python files whose paths, relative to the import root, are given."""
    stems = (file.removesuffix(".py").removesuffix("/__init__") for file in files)
    return {stem.replace("/", ".") for stem in stems}


def files_in_tree() -> list[str]:
    return sorted(
        str((Path(folder) / file).relative_to(ROOT))
        for folder, _, files in os.walk(ROOT / "ars", followlinks=True)
        for file in files
        if file.endswith((".py", ".typed"))
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a distribution is made of, links kept: building writes into its tree."""
    copy = tmp_path_factory.mktemp("source") / "ars-triton"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("ars", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=JUNK)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist built from the tree, which is what `python -m build` does."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=dist)
    assert len(list(dist.glob("*.tar.gz"))) == 1
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed") / "target"
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
        *("--target", target, wheel),
        cwd=wheel.parent,
    )
    return target


def test_sdist_has_everything_that_the_readme_speaks_of(tmp_path: Path) -> None:
    """So that its tests, examples and documents can be used from it."""
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    copy = tmp_path / "copy"
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    command = (
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--sdist",
        "--outdir",
        tmp_path,
        copy,
    )
    run(*command, cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert not {name for name in tracked if not name.startswith("ars/")} - packed
    assert set(files_in_tree()) <= packed  # of links, what they lead to
    version = re.search(
        r'^__version__ = "(.*)"', (ROOT / "ars/__init__.py").read_text(), re.MULTILINE
    )
    assert version is not None
    assert sdist.name == f"ars_triton-{version[1]}.tar.gz"


def test_wheel_contains_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (licence,) = (name for name in names if name.endswith("LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        for name in names:
            if name.endswith(".py"):
                assert archive.read(name) == (ROOT / name).read_bytes()
    package = [name for name in names if name.startswith("ars/")]
    assert sorted(package) == files_in_tree()
    assert all(f"ars/{name}/__init__.py" in package for name in LINKED)
    assert "ars/py.typed" in package
    metadata = {name.split("/")[0] for name in names} - {"ars"}
    assert len(metadata) == 1
    assert metadata.pop().endswith(".dist-info")


def test_every_module_imports_from_the_installed_wheel(installed: Path) -> None:
    found = import_all(installed)
    assert set(found) == modules([f for f in files_in_tree() if f.endswith(".py")])
    assert all(Path(file).is_relative_to(installed) for file in found.values())
    assert not any(path.is_symlink() for path in installed.rglob("*"))


@pytest.mark.slow
def test_the_readmes_scripts_type_check_strictly_against_the_wheel(
    installed: Path, tmp_path: Path
) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site / "found.pth").write_text("\n".join([str(installed), *site_packages()]))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    scripts = [tmp_path / f"block_{number}.py" for number in range(len(blocks))]
    for script, block in zip(scripts, blocks, strict=True):
        script.write_text(block)
    # Tensor.backward has no types.
    options = ["--strict", "--untyped-calls-exclude=torch", "--cache-dir", tmp_path / "cache"]
    python = ["--python-executable", tmp_path / "venv/bin/python"]
    run(sys.executable, "-m", "mypy", *options, *python, *scripts, cwd=tmp_path)


def test_package_works_where_triton_cannot_be_imported(installed: Path) -> None:
    step = """
from ars import ARSAdamW
import torch
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = ARSAdamW([parameter], lr=0.5, weight_decay=0.0)
parameter.sum().backward()
optimizer.step(loss=torch.tensor(3.0))
assert (parameter < 1).all(), parameter
"""
    found = import_all(installed, blocked=("triton",), skipped=("ars.csrc_triton",), then=step)
    assert {"ars", "ars.models", "ars.regularizers"} <= set(found)


def test_bare_import_of_the_kernels_is_refused_with_a_remedy() -> None:
    code = "try:\n    import csrc_triton\nexcept ImportError as error:\n    print(error)"
    assert "ars.csrc_triton" in run(sys.executable, "-c", code, cwd=ROOT)


def test_editable_installation_follows_the_tree(source: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--ignore-installed", "--prefix", prefix, "--editable", source),
        cwd=tmp_path,
    )
    (site,) = {path.parent for path in prefix.rglob("*.dist-info")}
    late = source / "models" / "added_later.py"
    late.write_text("VALUE = 1\n")
    code = f"""
import site, sys
site.addsitedir({str(site)!r})
sys.path += {site_packages()!r}
import ars, ars.models.added_later
print(ars.__file__)
print(ars.models.added_later.__file__)
"""
    try:
        lines = run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path).splitlines()
    finally:
        late.unlink()
    assert [Path(line) for line in lines] == [
        source / "ars" / "__init__.py",
        source / "ars" / "models" / "added_later.py",
    ]
