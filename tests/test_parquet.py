"""Rows as they are read: a value that Python lacks is its row's error, the others are whole."""

import pyarrow as pa
import pytest

from pipeline.errors import RowRejected
from pipeline.parquet import python_rows

NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 3, pa.array([b"a", b"\xff", b"c"], pa.binary()).buffers()
)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (NOT_UTF8, "invalid_utf8"),
        (pa.array([0, 9_000_000, 1], pa.int32()).cast(pa.date32()), "bad_value: odd"),
        (pa.array([0, 2**62, 1], pa.timestamp("us", "UTC")), "bad_value: odd"),
        (pa.array([0, 2**62, 1], pa.duration("s")), "bad_value: odd"),
    ],
)
def test_value_that_python_lacks_is_its_rows_error(column: pa.Array, reason: str) -> None:
    table = pa.table({"n": [1, 2, 3], "odd": column})
    for rows in (python_rows(table), python_rows(table.to_batches()[0])):
        first, bad, last = rows
        assert isinstance(bad, RowRejected)
        assert bad.reason == reason
        assert first == {"n": 1, "odd": column[0].as_py()}
        assert last == {"n": 3, "odd": column[2].as_py()}
