"""Rows of CSV, TSV, parquet and JSON lines files, read in batches: a table need not fit in memory.

A row's column is one document, known by its row number. Rows whose text is empty, null or a missing
value are passed over; a JSON row without the field is refused.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from common.errors import UsageError
from common.plain_files import open_file, parse_json, printable
from corpus.pieces import Piece, Source, document, split_of
from corpus.text_files import check_text, fingerprint, go_on, reading

__all__ = [
    "TABLES", "Rows", "check_column", "check_listed", "is_table", "table_rows", "table_source",
    "texts",
]  # fmt: skip

Rows = Iterator[tuple[int, bytes]]  # row number from 0, and its text

_CSV_BLOCK_BYTES = 4 << 20  # also the longest row; pyarrow holds about 40
_PARQUET_ROWS = 256
_PARQUET_BUFFER_BYTES = 1 << 20


def table_source(
    path: Path, column: str | None, label: str, between: Callable[[], None] = go_on
) -> Source:
    """A table, each row of which is a document.

    Args:
        path: of a type in `TABLES`.
        column: holds the text.
        label: names it in error messages.
        between: called after every block that is read to know it by; may raise to stop.

    Raises:
        UsageError: it cannot be read, or has no such column of text.
    """
    with reading(label):
        if path.suffix.lower() != ".parquet":
            check_text(path, label)
        identity = fingerprint(path.name, path, between)
    if identity["bytes"] > 0:  # an empty one is refused with what it would have to hold
        check_column(path, column, label)

    def pieces() -> Iterator[Piece]:
        assert column is not None
        for row, content in table_rows(path, column, label):
            yield from document(split_of(f"{row}"), content)

    return Source(
        label=label,
        identity={"kind": "table", "column": column, "files": [identity]},
        facts={"source": printable(path.name), "kind": "table", "column": column},
        pieces=pieces,
        files=(path,),
        size=identity["bytes"],
    )


def is_table(path: Path) -> bool:
    """Whether a file is read as a table: by the ending of its name."""
    return path.suffix.lower() in TABLES


def check_column(path: Path, column: str | None, label: str) -> None:
    """See whether a table has a column of text.

    Args:
        path: of the table.
        column: its name; ``None`` if the user named none.
        label: names the table in error messages.

    Raises:
        UsageError: it has not; the message lists those that it has.
    """
    names, _ = TABLES[path.suffix.lower()]
    with _parsing(label), reading(label):
        check_listed(column, names(path), label)


def check_listed(column: str | None, columns: Iterable[str], label: str) -> None:
    """See whether a column is one of those there are; arguments and errors of `check_column`."""
    columns = list(columns)
    listed = ", ".join(columns) or "no columns"
    if columns.count(str(column)) > 1:
        raise UsageError(f"{label} has two columns {column} ({listed}): rename one")
    if column is None:
        raise UsageError(f"{label} is a table with {listed}: name its text with --column")
    if column not in columns:
        raise UsageError(f"--column {column} is not in {label}, which has {listed}: name one")


def table_rows(path: Path, column: str, label: str) -> Rows:
    """The texts of a table, in order.

    Args:
        path: of the table.
        column: one of its columns.
        label: names the table in error messages.

    Raises:
        UsageError: the file is damaged, or the column holds something else than text.
    """
    _, rows = TABLES[path.suffix.lower()]
    with _parsing(label), reading(label):
        yield from texts(rows(path, column), column, label)


def texts(values: Iterable[Any], column: str, label: str) -> Rows:
    """Number the values of a column and pass over those without text.

    Args:
        values: of all rows.
        column: they are in.
        label: names the table in error messages.

    Raises:
        UsageError: a value is something else than text.
    """
    for row, value in enumerate(values):
        content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        if content is not None and not isinstance(content, bytes):
            raise UsageError(
                f"--column {column} of {label} holds {type(value).__name__} in row {row}, "
                "not text: name another"
            )
        if content:
            yield row, content


@contextmanager
def _parsing(label: str) -> Iterator[None]:
    """Report what pyarrow and json say about a damaged file in one line."""
    try:
        yield
    except (pa.ArrowException, ValueError) as error:
        if "straddling" in str(error):
            size = _CSV_BLOCK_BYTES >> 20
            raise UsageError(
                f"{label} has a row of more than {size} MiB: split it, or use parquet"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{label} is damaged ({reason}): repair it, or name another") from None


def _csv_reader(path: Path, **convert: Any) -> pa_csv.CSVStreamingReader:
    return pa_csv.open_csv(
        path,
        read_options=pa_csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False),
        parse_options=pa_csv.ParseOptions(
            delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True
        ),
        convert_options=pa_csv.ConvertOptions(**convert),
    )


def _csv_columns(path: Path) -> list[str]:
    with _csv_reader(path, check_utf8=False) as reader:
        return list(reader.schema.names)


def _csv_rows(path: Path, column: str) -> Iterator[bytes | None]:
    # As binary: nothing is taken for a number, and bytes that are no UTF-8 come through.
    types = {column: pa.binary()}
    with _csv_reader(path, include_columns=[column], column_types=types) as reader:
        for records in reader:
            yield from records.column(0).to_pylist()


def _parquet_columns(path: Path) -> list[str]:
    with pq.ParquetFile(path) as file:
        return list(file.schema_arrow.names)


def _parquet_rows(path: Path, column: str) -> Iterator[Any]:
    # Buffering ahead, the default, would hold the column of a whole row group.
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
        for records in file.iter_batches(_PARQUET_ROWS, columns=[column], use_threads=False):
            values = records.column(0)
            kind = values.type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                values = values.cast(kind).cast(pa.large_binary())  # no detour over str
            yield from values.to_pylist()


def _json_columns(path: Path) -> list[str]:
    return next((list(row) for _, row in _json_objects(path)), [])


def _json_rows(path: Path, column: str) -> Iterator[str | None]:
    for line, row in _json_objects(path):
        if column not in row:
            listed = ", ".join(row) or "no fields"
            raise ValueError(f"line {line} has no field {column}, but {listed}")
        value = row[column]
        if not (value is None or isinstance(value, str)):
            raise ValueError(f"line {line} holds {type(value).__name__} as {column}, not text")
        yield value


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number, from 1, and the object of every line that is not blank."""
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield number, value


# Ending -> its columns, and the values of one of them.
TABLES: dict[
    str, tuple[Callable[[Path], list[str]], Callable[[Path, str], Iterator[bytes | str | None]]]
] = {
    ".csv": (_csv_columns, _csv_rows),
    ".tsv": (_csv_columns, _csv_rows),
    ".parquet": (_parquet_columns, _parquet_rows),
    ".jsonl": (_json_columns, _json_rows),
    ".ndjson": (_json_columns, _json_rows),
}
