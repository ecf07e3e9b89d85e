"""What the user can put right is said in one line that names the option and the remedy."""

import os
from pathlib import Path

import pytest

from common.errors import UsageError
from corpus import prepare_corpus


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("empty.csv").touch()
    Path("short.txt").write_text("x" * 300)
    Path("header.csv").write_text("id,text\n")
    Path("text.txt").write_text("x" * 99)
    Path("nothing").mkdir()
    Path("pictures").mkdir()
    Path("pictures", "one.png").write_text("x" * 99)
    Path("few").mkdir()
    Path("few", "only.txt").write_text("x" * 999)
    Path("table").mkdir()
    Path("table", "rows.csv").write_text("id,text\n1,one\n")


@pytest.mark.parametrize(
    ("source", "column", "message"),
    [
        ("missing.txt", None, "--data missing.txt does not exist: check the path"),
        ("missing.csv", "text", "--data missing.csv does not exist: check the path"),
        ("text.txt/more", None, "--data text.txt/more cannot be read (Not a directory)"),
        ("empty.txt", None, "--data empty.txt is empty, but --sequence-len 32 needs"),
        ("empty.csv", "text", "--data empty.csv is empty, but --sequence-len 32 needs"),
        ("header.csv", "text", "--data header.csv is empty, but --sequence-len 32 needs"),
        ("short.txt", None, "has 300 bytes, but --sequence-len 32 needs at least 330: give a"),
        ("nothing", None, "--data nothing is a folder without text, which is: .txt, "),
        ("pictures", None, "--data pictures is a folder without text, which is: .txt, "),
        ("few", None, "has 0 bytes in its validation documents, but --sequence-len 32"),
        ("table", None, "--data table/rows.csv is a table with id, text: name its text with"),
        ("table/", "a", "--column a is not in --data table/rows.csv, which has id, text: name"),
        ("few", "text", "--column text is for tables, and --data few has none: leave it out"),
        ("text.txt", "text", "--column text is for tables, and --data text.txt is none: leave"),
        (None, "text", "--column text is for tables, and the built-in text is none: leave it"),
    ],
)
def test_a_source_that_cannot_be_used(source: str | None, column: str | None, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        prepare_corpus(source, column=column, cache=Path("cache"), sequence_len=32)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["text.txt", "few"])
def test_what_may_not_be_read(name: str) -> None:
    Path(name).chmod(0)
    with pytest.raises(UsageError, match=r"cannot be read \(Permission denied\)"):
        prepare_corpus(name, cache=Path("cache"), sequence_len=8)
    Path(name).chmod(0o700)
