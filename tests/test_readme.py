"""Python blocks of the documents: alone in two of them, one after another in the others."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
OPTIMIZER = ROOT / "docs" / "optimizer.md"
GUIDES = [ROOT / "docs" / "regularizers.md"]
GUIDES += [
    ROOT / "docs" / "tutorials" / f"{name}.md" for name in ("swap", "protect", "grow", "devices")
]


def blocks_of(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)


ALONE = [(document, block) for document in (README, OPTIMIZER) for block in blocks_of(document)]


def test_there_are_blocks():
    assert min(map(len, map(blocks_of, (README, OPTIMIZER, *GUIDES)))) >= 1


# Of Dynamo, which hides it elsewhere.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("document", "block"), ALONE, ids=[f"{d.stem}-{b.splitlines()[1][:40]}" for d, b in ALONE]
)
def test_block_runs(document, block, capsys):
    exec(compile(block, str(document), "exec"), {})
    if "print(" in block:
        assert "phi" in capsys.readouterr().out


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guide_runs(guide):
    names: dict[str, object] = {}
    for block in blocks_of(guide):
        exec(compile(block, str(guide), "exec"), names)
