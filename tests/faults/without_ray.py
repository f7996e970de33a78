"""The command line with Ray left out: the worker is called in the driver's process.

A run is real in all else, is quick, and its storage calls are all made by one process.

    python -m tests.faults.without_ray run JOB.yaml
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pipeline.cluster
import pipeline.merging
import pipeline.report.reporter
import pipeline.worker
from pipeline.cli import command
from pipeline.config import JobConfig
from pipeline.config.running import ReplicaRange
from pipeline.plan import Plan
from pipeline.receipt import decode_receipt
from pipeline.records import Receipt
from pipeline.source import encode_unit, read_units
from pipeline.worker import Resources, Worker, WorkerSpec

T = TypeVar("T")
ONE = Resources(gpus=0, cpus=1, replicas=ReplicaRange(min=1, max=1))


@contextmanager
def no_cluster(job: JobConfig) -> Iterator[None]:
    yield


def receipts_here(plan: Plan, columns: list[str], spec: WorkerSpec) -> Iterator[Receipt]:
    worker = Worker(spec)
    with asyncio.Runner() as runner:
        for planned in plan.shards:
            shard = planned.shard
            for unit, rows in read_units(
                shard.source, shard.path, columns, list(planned.units()), shard.selected
            ):
                block = encode_unit(unit, shard.fingerprint, rows)
                receipt = decode_receipt(runner.run(worker(block))["receipt"][0])
                if receipt:
                    yield receipt


class InTurn(ThreadPoolExecutor):
    """Does what is submitted at once: so the storage calls of a run have one order."""

    def submit(self, function: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(function(*args, **options))
        return future


def leave_ray_out() -> None:
    pipeline.report.reporter.ThreadPoolExecutor = InTurn
    pipeline.merging.ThreadPoolExecutor = InTurn
    pipeline.cluster.ray_cluster = no_cluster
    pipeline.cluster.receipts = receipts_here
    pipeline.cluster.machines = set
    pipeline.cluster.replica_resources = lambda job, lane, units: ONE
    pipeline.worker.guard_children = lambda lock: None


if __name__ == "__main__":
    leave_ray_out()
    command()
