"""Every kind of source gives the same documents to the same splits."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_helpers import content, prepare

from common.errors import UsageError
from corpus import pieces, table_files
from corpus.pieces import SPLITS, split_of
from corpus.sources import open_source

ROWS = [
    'He said "no", then left.\nA new line\tand a tab',
    "",  # passed over, but the rows behind it keep their numbers
    "NA",
    "12.50",
    "nul",
    " räksmörgås 日本 ",
    *(f"row {i}\nhas some words" for i in range(6, 70)),
]


def expected(prefix: str = "") -> dict[str, bytes]:
    return {
        split: "".join(
            text for row, text in enumerate(ROWS) if split_of(f"{prefix}{row}") == split
        ).encode()
        for split in SPLITS
    }


def write_separated(delimiter: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["id", "text"])
            writer.writerows([i, text] for i, text in enumerate(ROWS))

    return write


def write_lines(path: Path) -> None:
    lines = [json.dumps({"id": i, "text": text or None}) for i, text in enumerate(ROWS)]
    path.write_text("\n\n".join(lines), encoding="utf-8")


def write_parquet(kind: pa.DataType) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        plain = [text.encode() if pa.types.is_binary(kind) else text for text in ROWS]
        values = pa.array([text or None for text in plain], type=kind)
        table = pa.table({"id": list(range(len(ROWS))), "text": values})
        pq.write_table(table, path, row_group_size=11)

    return write


TABLES = {
    "table.csv": write_separated(","),
    "table.TSV": write_separated("\t"),
    "table.jsonl": write_lines,
    "table.NDJSON": write_lines,
    "string.parquet": write_parquet(pa.string()),
    "large.parquet": write_parquet(pa.large_string()),
    "binary.parquet": write_parquet(pa.binary()),
    "dictionary.parquet": write_parquet(pa.dictionary(pa.int32(), pa.string())),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents in several pieces, tables in several batches."""
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 7)
    monkeypatch.setattr(table_files, "_PARQUET_ROWS", 5)
    monkeypatch.setattr(table_files, "_CSV_BLOCK_BYTES", 100)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", TABLES)
def test_the_rows_of_a_table_are_its_documents(tmp_path: Path, name: str) -> None:
    TABLES[name](tmp_path / name)
    corpus = prepare(tmp_path / name, tmp_path / "cache", "text")
    assert content(corpus) == expected()
    assert corpus.facts["train_documents"] + corpus.facts["validation_documents"] == len(ROWS) - 1
    assert corpus.facts["train_bytes"] == len(expected()["train"])
    assert corpus.facts["source"] == name
    assert corpus.facts["column"] == "text"


def test_the_digest_is_of_the_tokens_wherever_they_come_from(tmp_path: Path) -> None:
    for name, write in TABLES.items():
        write(tmp_path / name)
    corpora = [prepare(tmp_path / name, tmp_path / "cache", "text") for name in TABLES]
    assert len({corpus.sha256 for corpus in corpora}) == 1
    assert len(list((tmp_path / "cache").glob("[0-9a-f]*"))) == len(TABLES)


def test_bytes_of_a_csv_that_are_no_text_come_through(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b"text\n" + b"\xff\xfe\n" * 99)
    whole = content(prepare(path, tmp_path / "cache", "text"))
    assert whole["train"] + whole["validation"] == b"\xff\xfe" * 99


@pytest.mark.usefixtures("small_blocks")
def test_a_folder_is_all_of_its_files_by_path(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    documents = {f"part {i:02}/{j:02}.txt": f"file {i} {j}\n" for i in range(6) for j in range(9)}
    for name, text in documents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    write_lines(root / "part 03" / "rows.jsonl")
    for left_out in ("picture.png", ".hidden.txt", "empty.csv", ".git/notes.txt"):
        (root / left_out).parent.mkdir(exist_ok=True)
        (root / left_out).write_bytes(b"" if "empty" in left_out else b"LEFT OUT")
    (root / "dangling.txt").symlink_to("nowhere.txt")
    corpus = prepare(root, tmp_path / "cache", "text")
    rows = expected("part 03/rows.jsonl:")
    for split in SPLITS:
        names = [name for name in sorted(documents) if split_of(name) == split]
        before = "".join(documents[name] for name in names if name < "part 03/rows").encode()
        after = "".join(documents[name] for name in names if name > "part 03/rows").encode()
        assert content(corpus)[split] == before + rows[split] + after
    assert corpus.facts["source"] == "texts"
    assert corpus.facts["files"] == 55
    assert corpus.facts["files_left_out"] == 4
    assert str(tmp_path) not in json.dumps(corpus.facts)


def test_of_a_few_files_one_is_for_validation(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for name in "def":
        assert split_of(f"{name}.txt") == "train"  # there would be nothing to validate on
        (tmp_path / "books" / f"{name}.txt").write_text(name * 50)
    found = content(prepare(tmp_path / "books", tmp_path / "cache"))
    assert sorted(found["train"] + found["validation"]) == sorted(b"def" * 50)
    assert len(found["validation"]) == 50
    assert len(set(found["validation"])) == 1


def test_a_text_in_small_pieces_is_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 16)
    for text in ("a  b\n c " * 20, "日本語" * 50, "x" * 99, " " * 99, "\n" * 99):
        parts = [piece.content for piece in pieces.document("train", text.encode())]
        assert "".join(part.decode() for part in parts) == text
        assert max(map(len, parts)) <= 32
        begins = [piece.begins for piece in pieces.document("train", text.encode())]
        assert begins == [True] + [False] * (len(parts) - 1)
    parts = [piece.content for piece in pieces.document("train", b"\x80" * 99)]
    assert b"".join(parts) == b"\x80" * 99


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_or_wrong_column_lists_those_there_are(tmp_path: Path, name: str) -> None:
    TABLES[name](tmp_path / name)
    with pytest.raises(UsageError, match=r"is a table with id, text: name its text with --column"):
        open_source(str(tmp_path / name), None)
    with pytest.raises(UsageError, match=r"^--column txet is not in .* has id, text: name one"):
        open_source(str(tmp_path / name), "txet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("table.jsonl", r"table.jsonl is damaged \(line 1 holds int as id, not text\)"),
        ("string.parquet", r"^--column id of .* holds int in row 0, not text"),
    ],
)
def test_a_column_of_numbers_is_no_text(tmp_path: Path, name: str, message: str) -> None:
    TABLES[name](tmp_path / name)
    with pytest.raises(UsageError, match=message):
        prepare(tmp_path / name, tmp_path / "cache", "id")


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("table.csv", b"id,text\n1,a\n2\n", "Expected 2 columns, got 1"),
        ("table.csv", b"id,text\n1," + b"a" * 300 + b"\n", "has a row of more than"),
        ("table.jsonl", b'{"id": 1, "text": "a"}\n{"id": 2,', "is damaged"),
        ("table.jsonl", b'{"id": 1, "text": "a"}\n[2]\n', "line 2 is no JSON object"),
        ("table.csv", b"text,text\n1,a\n", "has two columns text"),
        ("table.parquet", b"PAR1 and then nothing of the kind", "Parquet"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_a_damaged_table_is_refused(tmp_path: Path, name: str, damage: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UsageError, match=reason) as caught:
        prepare(tmp_path / name, tmp_path / "cache", "text")
    assert str(caught.value).startswith(f"--data {tmp_path / name} ")
    assert len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "cache").glob("[0-9a-f]*"))
