"""Publishes each shard as soon as its last receipt is in, beside the run, off the engines' path."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from types import TracebackType

from pipeline.attempts import ATTEMPTS
from pipeline.batch_file import writing_lines
from pipeline.merging import publish, republish
from pipeline.parts import PARTS, Stamp, result_fields
from pipeline.plan import Plan, ShardPlan
from pipeline.records import Counts, Receipt, Unit
from pipeline.storage import Folder
from pipeline.task import Task

# Merging streams, and Arrow works outside of Python's lock: a few threads of the driver keep up
# with any number of engines that produce text.
THREADS = 4
STORE_THREADS = 16
"""Of an object store: a small file takes a dozen requests there, one after the other."""


class Publisher:
    """Knows how many rows each shard still lacks. Leave its block to wait for what is under way."""

    def __init__(
        self,
        plan: Plan,
        output: Folder,
        task: Task,
        column: str,
        run: str,
        has_texts: bool = False,
    ) -> None:
        """`has_texts` as `accounting.rows`."""
        self.counts = plan.published_counts
        """Of all rows in published shards."""
        self._identity = plan.identity
        self._output = output
        self._fields = result_fields(column, task.output_type, has_texts)
        self._lines = partial(writing_lines, output, column)
        self._run = run
        self._plan = plan
        self._shards: dict[str, ShardPlan] = {}
        self._missing: dict[str, int] = {}
        self._deferred: defaultdict[str, list[Unit]] = defaultdict(list)
        """Units that leave rows to the next lane."""
        self.missing_rows = 0
        """That have no receipt yet, of what is expected."""
        self._received: dict[str, set[int]] = {}
        threads = THREADS if output.is_local else STORE_THREADS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="publish")
        self._under_way = 0
        self._through: SimpleQueue[Future[Counts]] = SimpleQueue()

    def __enter__(self) -> Publisher:
        for key in self._plan.leftovers:
            self._output.delete_folder(f"{PARTS}/{key}")
            self._output.delete_folder(f"{ATTEMPTS}/{key}")
        self.expect(self._plan)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            while error is None and self._under_way:
                self._collect(self._through.get())
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def expect(self, plan: Plan) -> None:
        """Publish the plan's shards too, each when its last receipt is in; those that are complete
        already at once."""
        for planned in plan.unpublished:
            self._shards[planned.key] = planned
            self._missing[planned.key] = planned.pending_rows
            self._deferred[planned.key] = [*planned.deferred.units]
            self._received[planned.key] = set()
        self.missing_rows += plan.pending_rows
        for planned in plan.unpublished:
            if not planned.pending_rows:
                self._publish(planned.key)

    @property
    def waiting(self) -> list[ShardPlan]:
        """Shards that a lane has completed but for the rows that it deferred."""
        return [
            replace(planned, deferred=replace(planned.deferred, units=(*self._deferred[key],)))
            for key, planned in self._shards.items()
            if self._deferred[key] and not self._missing[key]
        ]

    def received(self, receipt: Receipt) -> None:
        """Count a committed unit, once; publish its shard if it was the last. Raises what went
        wrong with a shard before: engines must not work on for an output that can't be written."""
        while not self._through.empty():
            self._collect(self._through.get())
        unit = receipt.unit
        if unit.start in self._received[unit.shard]:
            return
        self._received[unit.shard].add(unit.start)
        if receipt.counts.deferred:
            self._deferred[unit.shard].append(unit)
        self._missing[unit.shard] -= unit.rows
        self.missing_rows -= unit.rows
        if self._missing[unit.shard] == 0:
            self._publish(unit.shard)

    def _collect(self, published: Future[Counts]) -> None:
        self._under_way -= 1
        self.counts.add(published.result())

    def _publish(self, key: str) -> None:
        """Unless rows of it wait for the next lane, which completes it."""
        self._received[key].clear()
        if self._deferred[key]:
            return
        self._under_way += 1
        self._pool.submit(self._merge, self._shards[key]).add_done_callback(self._through.put)

    def _merge(self, planned: ShardPlan) -> Counts:
        overlay, planned = planned.overlay, planned.completes or planned
        shard = planned.shard
        also = self._lines if shard.is_batch else None
        if shard.selected is not None:
            counts = republish(
                self._output, shard.name, shard.selected, planned.key, self._run, overlay, also
            )
        else:
            stamp = Stamp(
                identity=self._identity,
                shard=shard.name,
                fingerprint=shard.fingerprint,
                start=0,
                stop=shard.rows,
                counts=Counts(),
                run=self._run,
            )
            counts = publish(
                shard.source,
                shard.path,
                self._output,
                stamp,
                planned.key,
                self._fields,
                shard.check_unchanged,
                overlay,
                also,
            )
        self._output.delete_folder(f"{ATTEMPTS}/{shard.name}")
        return counts
