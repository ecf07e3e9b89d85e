"""The pages of the documentation: built strictly, as `make docs` does, and read as HTML."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def text_of(page: Path) -> str:
    """Of its article, without code."""
    article = re.search(r"<article.*?</article>", page.read_text("utf-8"), re.DOTALL)[0]
    return re.sub(r"<(pre|code)\b.*?</\1>", "", article, flags=re.DOTALL)


def test_every_document_is_in_the_navigation(site):
    named = re.findall(r"([\w/]+)\.md", (ROOT / "mkdocs.yml").read_text())
    documents = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    assert {f"{name}.md" for name in named} == set(map(str, documents))
    for name in named:
        page = site / ("index.html" if name == "index" else f"{name}/index.html")
        assert page.is_file(), name


def test_no_directive_or_formula_is_left_as_it_was_written(site):
    for page in site.rglob("index.html"):
        text = text_of(page)
        for left in ("$$", ":class:", ":meth:", ".. math", "\\frac", "<autoref", "``"):
            assert left not in text, (page, left)
    reference = (site / "reference" / "optimizer" / "index.html").read_text("utf-8")
    assert reference.count("<mtable") >= 2
    assert 'href="#ars.ARSConfig.paper"' in reference


@pytest.mark.parametrize("module", ["ars", "ars.regularizers", "ars.models"])
def test_every_public_name_has_its_place(site, module):
    page = {"ars": "optimizer"}.get(module, module.rpartition(".")[2])
    reference = (site / "reference" / page / "index.html").read_text("utf-8")
    for name in set(__import__(module, fromlist=["__all__"]).__all__) - {
        "__version__",
        "Quantized",
    }:
        assert f'id="{module}.{name}"' in reference, name


def test_the_messages_of_the_page_on_trouble_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\* `([^`(]*)`", page, re.M)
    assert len(quoted) >= 6
    files = [*(ROOT / "ars").glob("**/*.py"), *(ROOT / "regularizers").glob("**/*.py")]
    # Literals of one message stand on several lines, and may mark names by backquotes.
    code = "\n".join(path.read_text() for path in files)
    code = re.sub(r'"\s*f?"', "", code).replace("`", "")
    for text in quoted:
        assert text in code, text


def test_nothing_is_loaded_from_other_hosts(site):
    for page in site.rglob("index.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text()
        )
        assert not loaded, (page, loaded)


def test_every_image_is_there(site):
    for page in site.rglob("index.html"):
        for source in re.findall(r'<img[^>]*src="([^"]*)"', page.read_text("utf-8")):
            assert (page.parent / source).is_file(), (page, source)
