"""Batch API files: every line becomes a row, and a bad one a row that says what is wrong."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import make_batch_data
from pipeline import batch_file
from pipeline.batch_file import read_request, split_lines
from pipeline.errors import InputError, JobFileError
from tests.batches import ANSWERS, BAD_LINES, ERRORS, SECRET, Batch, as_line, request, without


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_is_a_row_that_says_what_is_wrong(batch: Batch, line: bytes) -> None:
    batch.write(as_line(request(1)), b"", line, as_line(request(2)))
    rows = batch.staged().to_pylist()
    assert [row["line"] for row in rows] == [1, 3, 4]
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert BAD_LINES[line] in rows[1]["error"] and SECRET not in rows[1]["error"]
    assert rows[1]["body"] is None


def test_what_is_known_of_a_bad_line_is_kept() -> None:
    assert read_request(as_line(without("body"))).custom_id == "r0"


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf%b\r\n\r\n%b\r\n",
        b"%b\n  \n%b",
        b" %b \n\t\n%b\n\n\n",
    ],
)
def test_line_ends_blanks_and_byte_order_mark_do_no_harm(batch: Batch, text: bytes) -> None:
    batch.write(text % (as_line(request(1)), as_line(request(2))))
    rows = batch.staged().to_pylist()
    assert [(row["line"], row["custom_id"]) for row in rows] == [(1, "r1"), (3, "r2")]
    assert [row["error"] for row in rows] == [None, None]


def test_line_too_long_is_a_bad_line(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 1 << 20)
    long = as_line(request(2, padding="x" * (3 << 20)))
    batch.write(as_line(request(1)), long, as_line(request(3)))
    errors = batch.staged()["error"].to_pylist()
    assert errors == [None, "is longer than 1 MiB", None]


@given(st.lists(st.binary(max_size=9)), st.integers(1, 5))
def test_lines_are_those_between_newlines(parts: list[bytes], piece: int) -> None:
    text = b"\n".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_file, "READ_BYTES", piece)
        lines = list(split_lines(pa.BufferReader(text), limit=5))
    expected = text.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert lines == [line if len(line) <= 5 else None for line in expected]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(), VALUES), st.booleans())
def test_any_body_survives(body: dict[str, Any], is_ascii: bool) -> None:
    line = json.dumps(request(1, body=body), ensure_ascii=is_ascii).encode()
    made = read_request(line)
    assert made.error is None and made.body is not None
    assert json.loads(made.body) == body


def test_staging_needs_no_more_memory_for_more_lines(batch: Batch) -> None:
    line = as_line(request(1, body={"padding": "word " * 200}))
    with (batch.source / "requests.jsonl").open("wb") as file:
        for _ in range(100_000):
            file.write(line + b"\n")
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert batch.plan().rows == 100_000
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert python < 3 * batch_file.ROW_GROUP_BYTES
    assert 0 < pool.max_memory() < 4 * batch_file.ROW_GROUP_BYTES
    assert len(line) * 100_000 > 12 * batch_file.ROW_GROUP_BYTES


def test_parquet_among_the_requests_is_refused(
    batch: Batch, write_parquet: Callable[..., Path]
) -> None:
    write_parquet(batch.source / "a.parquet", {"text": ["x"]})
    with pytest.raises(InputError, match=r"a\.parquet: is Parquet"):
        batch.plan()


def test_same_file_staged_as_plain_json_is_not_taken_for_it(tmp_path: Path, batch: Batch) -> None:
    batch.write(as_line(request(1)))
    plain = {"path": str(batch.source)}
    translate = {"kind": "translate", "text": "custom_id", "source": "en", "target": "ko"}
    other = Batch(tmp_path, input=plain, task=translate)
    assert "line" not in other.staged().column_names
    assert "line" in batch.staged().column_names


@pytest.mark.parametrize("text", [b"", b"\n\n"])
def test_file_without_lines_has_no_answers(batch: Batch, text: bytes) -> None:
    batch.write(text)
    assert batch.run().rows == 0
    assert (batch.lines(ANSWERS), batch.lines(ERRORS)) == ([], [])


def test_format_and_kind_go_together(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"input\.format"):
        Batch(tmp_path, input={"path": str(tmp_path)})
    translate = {"kind": "translate", "text": "text", "source": "en", "target": "ko"}
    with pytest.raises(JobFileError, match=r"input\.format"):
        Batch(tmp_path, task=translate)
    with pytest.raises(ValueError, match="goes with `path`"):
        Batch(tmp_path, input={"dataset": "x", "format": "openai-batch"})


def test_sample_is_what_the_script_makes() -> None:
    lines = "".join(f"{line}\n" for line in make_batch_data.make_lines())
    assert make_batch_data.DATA_FILE.read_text(encoding="utf-8") == lines
