"""The blocks of docs/integrations.md run as they stand."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
BLOCKS = dict(
    re.findall(r"## ([^\n]*)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE.read_text(), re.S)
)


@pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning",
    "ignore:.*LeafSpec",
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",  # which PEFT reads
)
@pytest.mark.parametrize("title", BLOCKS)
def test_block_runs(title, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[title], str(PAGE), "exec"), {})
    assert "phi 1.00" in capsys.readouterr().out


def test_every_tool_has_a_block():
    assert [title.split()[0] for title in BLOCKS] == ["Accelerate", "Hugging", "Lightning", "PEFT:"]
