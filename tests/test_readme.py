"""Python blocks of the documents: alone in two of them, one after another in the third."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
OPTIMIZER = ROOT / "docs" / "optimizer.md"
REGULARIZERS = ROOT / "docs" / "regularizers.md"


def blocks_of(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)


ALONE = [(document, block) for document in (README, OPTIMIZER) for block in blocks_of(document)]


def test_there_are_blocks():
    assert min(map(len, map(blocks_of, (README, OPTIMIZER, REGULARIZERS)))) >= 3


# Of Dynamo, which hides it elsewhere.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("document", "block"), ALONE, ids=[f"{d.stem}-{b.splitlines()[1][:40]}" for d, b in ALONE]
)
def test_block_runs(document, block, capsys):
    exec(compile(block, str(document), "exec"), {})
    if "print(" in block:
        assert "phi" in capsys.readouterr().out


def test_guide_to_the_regularizers_runs():
    names: dict[str, object] = {}
    for block in blocks_of(REGULARIZERS):
        exec(compile(block, str(REGULARIZERS), "exec"), names)
