"""CSV, JSON and text files to Parquet: values as they are written, none guessed.

CSV has text only; an empty cell is null. JSON's strings, numbers and booleans keep their kind, also
where they look like dates; a key that an object lacks is null. A column of several kinds is text:
strings as they are, all else as JSON, numbers as Python writes them. So an odd row changes no text.

Libraries guess here: a postcode becomes a number, a date loses its offset, and one number in a
column makes JSON, quotes and all, of every text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.parquet import parquet_writer

KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".txt": "text"}
"""File suffix -> what the file is."""

READ_CHARACTERS = 1 << 20
MAX_VALUE_CHARACTERS = 64 << 20
"""Of a JSON value, or of a cell: how far a quote or bracket that nobody closed is followed."""

ROW_GROUP_BYTES = 8 << 20
ROW_GROUP_ROWS = 16_384

MAX_DEPTH = 20
"""Of arrays and objects within each other; deeper ones are kept as JSON text."""

MAX_KEYS = 1_000
"""Of an object, in all rows together; objects whose keys are data are kept as JSON text."""

Fields = dict[str, Any]
"""A row: strings, or what JSON has."""

SCALARS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}

TEXT = pa.string()


def convert(path: Path, kind: str, url: str, target: Path, metadata: dict[bytes, bytes]) -> None:
    """Write the rows of a file to Parquet, with `metadata` in its footer. It is read twice: for the
    types of all columns, and for the values. Columns that a row lacks are null in it. Memory: a row
    group, or the longest row.

    Raises InputError if the file, which is called `url`, can't be read.
    """
    try:
        types = _csv_types(path, url) if kind == "csv" else _types(_rows(path, kind, url))
        if not types:
            raise InputError(f"{url}: is empty", "Remove it, or narrow `input.path`.")
        schema = pa.schema([*types.items()])
        with target.open("wb") as sink, parquet_writer(sink, schema) as writer:
            for chunk in _chunks(_rows(path, kind, url)):
                columns = {name: _array([row.get(name) for row in chunk], type_)
                           for name, type_ in types.items()}  # fmt: skip
                writer.write_table(pa.table(columns, schema=schema))
            writer.add_key_value_metadata(metadata)
    except UnicodeEncodeError:
        raise InputError(
            f"{url}: holds half a character (a lone surrogate)", "Write it anew as UTF-8."
        ) from None
    except pa.ArrowInvalid:
        raise InputError(
            f"{url}: a column has fractions, and whole numbers too large to stand beside",
            "Write its values as text, in quotes.",
        ) from None


def _chunks(rows: Iterable[tuple[Fields, int]]) -> Iterator[list[Fields]]:
    """Rows, each with its size, by row groups."""
    held: list[Fields] = []
    size = 0
    for row, row_size in rows:
        held.append(row)
        size += row_size
        if size >= ROW_GROUP_BYTES or len(held) >= ROW_GROUP_ROWS:
            yield held
            held, size = [], 0
    if held:
        yield held


# --- types -----------------------------------------------------------------------------------


def _types(rows: Iterable[tuple[Fields, int]]) -> dict[str, pa.DataType]:
    """Of all columns, in the order in which they appear."""
    types: dict[str, pa.DataType] = {}
    for chunk in _chunks(rows):
        for name in dict.fromkeys(chain.from_iterable(chunk)):
            known = types.get(name, pa.null())
            types[name] = _common(known, _type_of([row.get(name) for row in chunk])) or TEXT
    return types


def _type_of(values: list[Any], depth: int = 0) -> pa.DataType | None:
    """The Arrow type that holds these JSON values, a key that an object lacks being null; None if
    there is none: several kinds, integers beyond int64, objects that have no key or too many of
    them together, or nested deeper than Arrow's readers may follow."""
    values = [value for value in values if value is not None]
    kinds = {*map(type, values)}
    if not kinds:
        return pa.null()
    if depth > MAX_DEPTH:
        return None
    if kinds == {list}:
        inner = _type_of([*chain.from_iterable(values)], depth + 1)
        return pa.list_(inner) if inner is not None else None
    if kinds == {dict}:
        keys = dict.fromkeys(chain.from_iterable(values))
        if len(keys) > MAX_KEYS:
            return None
        return _struct({key: _type_of([v.get(key) for v in values], depth + 1) for key in keys})
    if int in kinds and not all(-(1 << 63) <= v < 1 << 63 for v in values if type(v) is int):
        return None
    if kinds == {int, float}:
        return pa.float64()
    return SCALARS.get(kinds.pop()) if len(kinds) == 1 else None


def _common(one: pa.DataType, other: pa.DataType | None) -> pa.DataType | None:
    """The type that holds what either holds; see `_type_of`."""
    if other is None or pa.types.is_null(other):
        return one if other is not None else None
    if pa.types.is_null(one) or one == other:
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _common(one.value_type, other.value_type)
        return pa.list_(inner) if inner is not None else None
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields: dict[str, pa.DataType | None] = {field.name: field.type for field in one}
        for field in other:
            fields[field.name] = _common(fields.get(field.name) or pa.null(), field.type)
        return _struct(fields)
    return None


def _struct(fields: dict[str, pa.DataType | None]) -> pa.DataType | None:
    if not 0 < len(fields) <= MAX_KEYS or None in fields.values():
        return None
    return pa.struct([*fields.items()])


def _array(values: list[Any], type_: pa.DataType) -> pa.Array:
    if type_ == TEXT:
        values = [
            v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False)
            for v in values
        ]
    return pa.array(values, type_)


# --- rows ------------------------------------------------------------------------------------


def _rows(path: Path, kind: str, url: str) -> Iterator[tuple[Fields, int]]:
    """Rows with their sizes, in characters. Raises InputError where the file is broken."""
    with _opened(path, kind, url) as file:
        if kind == "csv":
            yield from _csv_rows(file, url)
        elif kind == "json":
            yield from _json_rows(JsonReader(file, url))
        else:
            yield from (({"text": line.removesuffix("\n")}, len(line)) for line in file)


@contextmanager
def _opened(path: Path, kind: str, url: str) -> Iterator[IO[str]]:
    newline = "" if kind == "csv" else None  # line ends within quotes stay as they are
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise InputError(f"{url}: is not UTF-8", "Write it anew as UTF-8.") from error


def _csv_types(path: Path, url: str) -> dict[str, pa.DataType]:
    """Text, all of them, by the header."""
    with _opened(path, "csv", url) as file, _csv_errors(file, url) as reader:
        return dict.fromkeys(_header(reader, url), TEXT)


def _csv_rows(file: IO[str], url: str) -> Iterator[tuple[Fields, int]]:
    """Cells as they are written, None for an empty one and for those that a short row lacks. A
    blank line between rows is a row where there is one column, and nothing where there are more."""
    with _csv_errors(file, url) as reader:
        names = _header(reader, url)
        blank = 0
        for row in reader:
            if len(row) > len(names):
                raise InputError(
                    f"{url}: line {reader.line_num:,}: has {len(row)} cells, and the header "
                    f"{len(names)}",
                    'Put text with commas in it into quotes: "a, b".',
                )
            if not row:
                blank += len(names) == 1
                continue
            for _ in range(blank):
                yield {names[0]: None}, 0
            blank = 0
            yield dict(zip_longest(names, (cell or None for cell in row))), sum(map(len, row))


def _header(reader: Any, url: str) -> list[str]:
    cells: list[str] = next((row for row in reader if row), [])
    names = [name or f"Unnamed: {i}" for i, name in enumerate(cells)]
    if len(set(names)) < len(names):
        raise InputError(f"{url}: has two columns of the same name", "Rename one of them.")
    return names


@contextmanager
def _csv_errors(file: IO[str], url: str) -> Iterator[Any]:
    """A reader of the file, whose complaints become InputErrors."""
    csv.field_size_limit(MAX_VALUE_CHARACTERS)
    reader = csv.reader(file, strict=True)
    try:
        yield reader
    except csv.Error as error:
        raise InputError(
            f"{url}: line {reader.line_num:,}: not readable as CSV: {error}",
            'Quotes must be closed, and doubled within quotes: "a ""b"" c".',
        ) from error


def _json_rows(reader: JsonReader) -> Iterator[tuple[Fields, int]]:
    """Objects, one after the other or in one array, and their sizes. Strings in an array are
    objects with a `text`."""
    if reader.next_character() != "[":
        while reader.next_character():
            yield reader.row(in_array=False)
        return
    reader.skip()
    while reader.next_character() != "]":
        yield reader.row(in_array=True)
        if reader.next_character() == ",":
            reader.skip()
        elif reader.next_character() != "]":
            raise reader.error("the array is not closed")
    reader.skip()
    if reader.next_character():
        raise reader.error("something follows the array")


class JsonReader:
    """Reads JSON values from a file, one by one; no more than one and a piece is held."""

    def __init__(self, file: IO[str], url: str) -> None:
        self.file, self.url = file, url
        self.text, self.at = "", 0
        self.lines = 1  # that have begun before `text`
        self.decoder = json.JSONDecoder(object_pairs_hook=_object)

    def next_character(self) -> str:
        """The next one that isn't blank, which is not passed; empty at the file's end."""
        while True:
            self.at = BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._read_more():
                return self.text[self.at : self.at + 1]

    def skip(self) -> None:
        self.at += 1

    def row(self, in_array: bool) -> tuple[Fields, int]:
        """The object that begins here, and its size."""
        begin = self.next_character()
        if begin != "{" and not (in_array and begin == '"'):
            raise self.error("is not a JSON object")
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                break
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > MAX_VALUE_CHARACTERS or not self._read_more():
                    self.at = error.pos
                    raise self.error(error.msg) from error
            except RecursionError as error:
                raise self.error("is nested too deeply") from error
            except ValueError as error:
                raise self.error(str(error)) from error
        size, self.at = end - self.at, end
        return {"text": value} if isinstance(value, str) else value, size

    def error(self, wrong: str) -> InputError:
        line = self.lines + self.text.count("\n", 0, self.at)
        return InputError(
            f"{self.url}: line {line:,}: not readable as JSON: {wrong}",
            "A file holds one object per line, or one array of objects.",
        )

    def _read_more(self) -> bool:
        """Each time twice as much, so that a long value is not tried too often."""
        rest = self.text[self.at :]
        piece = self.file.read(max(READ_CHARACTERS, len(rest)))
        if piece:
            self.lines += self.text.count("\n", 0, self.at)
            self.text, self.at = rest + piece, 0
        return bool(piece)


BLANKS = re.compile(r"[ \t\r\n]*")


def _object(pairs: list[tuple[str, Any]]) -> Fields:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("an object has a key twice")
    return fields
