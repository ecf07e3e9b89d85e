"""Every Python block of the README runs as it stands, and those of the guide one after another."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)

GUIDE = README.parent / "docs" / "regularizers.md"


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


# Of Dynamo, which hides it elsewhere.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[1][:40])
def test_block_runs(block, capsys):
    exec(compile(block, str(README), "exec"), {})
    if "print(" in block:
        assert "phi" in capsys.readouterr().out


def test_guide_to_the_regularizers_runs():
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
