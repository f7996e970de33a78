"""The ledger of a run: what its engines did, when, and what of it is in committed parts.

    <output>/_axbatch/runs/<run>.json              the run's record, written anew while it goes on
    <output>/_axbatch/engines/<run>/<worker>.json  the last reading of an engine that died

Receipts carry their engine's reading, so the driver knows it up to the worker's last commit; a
worker whose engine dies leaves the last one on storage. Only of a worker that is killed itself,
what it did after its last commit is not known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline.accounting import NOTHING_USED, Usage
from pipeline.meter import NOT_READ, Reading
from pipeline.records import Receipt
from pipeline.storage import Folder

State = Literal["running", "done", "interrupted", "stopped"]
"""Of a run."""

RUNS = "_axbatch/runs"
ENGINES = "_axbatch/engines"

BINS = 120
"""Most of them: when they are full, two become one."""
FIRST_BIN_S = 1.0
AMOUNTS = ("rows", "prompt", "completion")
SILENT = "last heard of"


def leave_reading(output: Folder, run: str, worker: str, reading: Reading) -> None:
    """What a worker does last whose engine has died. Raises StorageError."""
    record = {"worker": worker, "at": time.time(), "engine": reading.to_json()}
    output.replace(f"{ENGINES}/{run}/{worker.replace(':', '-')}.json", json.dumps(record).encode())


class Bins:
    """Amounts over time, in few bins whatever the run takes. Seconds from the run's begin."""

    def __init__(self) -> None:
        self.bin_s = FIRST_BIN_S
        self.series: dict[str, list[float]] = {}

    def add(self, name: str, start: float, stop: float, amount: float) -> None:
        """Spread `amount` evenly over [start, stop)."""
        while stop >= self.bin_s * BINS:
            self.bin_s *= 2
            for series in self.series.values():
                pairs = [sum(series[at : at + 2]) for at in range(0, len(series), 2)]
                series[:] = pairs
        first, last = int(start / self.bin_s), int(stop / self.bin_s)
        series = self.series.setdefault(name, [])
        series.extend([0.0] * (last + 1 - len(series)))
        for at in range(first, last + 1):
            begin, end = max(start, at * self.bin_s), min(stop, (at + 1) * self.bin_s)
            share = (end - begin) / (stop - start) if stop > start else 1.0
            series[at] += amount * share

    def of(self, name: str) -> list[float]:
        return [round(amount, 3) for amount in self.series.get(name, [])]


@dataclass
class WorkerLedger:
    """One worker, as its receipts tell. Times in seconds from the run's begin."""

    first_s: float
    last_s: float
    """Its last receipt."""
    reading: Reading = NOT_READ
    is_gone: bool = False
    """Its engine died, or another worker has taken its place."""


@dataclass
class Ledger:
    """Thread-safe enough: the driver alone adds, others read sums."""

    run: str
    output: Folder
    replicas: int
    gpus_per_replica: int = 0
    clock: Callable[[], float] = time.monotonic
    workers: dict[str, WorkerLedger] = field(default_factory=dict)
    committed: Usage = NOTHING_USED
    """Of the receipts."""
    rows: int = 0
    marks: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.started = datetime.now(UTC)
        self._bins = Bins()

    def begin_lane(self, replicas: int, gpus_per_replica: int) -> None:
        """Its workers are others than those of the lane before: these end, and nobody takes their
        place."""
        self.end_lane()
        self.replicas, self.gpus_per_replica = replicas, gpus_per_replica

    def add(self, receipt: Receipt) -> None:
        now, worker = self.clock() - self.began, receipt.worker
        known = self.workers.get(worker)
        if known is None:
            begun = max(0.0, now - receipt.engine.up_s)
            known = self.workers[worker] = WorkerLedger(begun, now)
            if len(self._alive()) > self.replicas:
                self._replace(worker)
        before = known.reading
        usage = receipt.counts.usage
        self.committed += usage
        self.rows += receipt.counts.rows
        since = max(0.0, now - receipt.seconds)
        amounts = (receipt.counts.rows, usage.prompt_tokens, usage.completion_tokens)
        for what, amount in zip(AMOUNTS, amounts, strict=True):
            self._bins.add(f"{worker} {what}", since, now, amount)
        if receipt.engine.up_s > before.up_s:
            span = receipt.engine.up_s - before.up_s
            busy = receipt.engine.busy_s - before.busy_s
            self._bins.add(f"{worker} busy", max(0.0, now - span), now, busy)
            known.reading = receipt.engine
        known.last_s = now

    def end_lane(self) -> None:
        """Its workers have nothing left to do."""
        now = self.clock() - self.began
        for worker in self._alive():
            known = self.workers[worker]
            known.reading = _later(known.reading, now - known.last_s)
            known.is_gone = True

    def read_the_dead(self) -> None:
        """Take over what workers left whose engines died. Raises StorageError."""
        folder = f"{ENGINES}/{self.run}"
        for entry in self.output.list(folder):
            record = json.loads(self.output.read(entry.path))
            worker, reading = record["worker"], Reading.from_json(record["engine"])
            now = max(0.0, record["at"] - self.started.timestamp())
            known = self.workers.setdefault(worker, WorkerLedger(now - reading.up_s, now))
            if known.reading.up_s < reading.up_s:
                known.reading, known.last_s, known.is_gone = reading, now, True
                self.marks = [
                    m for m in self.marks if m["replica"] != worker or m["what"] != SILENT
                ]
                self._mark(now, "engine died", worker)

    @property
    def engine(self) -> Usage:
        """What all engines of the run did, by their own counters."""
        total = NOTHING_USED
        for worker in self.workers.values():
            total += worker.reading.usage
        return total

    @property
    def lost(self) -> Usage:
        """What they did for rows that are in no part of this run: it is done again. Not below 0,
        though a killed worker may not have told of all."""
        pairs = zip(asdict(self.engine).values(), asdict(self.committed).values(), strict=True)
        return Usage(*(max(0, did - kept) for did, kept in pairs))

    @property
    def gpu_s(self) -> float:
        """GPU-seconds that the replicas have taken so far."""
        return self.gpus_per_replica * self.up_s

    @property
    def up_s(self) -> float:
        """Seconds that all replicas together have been up, their starts included."""
        now = self.clock() - self.began
        up = sum(worker.reading.up_s for worker in self.workers.values())
        return up + sum(now - self.workers[name].last_s for name in self._alive())

    @property
    def busy_share(self) -> float | None:
        """Share of that time in which their engines had work, as far as readings tell."""
        up = sum(worker.reading.up_s for worker in self.workers.values())
        busy = sum(worker.reading.busy_s for worker in self.workers.values())
        return busy / up if up else None

    def to_json(self) -> dict[str, Any]:
        bins = self._bins
        return {
            "started": self.started.isoformat(timespec="seconds"),
            "engine": asdict(self.engine),
            "committed": asdict(self.committed),
            "lost": asdict(self.lost),
            "gpus_per_replica": self.gpus_per_replica,
            "gpu_s": round(self.gpu_s, 1),
            "up_s": round(self.up_s, 1),
            "busy_share": self.busy_share,
            "timeline": {
                "bin_s": bins.bin_s,
                "replicas": [
                    {
                        "name": name,
                        "from_s": round(worker.first_s, 1),
                        "to_s": round(worker.last_s, 1),
                        **{what: bins.of(f"{name} {what}") for what in AMOUNTS},
                        "busy": [min(1.0, busy / bins.bin_s) for busy in bins.of(f"{name} busy")],
                    }
                    for name, worker in self.workers.items()
                ],
                "marks": sorted(self.marks, key=lambda mark: mark["at_s"]),
            },
        }

    def _alive(self) -> list[str]:
        return [name for name, worker in self.workers.items() if not worker.is_gone]

    def _replace(self, newcomer: str) -> None:
        """There is one worker too many: the one that was last heard of longest ago is gone."""
        others = [name for name in self._alive() if name != newcomer]
        gone = min(others, key=lambda name: self.workers[name].last_s)
        self.workers[gone].is_gone = True
        self._mark(self.workers[gone].last_s, SILENT, gone)
        self._mark(self.workers[newcomer].first_s, "replaced", newcomer)

    def _mark(self, at_s: float, what: str, worker: str) -> None:
        self.marks.append({"at_s": round(at_s, 1), "what": what, "replica": worker})


def _later(reading: Reading, seconds: float) -> Reading:
    """The same, after so many idle seconds."""
    return Reading(reading.usage, reading.busy_s, reading.up_s + seconds)
