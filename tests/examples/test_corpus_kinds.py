"""What is no text is refused by its content, and a row that is not like the first by its line."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpus_helpers import content, prepare

from common.errors import UsageError
from corpus import text_files
from corpus.sources import open_source
from stress.scenarios import load_file

TEXT = b"some words of ordinary text, and a few more\n" * 99
# Made by other programs; of each the beginning is enough.
ZSTD = b"(\xb5/\xfd\x64\x90\x0f\x11\x02\x00" + TEXT
PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<< /Type /Catalog >>\nendobj\n" + TEXT
OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + TEXT


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("word/document.xml", content)
    return stream.getvalue()


def in_tar(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def in_parquet(content: bytes) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": [content]}), stream)
    return stream.getvalue()


def saved(content: bytes) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(99)}, stream)
    return stream.getvalue()


NO_TEXT: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "gzip": (gzip.compress, "packed with gzip"),
    "bzip2": (bz2.compress, "packed with bzip2"),
    "xz": (lzma.compress, "packed with xz"),
    "lzma": (lambda c: lzma.compress(c, format=lzma.FORMAT_ALONE), "packed with lzma"),
    "zstd": (lambda c: ZSTD, "packed with zstd"),
    "zip": (zipped, "a zip archive or an office document"),
    "tar": (in_tar, "a tar archive"),
    "pdf": (lambda c: PDF, "a PDF document"),
    "doc": (lambda c: OLD_OFFICE, "an office document"),
    "rtf": (lambda c: b"{\\rtf1\\ansi " + c + b"}", "an RTF document"),
    "parquet": (in_parquet, "a parquet table"),
    "torch": (saved, "a zip archive"),
    "utf-16": (lambda c: c.decode().encode("utf-16"), "UTF-16"),
    "utf-16 big": (lambda c: b"\xfe\xff" + c.decode().encode("utf-16-be"), "UTF-16"),
    "utf-32": (lambda c: c.decode().encode("utf-32"), "UTF-32"),
    "utf-16 unmarked": (lambda c: c.decode().encode("utf-16-le"), "binary or UTF-16"),
    "token ids": (lambda c: np.arange(9999, dtype=np.uint16).tobytes(), "binary or UTF-16"),
    "padded": (lambda c: c + bytes(9999), "binary or UTF-16"),
    "torn in the middle": (lambda c: c * 99 + bytes(99999) + c * 99, "binary or UTF-16"),
    "random": (lambda c: np.random.default_rng(0).bytes(9999), "binary or UTF-16"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.txt.gz", "a.csv", "a.jsonl"])
def test_what_is_no_text_is_refused_whatever_its_name(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, what = NO_TEXT[kind]
    path = tmp_path / name
    path.write_bytes(make(TEXT))
    monkeypatch.setattr(text_files, "_LOOKED_AT", 1 << 12)
    column = "text" if name in ("a.csv", "a.jsonl") else None
    with pytest.raises(UsageError) as refused:
        prepare(path, tmp_path / "cache", column)
    assert str(refused.value).startswith(f"--data {path} is {what}")
    assert ", not text: " in str(refused.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("kind", ["gzip", "utf-16", "pdf", "token ids"])
def test_the_stress_tests_refuse_it_as_well(kind: str, tmp_path: Path) -> None:
    make, what = NO_TEXT[kind]
    path = tmp_path / "a.txt"
    path.write_bytes(make(TEXT))
    with pytest.raises(UsageError, match=f"a.txt is {what}.*, not text: "):
        load_file(path, 8)


@pytest.mark.parametrize(
    "encoded",
    [
        "Größe, naïve, 日本語, العربية".encode(),
        "Größe, naïve".encode("latin-1"),
        "日本語のテキスト".encode("shift-jis"),
        "日本語のテキスト".encode("gb18030"),
        b"\xef\xbb\xbfbegins with a mark of UTF-8",
        b"a stray NUL\0in a long text " + TEXT,
        b"\x1b[1mcolours of a terminal\x1b[0m, a page\fand a bell\a",
        b"BZh is how it begins; PK too; PAR, %PDF and ]",
    ],
)
def test_other_texts_are_trained_on_as_they_are(encoded: bytes, tmp_path: Path) -> None:
    whole = b"\n".join([encoded] * 99)
    for path in (tmp_path / "a.txt", tmp_path / "a.bin"):
        path.write_bytes(whole)
        found = content(prepare(path, tmp_path / "cache"))
        assert found["train"] + found["validation"] == whole


def test_a_folder_names_the_first_of_its_files_that_are_no_text(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    for name in ("a.txt", "b.md", "c.py"):
        (root / name).write_bytes(TEXT)
    (root / "picture.png.gz").write_bytes(gzip.compress(TEXT))  # would not be read anyway
    assert open_source(str(root), None).facts["files_left_out"] == 1
    (root / "d.jsonl.zst").write_bytes(ZSTD)
    with pytest.raises(UsageError) as refused:
        open_source(str(root), None)
    assert str(refused.value) == (
        f"--data {root}/d.jsonl.zst is packed, not text: unpack it or take it away"
    )
    (root / "d.jsonl.zst").unlink()
    (root / "b.md").write_bytes(gzip.compress(TEXT))
    (root / "c.py").write_bytes(TEXT.decode().encode("utf-16"))
    with pytest.raises(UsageError) as refused:
        open_source(f"{root}/", None)
    assert str(refused.value) == (
        f"--data {root}/b.md is packed with gzip, not text (2 such files): unpack it"
    )


def line(value: object) -> str:
    return json.dumps({"id": 1, "text": value})


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('{"id": 2, "body": "x"}', "line 5 has no field text, but id, body"),
        ("{}", "line 5 has no field text, but no fields"),
        (line(3), "line 5 holds int as text, not text"),
        (line(["a", "b"]), "line 5 holds list as text, not text"),
        (line({"a": "b"}), "line 5 holds dict as text, not text"),
        (line(value=True), "line 5 holds bool as text, not text"),
        ('{"id": 1, "text": NaN}', "line 5 holds float as text, not text"),
        ('{"text": "a", "text": "b"}', "line 5: text stands there twice"),
        ('["text", "x"]', "line 5 is no JSON object"),
        ('{"text": "cut sho', "line 5: Invalid control character at"),
        ("[" * 99999, "line 5: it is nested too deeply"),
    ],
)
def test_a_later_row_of_another_form_is_refused_with_its_line(
    broken: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    good = line("some words ")
    path.write_text("\n".join([good, "", line(None), good, broken, *[good] * 99]))
    with pytest.raises(UsageError) as refused:
        prepare(path, tmp_path / "cache", "text")
    assert f"--data {path} is damaged ({reason}" in str(refused.value)
    assert not list((tmp_path / "cache").glob("[0-9a-f]*"))


def test_blank_lines_nulls_and_a_mark_of_utf_8_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [line(f"words {i} "[:7]) for i in range(40)]
    plain = "\n".join(rows)
    path.write_text(plain)
    expected = content(prepare(path, tmp_path / "cache", "text"))
    assert sum(map(len, expected.values())) == 40 * 7
    # Blank lines are no rows; nulls and empty texts behind the others move none of them.
    others = ["", *rows[:9], "  ", "\t", *rows[9:], line(None), line(""), ""]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(others[1:]).encode())
    assert content(prepare(path, tmp_path / "cache", "text")) == expected


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet"])
def test_missing_values_of_tables_are_passed_over(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    texts = [f"words {i} "[:7] if i % 3 else None for i in range(90)]
    if name == "a.parquet":
        pq.write_table(pa.table({"id": list(range(90)), "text": texts}), path)
    else:
        mark = "," if name == "a.csv" else "\t"
        rows = [f"{i}{mark}{text or ''}" for i, text in enumerate(texts)]
        path.write_bytes(b"\xef\xbb\xbf" + "\n".join([f"id{mark}text", *rows]).encode())
    found = content(prepare(path, tmp_path / "cache", "text"))
    assert sum(map(len, found.values())) == 60 * 7
