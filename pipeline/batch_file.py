"""Files of the Batch API: requests, a JSON line each, become Parquet; results become such lines.

    <input>/news.jsonl          {"custom_id": …, "method": …, "url": …, "body": {…}}
    <output>/news.parquet       a row per line that isn't blank, in order
    <output>/news_output.jsonl  {"id": …, "custom_id": …, "response": {…}, "error": null}
    <output>/news_error.jsonl   the same of rows that are not ok, with {"code", "message", "line"}

Format: https://platform.openai.com/docs/api-reference/batch. What is a line and what is none is
decided as by vLLM's `run_batch`, by the same JSON parser (pydantic's); but there one bad line ends
the job, while here it becomes a row with an `error`. Two lines with the same `custom_id` are both
answered, as there: to refuse them, as OpenAI does, all ids would have to be held.

A line's `id` follows from the job's identity, the file's name and the line's number. So a file
that this job wrote is known by its first bytes, and lines can be made again to be compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic_core import from_json

from pipeline.errors import InputError, NoSuchFileError, RefusedError, VerifyError
from pipeline.filesystems import storage_errors
from pipeline.parquet import input_errors, open_parquet, parquet_writer, read_batches
from pipeline.parts import Stamp
from pipeline.staging import SOURCE_KEY, STAGED, short_hash, stage_once, staged_name, suffix_of
from pipeline.storage import Entry, Folder

FORMAT = "openai-batch"
"""The value of `input.format`."""

MAX_LINE_BYTES = 64 << 20
READ_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

ROW_GROUP_BYTES = 8 << 20
ROW_GROUP_ROWS = 16_384

SCHEMA = pa.schema([
    ("line", pa.int64()),  # counts from 1, blank lines too
    ("custom_id", pa.string()),
    ("method", pa.string()),
    ("url", pa.string()),
    ("body", pa.string()),  # JSON
    ("error", pa.string()),  # why the line is no request; null if it is one
])  # fmt: skip


class Request(NamedTuple):
    """One line. All but `custom_id` is None if there is an `error`."""

    custom_id: str | None = None
    method: str | None = None
    url: str | None = None
    body: str | None = None
    error: str | None = None


def stage_requests(
    source: Folder, entry: Entry, output: Folder, staged: Collection[str] = ()
) -> Entry:
    """Stage one file of requests, see `stage_file`. Memory: a row group, or the longest line.

    Raises InputError if the file is Parquet, or gone.
    """
    url = f"{source.url}/{entry.path}"
    if suffix_of(entry.path) in (".parquet", ".pq"):
        raise InputError(
            f"{url}: is Parquet, and `input.format` is {FORMAT}",
            "Narrow `input.path` to the files of requests, or leave `input.format` out.",
        )
    target = f"{STAGED}/{short_hash(f'{FORMAT} {entry.fingerprint}')}/{staged_name(entry.path)}"

    def write(_: str, path: Path) -> None:
        with path.open("wb") as sink, parquet_writer(sink, SCHEMA) as writer:
            for table in _row_groups(_lines_of(source, entry.path)):
                writer.write_table(table)
            writer.add_key_value_metadata({SOURCE_KEY: entry.fingerprint.encode()})

    return stage_once(output, target, entry.fingerprint, write, staged)


def _lines_of(source: Folder, path: str) -> Iterator[bytes | None]:
    """See `split_lines`. A byte order mark is left out: some editors put one before line 1."""
    url = f"{source.url}/{path}"
    try:
        with storage_errors(url), source.open(path) as file:
            lines = split_lines(file, MAX_LINE_BYTES)
            first = next(lines, b"")
            yield first and first.removeprefix(BYTE_ORDER_MARK)
            yield from lines
    except FileNotFoundError as error:
        raise NoSuchFileError(f"{url}: no such file") from error


def split_lines(file: pa.NativeFile, limit: int) -> Iterator[bytes | None]:
    """Lines without their `\\n`; None in the place of one longer than `limit` bytes, of which no
    more than that is held."""
    held, is_long = bytearray(), False
    while piece := file.read(READ_BYTES):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            is_long = is_long or len(held) + len(end) > limit
            yield None if is_long else bytes(held + end)
            held, is_long = bytearray(), False
        held += rest
        if len(held) > limit:
            held, is_long = bytearray(), True
    if held or is_long:
        yield None if is_long else bytes(held)


def _row_groups(lines: Iterator[bytes | None]) -> Iterator[pa.Table]:
    """Tables of SCHEMA, a row per line that isn't blank."""
    rows: list[tuple[Any, ...]] = []
    size = 0
    for number, line in enumerate(lines, start=1):
        if line is not None and not line.strip():
            continue
        rows.append((number, *read_request(line)))
        size += len(line or b"")
        if size >= ROW_GROUP_BYTES or len(rows) >= ROW_GROUP_ROWS:
            yield _table(rows)
            rows, size = [], 0
    yield _table(rows)


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = [*zip(*rows, strict=True)] or [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.table(arrays, schema=SCHEMA)


def read_request(line: bytes | None) -> Request:
    """What the line asks for, or why it asks for nothing; without any of its text. None is a line
    that is too long."""
    if line is None:
        return Request(error=f"is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        fields = from_json(line, allow_inf_nan=False)
    except ValueError as error:
        return Request(error=f"is not valid JSON: {_within_the_line(str(error))}")
    if not isinstance(fields, dict):
        return Request(error="is not a JSON object")
    custom_id = fields.get("custom_id")
    known = custom_id if isinstance(custom_id, str) else None
    for key in ("custom_id", "method", "url"):
        if not isinstance(fields.get(key), str):
            return Request(known, error=_what_is_wrong(key, fields, "a string"))
    if not isinstance(fields.get("body"), dict):
        return Request(known, error=_what_is_wrong("body", fields, "an object"))
    try:
        body = json.dumps(fields["body"], ensure_ascii=False, allow_nan=False)
    except ValueError:
        return Request(known, error="has a number in its `body` that is too large")
    return Request(known, fields["method"], fields["url"], body)


def _within_the_line(message: str) -> str:
    """The parser's message: it counts lines of its own, and the line ends before its `\\r`."""
    return re.sub(r" at line \d+ column", " at byte", message)


def _what_is_wrong(key: str, fields: dict[str, Any], expected: str) -> str:
    return f"`{key}` is not {expected}" if key in fields else f"has no `{key}`"


def files_beside(name: str) -> tuple[str, str]:
    """The files of answers and of errors that belong to the output file `name`."""
    stem = name.removesuffix(".parquet")
    return f"{stem}_output.jsonl", f"{stem}_error.jsonl"


def check_not_others(output: Folder, name: str, identity: str, made: Collection[str]) -> None:
    """Raises RefusedError if one of `files_beside` is among the files `made` and is not by this
    job, which would write over it."""
    beginning = f'{{"id": "{_id_prefix(identity, name)}'.encode()
    for path in files_beside(name):
        if path not in made:
            continue
        with output.open(path) as file:
            found = file.read(len(beginning))
        if found and found != beginning:
            raise RefusedError(
                f"{output.url}/{path}: is there already and is not this job's output",
                "Choose an empty `output.path`, or move the file away.",
            )


@contextmanager
def writing_lines(
    output: Folder, column: str, stamp: Stamp
) -> Iterator[Callable[[pa.Table], None]]:
    """Write `files_beside` anew from the rows of a shard, tables of which the block gets to give.
    Each appears under its name only if the block ends well."""
    answers, errors = files_beside(stamp.shard)
    with output.replacing(answers) as ok_sink, output.replacing(errors) as error_sink:

        def add(table: pa.Table) -> None:
            for is_ok, line in result_lines(table, column, stamp):
                (ok_sink if is_ok else error_sink).write(line)

        yield add


def check_lines(output: Folder, column: str, stamp: Stamp) -> None:
    """Compare `files_beside` with the rows of their shard, line by line.

    Raises VerifyError for the first line that differs, is missing or is too many.
    """
    paths = files_beside(stamp.shard)
    lines = [_present_lines(output, path) for path in paths]
    counts = [0, 0]
    url = f"{output.url}/{stamp.shard}"
    with input_errors(url), output.open(stamp.shard) as file:
        for batch in read_batches(open_parquet(file), url, columns=_columns(column)):
            for is_ok, expected in result_lines(pa.Table.from_batches([batch]), column, stamp):
                which = 0 if is_ok else 1
                counts[which] += 1
                if next(lines[which], None) != expected:
                    raise _differs(output, paths[which], counts[which], stamp.shard)
    for path, rest, count in zip(paths, lines, counts, strict=True):
        if next(rest, None) is not None:
            raise _differs(output, path, count + 1, stamp.shard)


def _present_lines(output: Folder, path: str) -> Iterator[bytes]:
    try:
        with output.open(path) as file:
            for line in split_lines(file, 4 * MAX_LINE_BYTES):
                yield (line or b"") + b"\n"
    except FileNotFoundError:
        return


def _differs(output: Folder, path: str, number: int, name: str) -> VerifyError:
    return VerifyError(
        f"{output.url}/{path}: line {number:,} is not what {name} has, or is missing",
        f"After a retry that was broken off, repeat the retry. Else delete {name} and this file, "
        "and run the job again.",
    )


def _columns(column: str) -> list[str]:
    return ["line", "custom_id", "error", column, "_status", "_reason"]


def result_lines(table: pa.Table, column: str, stamp: Stamp) -> Iterator[tuple[bool, bytes]]:
    """Whether a row is ok, and its line; `column` holds its answer, a JSON object in one line."""
    prefix = _id_prefix(stamp.identity, stamp.shard)
    columns = [table[name].to_pylist() for name in _columns(column)]
    for number, custom_id, bad, answer, status, reason in zip(*columns, strict=True):
        is_ok = status == "ok"
        line_id = f"{prefix}{number:08x}"
        if is_ok:
            tail = _answer(answer, line_id)
        else:
            tail = _error(number, status, reason, line_id, was_sent=bad is None)
        head = f'{{"id": "{line_id}", "custom_id": {_json(custom_id)}'
        yield is_ok, _one_line(f"{head}, {tail}}}").encode() + b"\n"


def _answer(body: str, line_id: str) -> str:
    # Not parsed and written again: it is one JSON object already.
    return (
        f'"response": {{"status_code": 200, "request_id": "{_request_id(line_id)}", '
        f'"body": {body}}}, "error": null'
    )


def _error(number: int, status: str, reason: str, line_id: str, was_sent: bool) -> str:
    """`response` and `error` of a row that is not ok; a line that is none has no response."""
    code, _, detail = reason.partition(": ")
    error = {"code": code, "message": detail or code, "line": number}
    response = None
    if was_sent:
        was_refused = status == "rejected"
        kind = "invalid_request_error" if was_refused else "server_error"
        body = {"message": detail or code, "type": kind, "param": None, "code": code}
        response = {
            "status_code": 400 if was_refused else 500,
            "request_id": _request_id(line_id),
            "body": {"error": body},
        }
    return f'"response": {_json(response)}, "error": {_json(error)}'


def _id_prefix(identity: str, name: str) -> str:
    digest = hashlib.sha256(json.dumps([identity, name]).encode()).hexdigest()
    return f"batch_req_{digest[:24]}"


def _request_id(line_id: str) -> str:
    return line_id.removeprefix("batch_")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _one_line(text: str) -> str:
    """Python's `splitlines`, by which scripts read such files, ends lines at these as well."""
    for character in "\x85\u2028\u2029":
        if character in text:
            text = text.replace(character, f"\\u{ord(character):04x}")
    return text
