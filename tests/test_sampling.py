"""The sample of a plan: spread over all that is to do, and few bytes are read for it."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.errors import RowRejected
from pipeline.forecast.sampling import (
    DEPTH_BYTES,
    LEAST_PLACES,
    PLACES,
    ROWS_PER_PLACE,
    SAMPLE_BYTES,
    all_spans,
    take_sample,
)
from pipeline.storage import Folder
from tests.conftest import PreparedJob
from tests.forecasts import estimate

Prepare = Callable[..., PreparedJob]

ALL = PLACES * ROWS_PER_PLACE
MB = 1 << 20


class Counting:
    """A file that counts what is read of it."""

    def __init__(self, path: str, counts: list[int]) -> None:
        self._file, self._counts = open(path, "rb"), counts  # noqa: SIM115, PTH123

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._counts.append(len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each read of a file of Folder.open."""
    counts: list[int] = []

    def open_counting(_: Any, path: str) -> pa.NativeFile:
        return pa.PythonFile(Counting(path, counts), mode="r")

    monkeypatch.setattr(storage, "open_input", open_counting)
    yield counts


def test_a_small_job_is_sampled_whole(prepared: Prepare) -> None:
    job = prepared()
    for name, rows in (("a", 300), ("b", 1), ("c", 211)):
        texts = [f"{name} {n}" for n in range(rows)]
        job.write(f"{name}.parquet", {"text": texts}, row_group_size=50)
    sample = take_sample(all_spans(job.plan()), ["text"])
    expected = [f"{name} {n}" for name, rows in (("a", 300), ("b", 1), ("c", 211))
                for n in range(rows)]  # fmt: skip
    assert [row["text"] for _, row in sample.rows if not isinstance(row, RowRejected)] == expected
    assert (sample.of, sample.share) == (512, 1.0)


@pytest.mark.parametrize("group", [40, 999, 100_000])
def test_places_are_spread_evenly_over_all_rows(prepared: Prepare, group: int) -> None:
    job = prepared()
    for part in range(4):
        numbers = range(part * 5_000, (part + 1) * 5_000)
        data = {"text": [str(n) for n in numbers]}
        job.write(f"{part}.parquet", data, row_group_size=group)
    sample = take_sample(all_spans(job.plan()), ["text"])
    found: dict[int, list[int]] = {}
    for place, row in sample.rows:
        assert not isinstance(row, RowRejected)
        found.setdefault(place, []).append(int(row["text"]))
    assert sorted(found) == list(range(PLACES))
    for place, rows in found.items():
        assert rows == list(range(rows[0], rows[0] + ROWS_PER_PLACE))
        assert place * 20_000 / PLACES <= rows[0] < (place + 1) * 20_000 / PLACES


def test_only_what_is_to_do_is_sampled_and_the_same_each_time(prepared: Prepare) -> None:
    texts = ["short"] * 1_000 + ["a text of five words"] * 1_000
    job = prepared(texts, input={"rows_per_unit": 100})
    made = job.plan()
    for unit in list(made.shards[0].units())[:10]:
        job.commit(made, unit)
    first = estimate(job)
    assert (first.rows, first.covers) == (1_000, "to do")
    assert first.characters.mid == 1_000 * len(texts[-1]) == first.characters.low
    assert estimate(job) == first


def test_of_a_finished_job_all_rows_are_estimated(prepared: Prepare) -> None:
    job = prepared(["one two"] * 30)
    made = job.plan()
    for unit in made.shards[0].units():
        job.commit(made, unit)
    found = estimate(job)
    assert (found.rows, found.covers) == (30, "all")


def test_a_large_row_group_is_read_at_its_head_alone(
    prepared: Prepare, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.forecast.sampling.DEPTH_BYTES", 2 * MB)
    texts = [f"{n} " + os.urandom(256).hex() for n in range(100_000)]
    job = prepared()
    path = job.write("a.parquet", {"text": texts}, row_group_size=10**6, compression="none",
                     use_dictionary=False)  # fmt: skip
    assert path.stat().st_size > 48 * MB
    spans = all_spans(job.plan())
    reads.clear()
    sample = take_sample(spans, ["text"])
    numbers = [int(row["text"].split()[0]) for _, row in sample.rows
               if not isinstance(row, RowRejected)]  # fmt: skip
    assert len(set(numbers)) == ALL and numbers == sorted(numbers)
    assert 3_000 < max(numbers) < 5_000  # the places are spread over what may be read
    assert sum(reads) < 5 * MB


def test_many_large_files_are_read_in_little_pieces(prepared: Prepare, reads: list[int]) -> None:
    """One real file under two hundred names: the plan can't tell."""
    texts = [os.urandom(1_000).hex() for _ in range(8_000)]
    job = prepared()
    base = job.write("000.parquet", {"text": texts, "other": texts}, row_group_size=4_000,
                     compression="none", use_dictionary=False)  # fmt: skip
    for number in range(1, 200):
        os.link(base, base.with_name(f"{number:03}.parquet"))
    made = job.plan()
    assert sum(shard.shard.bytes for shard in made.shards) > 6_000 * MB
    reads.clear()
    sample = take_sample(all_spans(made), ["text"])
    assert len(sample.rows) == ALL and len({row.place for row in sample.rows}) == PLACES
    assert sum(reads) < DEPTH_BYTES + PLACES * 3 * MB


@pytest.mark.s3
def test_objects_are_sampled_as_files_are(prepared: Prepare, s3_url: str) -> None:
    texts = [f"{n} " + "word " * (n % 50) for n in range(5_000)]
    job = prepared()
    path = job.write("a.parquet", {"text": texts}, row_group_size=700)
    Folder(f"{s3_url}/sampled").replace("a.parquet", path.read_bytes())
    local, remote = (
        take_sample(all_spans(each.plan()), ["text"])
        for each in (job, job.changed(input={"path": f"{s3_url}/sampled"}))
    )
    assert remote == local and len(local.rows) == ALL


@pytest.mark.parametrize("dictionary", [False, True])
def test_few_long_rows_are_taken(prepared: Prepare, dictionary: bool) -> None:
    """Also where the footer says that they are short, as it counts a repeated text once."""
    text = "word " * 60_000
    texts = [text if dictionary else f"{n} {text}" for n in range(200)]
    job = prepared()
    job.write("a.parquet", {"text": texts}, row_group_size=20, use_dictionary=dictionary)
    sample = take_sample(all_spans(job.plan()), ["text"])
    assert LEAST_PLACES <= len(sample.rows) <= SAMPLE_BYTES / len(text) + 1
    assert len({row.place for row in sample.rows}) == len(sample.rows)
