"""Facts that keep the architecture true: who imports whom, docstrings and doctests."""

import ast
import doctest
import importlib
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("csrc_triton", "models", "regularizers")

# Layer -> what of this project its modules may import, and what of that they may not. The longest
# layer name that a module is below decides; a name stands for what is below it too.
LAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ars": (("ars",), ("ars.models", "ars.regularizers")),
    "ars.reference": (("ars.reference",), ()),
    "ars.csrc_triton": (("ars.csrc_triton",), ()),
    "ars.models": (("ars.models", "ars.reference", "ars.sharded"), ()),
    "ars.regularizers": (
        ("ars.regularizers", "ars.penalty", "ars.reference", "ars.atomic", "ars.sharded"),
        (),
    ),
    "ars.regularizers.fisher.rules": (("ars.regularizers", "ars.csrc_triton"), ()),
    "": (  # examples
        ("analysis", "ars", "common", "continual", "corpus", "experiment", "stress", "trainer"),
        ("ars.csrc_triton",),
    ),
    "common": (("ars.atomic", "common"), ()),
    "corpus": (("common", "corpus"), ()),
    "trainer": (("ars", "common", "corpus", "trainer"), ("ars.csrc_triton",)),
}


def python_files(*folders: str) -> list[Path]:
    """The Python files of the given top-level folders, each real file once."""
    return sorted(
        Path(parent) / file
        for folder in folders
        for parent, _, files in os.walk(ROOT / folder)  # does not follow links
        for file in files
        if file.endswith(".py")
    )


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in LINKED:
        parts = ("ars", *parts)
    elif parts[0] == "examples":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def imports(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Yield the dotted name of everything a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            keep = len(parents) - node.level + is_package
            base = (
                ".".join([*parents[:keep], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func)
            if function.split(".")[-1] in {"import_module", "__import__"}:
                yield str(node.args[0].value)


def imports_of(path: Path) -> set[str]:
    is_package = path.name == "__init__.py"
    return set(imports(path.read_text(), module_name(path), is_package=is_package))


ARS_FILES = python_files("ars", *LINKED)
MODULES = [module_name(path) for path in ARS_FILES]


def test_imports_are_found_in_every_form() -> None:
    source = """
import a.b, triton as t
def lazy():
    from triton.language import load
    from .sibling import x
    from .. import y
    importlib.import_module("triton.runtime")
"""
    expected = {"a.b", "triton", "triton.language.load", "triton.runtime"}
    found = set(imports(source, "ars.models.gpt", is_package=False))
    assert found == expected | {"ars.models.sibling.x", "ars.y"}
    found = set(imports(source, "ars.models", is_package=True))
    assert found == expected | {"ars.models.sibling.x", "ars.y"}


def test_only_the_kernels_import_triton_and_a_layer_only_what_it_may() -> None:
    examples = ("analysis", "common", "continual", "corpus", "experiment", "stress", "trainer")
    wrong = []
    for path in python_files("ars", *LINKED, "examples"):
        module = module_name(path)
        inside = [layer for layer in LAYERS if is_below(module, (layer,))]
        allowed, forbidden = LAYERS[max(inside, key=len, default="")]
        if is_below(module, ("ars.csrc_triton",)):
            allowed = (*allowed, "triton")
        for name in imports_of(path):
            if is_below(name, LINKED):
                wrong.append(f"{module} imports {name}: import it below ars")
            ours = is_below(name, ("ars", "triton", *examples))
            if ours and (not is_below(name, allowed) or is_below(name, forbidden)):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def import_graph() -> dict[str, set[str]]:
    """Module of the package -> the modules of the package it imports."""
    graph = {}
    for path in ARS_FILES:
        targets = (
            max((m for m in MODULES if is_below(name, (m,))), key=len, default="")
            for name in imports_of(path)
        )
        graph[module_name(path)] = {target for target in targets if target}
    return graph


def test_json_is_written_without_nan() -> None:
    """Python writes NaN and Infinity by default, which other readers refuse."""
    calls = [
        (node, f"{path}:{node.lineno}")
        for path in python_files(*LINKED, "ars", "examples", "benchmarks")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"json.dump", "json.dumps"}
    ]
    assert calls
    for node, place in calls:
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert settings.get("allow_nan") == "False", place


def test_imports_have_no_cycle() -> None:
    graph = import_graph()
    assert any(graph.values())
    while leaves := {module for module, targets in graph.items() if not targets}:
        graph = {module: graph[module] - leaves for module in graph.keys() - leaves}
    assert not graph, "these modules import each other, or import one that does"


def test_only_the_dispatch_and_what_is_below_it_reach_the_kernels() -> None:
    graph = import_graph()
    below = {"ars.step.choose", "ars.regularizers.fisher.rules"}
    while more := set().union(*(graph[module] for module in below)) - below:
        below |= more
    users = {m for m in graph if any(is_below(t, ("ars.csrc_triton",)) for t in graph[m])}
    assert users
    assert not [m for m in users - below if not is_below(m, ("ars.csrc_triton",))]


def test_links_of_the_package_resolve_to_the_folders_beside_it() -> None:
    links = {path.name: os.readlink(path) for path in (ROOT / "ars").iterdir() if path.is_symlink()}
    assert links == {name: f"../{name}" for name in LINKED}
    assert all((ROOT / name / "__init__.py").is_file() for name in LINKED)


DOCUMENTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_have_short_lines(document: str) -> None:
    """Tables and code too, in characters."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    assert lines
    assert not [f"{at}: {line}" for at, line in enumerate(lines, 1) if len(line) > 120]


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 40


def test_documents_agree_on_the_version() -> None:
    found = {
        name: re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        for name, pattern in {
            "ars/__init__.py": r'^__version__ = "([^"]+)"',
            "CITATION.cff": r"^version: (\S+)",
            "CHANGELOG.md": r"^## \[(\d[^\]]*)\]",
        }.items()
    }
    assert len({match and match[1] for match in found.values()}) == 1, found


def test_constraints_pin_every_requirement_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(
        re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][^\s;]*(; python_version .+)?", p) for p in pins
    )
    pinned = {pin.split("==")[0].lower() for pin in pins}
    # ... of pyproject.toml: the quoted strings of its requirement lists.
    text = (ROOT / "pyproject.toml").read_text()
    extras = "bench|dependencies|docs|examples|integrations|matrix|peers|safetensors|test"
    lists = re.findall(rf"^(?:{extras}) = \[(.*?)\]$", text, re.S | re.M)
    names = {name for body in lists for name in re.findall(r'"([A-Za-z0-9-]+)(?=[\[">=])', body)}
    assert {"torch", "triton", "numpy", "pytest", "ruff"} <= names
    assert {name.lower() for name in names - {"ars-triton"}} <= pinned


@pytest.mark.parametrize("package", ["ars", "ars.models", "ars.regularizers"])
def test_every_public_name_has_a_docstring(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__
    assert module.__doc__
    public = {name: getattr(module, name) for name in module.__all__}
    documented = {n: o for n, o in public.items() if inspect.isclass(o) or inspect.isroutine(o)}
    assert documented
    assert not [name for name, value in documented.items() if not value.__doc__]


def doctests(module: str) -> list[doctest.DocTest]:
    return doctest.DocTestFinder().find(importlib.import_module(module), module)


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module: str) -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    report: list[str] = []
    for test in doctests(module):
        runner.run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("package", ["ars", "ars.models", "ars.regularizers"])
def test_docstrings_have_examples(package: str) -> None:
    assert sum(
        len(test.examples) for m in MODULES if is_below(m, (package,)) for test in doctests(m)
    )


def test_workflows_run_what_the_makefile_has_on_every_python_that_is_promised() -> None:
    workflows = {path.stem: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
    assert set(workflows) == {"pages", "release", "tests"}
    for text in workflows.values():
        yaml.safe_load(text)
        targets = re.findall(r"run: make (\w+)", text)
        assert targets
        assert all(re.search(rf"^{t}:", (ROOT / "Makefile").read_text(), re.M) for t in targets)
    tested = yaml.safe_load(workflows["tests"])["jobs"]["tests"]["strategy"]["matrix"]["python"]
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert tested == promised
