"""The publisher: a shard appears when its last receipt is in, and its troubles stop the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs import load_task
from pipeline.config import JobConfig
from pipeline.errors import RefusedError
from pipeline.plan import Plan
from pipeline.publishing import Publisher
from pipeline.records import Counts, Receipt, Unit
from pipeline.storage import Folder


class Running:
    """A job of two files of 40 rows, its plan, and its units committed one by one."""

    def __init__(
        self,
        folder: Path,
        job: Callable[..., JobConfig],
        plan: Callable[[JobConfig], Plan],
        write_parquet: Callable[..., Path],
        commit: Callable[..., bool],
    ) -> None:
        self.input = [folder / "in" / name for name in ("a.parquet", "b.parquet")]
        for path in self.input:
            write_parquet(path, {"text": [str(row) for row in range(40)]})
        self.job = job(folder, input={"rows_per_unit": 10})
        self.plan = plan(self.job)
        self.output = Folder(self.job.output.path)
        self._commit = commit

    def publisher(self) -> Publisher:
        return Publisher(self.plan, self.output, load_task(self.job), "ko", "run")

    def receipts(self, shard: int) -> list[Receipt]:
        planned = self.plan.shards[shard]
        units = list(planned.units())
        for unit in units:
            self._commit(self.output, unit, self.plan.identity, planned.shard.fingerprint)
        return [Receipt(unit, Counts(), "here:1", 0.0) for unit in units]


@pytest.fixture
def running(
    tmp_path: Path,
    job: Callable[..., JobConfig],
    plan: Callable[[JobConfig], Plan],
    write_parquet: Callable[..., Path],
    commit: Callable[..., bool],
) -> Running:
    return Running(tmp_path, job, plan, write_parquet, commit)


def test_shard_is_published_only_with_its_last_receipt_and_repeated_ones_count_once(
    running: Running,
) -> None:
    with running.publisher() as publisher:
        first, *others = running.receipts(0)
        for receipt in [first, first, first, first, *others[:-1]]:
            publisher.received(receipt)
    assert not Path(running.output.url, "a.parquet").exists()

    with running.publisher() as publisher:
        for receipt in running.receipts(0):
            publisher.received(receipt)
    assert pq.read_table(Path(running.output.url, "a.parquet")).num_rows == 40
    assert publisher.counts.rows == 40


def test_shards_complete_before_the_run_are_published_by_it(
    running: Running, plan: Callable[[JobConfig], Plan]
) -> None:
    running.receipts(0)
    running.receipts(1)
    running.plan = plan(running.job)
    with running.publisher() as publisher:
        pass
    assert publisher.counts.rows == 80
    assert not plan(running.job).unpublished


def test_input_replaced_while_the_job_runs_is_refused_and_stops_it(
    running: Running, write_parquet: Callable[..., Path]
) -> None:
    receipts = running.receipts(0)
    write_parquet(running.input[0], {"text": ["another text"] * 40})
    with pytest.raises(RefusedError, match=r"a\.parquet"), running.publisher() as publisher:
        for receipt in receipts:
            publisher.received(receipt)
    assert not Path(running.output.url, "a.parquet").exists()


def test_parts_that_outlived_their_publishing_are_dropped(
    running: Running, plan: Callable[[JobConfig], Plan], commit: Callable[..., bool]
) -> None:
    with running.publisher() as publisher:
        for receipt in running.receipts(0):
            publisher.received(receipt)
    planned = running.plan.shards[0]
    unit, fingerprint = Unit(planned.key, 0, 10), planned.shard.fingerprint
    commit(running.output, unit, running.plan.identity, fingerprint)
    running.plan = plan(running.job)
    with running.publisher():
        pass
    assert not running.output.list("_axbatch/parts")
    assert pq.read_table(Path(running.output.url, "a.parquet")).num_rows == 40


def test_input_replaced_after_its_rows_were_done_is_not_published(
    running: Running, write_parquet: Callable[..., Path]
) -> None:
    receipts = running.receipts(0)
    write_parquet(running.input[0], {"text": [f"new {row}" for row in range(40)]})
    refused = pytest.raises(RefusedError, match="was replaced while the job ran")
    with refused, running.publisher() as publisher:
        for receipt in receipts:
            publisher.received(receipt)
    assert not running.output.exists("a.parquet")
