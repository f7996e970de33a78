"""The ledger of a run: what its engines did, when, and what of it is in committed parts.

    <output>/_axbatch/runs/<run>.json              the run's record, written anew while it goes on
    <output>/_axbatch/engines/<run>/<worker>.json  the last reading of an engine that died, until
                                                   the run's last record has told of it

Receipts carry their engine's reading, so the driver knows it up to the worker's last commit; a
worker whose engine dies leaves the last one on storage. Only of a worker that is killed itself,
what it did after its last commit is not known.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection
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
    gpus: int = 0
    reading: Reading = NOT_READ
    is_gone: bool = False
    """Its engine died, or another worker has taken its place."""


@dataclass
class Ledger:
    """Thread-safe: the display reads, and the report takes over the dead, while the driver adds."""

    run: str
    output: Folder
    replicas: int
    gpus_per_replica: int = 0
    """Of the lane that is on."""
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
        self._read: set[str] = set()
        """Files of dead workers that have been taken over."""
        self._dead: set[str] = set()
        self._hosts: set[str] = set()
        """Machines that were there."""
        self._open_places = 0
        """Of workers that went with them; nobody has taken these yet."""
        self._at_once = 0
        """Replicas that hold their GPUs from the lane's begin on, heard of or not."""
        self._lane_from_s, self._heard_before = 0.0, 0
        self._unheard_gpu_s = 0.0
        """Of the lanes that have ended."""
        self._lock = threading.RLock()

    def begin_lane(self, replicas: int, gpus_per_replica: int, at_once: int = 0) -> None:
        """Its workers are others than those of the lane before: these end, and nobody takes their
        place. Of its replicas, `at_once` are started now."""
        with self._lock:
            self.end_lane()
            self.replicas, self.gpus_per_replica = replicas, gpus_per_replica
            self._at_once, self._lane_from_s = at_once, self._now()
            self._open_places = 0
            self._heard_before = len(self.workers)

    def add(self, receipt: Receipt) -> None:
        with self._lock:
            now, worker, reading = self._now(), receipt.worker, receipt.engine
            known = self.workers.get(worker)
            if known is None:
                begun = max(0.0, now - reading.up_s)
                known = self.workers[worker] = WorkerLedger(begun, now, self.gpus_per_replica)
                if self._end_silent(worker):
                    self._mark(known.first_s, "replaced", worker)
                elif self._open_places:
                    self._open_places -= 1
                    self._mark(known.first_s, "replaced", worker)
            usage = receipt.counts.usage
            self.committed += usage
            self.rows += receipt.counts.rows
            since = max(0.0, now - receipt.seconds)
            amounts = (receipt.counts.rows, usage.prompt_tokens, usage.completion_tokens)
            for what, amount in zip(AMOUNTS, amounts, strict=True):
                self._bins.add(f"{worker} {what}", since, now, amount)
            before = known.reading
            if reading.up_s < before.up_s:
                return  # receipts may overtake each other
            span, busy = reading.up_s - before.up_s, reading.busy_s - before.busy_s
            self._bins.add(f"{worker} busy", max(0.0, now - span), now, busy)
            known.reading, known.last_s = reading, now
            if known.is_gone and worker not in self._dead:
                # It was only slow; so the one that is gone is another.
                known.is_gone = False
                self._open_places = max(0, self._open_places - 1)
                self._forget_silence(worker)
                self._end_silent(worker)

    def see_machines(self, hosts: Collection[str]) -> None:
        """`hosts` are there now. Workers of one that was and is no more are gone with it."""
        with self._lock:
            lost = self._hosts - set(hosts)
            self._hosts |= set(hosts)
            for worker in self._alive():
                if worker.rpartition(":")[0] in lost:
                    self._is_gone(worker)
                    self._open_places += 1

    def end_lane(self) -> None:
        """Its workers have nothing left to do."""
        with self._lock:
            now = self._now()
            for worker in self._alive():
                known = self.workers[worker]
                known.reading = _later(known.reading, now - known.last_s)
                known.is_gone = True
            self._unheard_gpu_s += self._unheard_of_lane()
            self._at_once = 0

    def read_the_dead(self) -> None:
        """Take over what workers left whose engines died. Raises StorageError."""
        for entry in self.output.list(f"{ENGINES}/{self.run}"):
            if entry.path not in self._read:
                record = json.loads(self.output.read(entry.path))
                self._take_over(record["worker"], record["at"], Reading.from_json(record["engine"]))
                self._read.add(entry.path)

    def forget_the_dead(self) -> None:
        """Drop what has been taken over, once the run's last record holds it: nobody reads it any
        more. What is left by workers that are late, or of a run that is killed, is a few hundred
        bytes and stays. Raises StorageError."""
        if self._read:
            self.output.delete_folder(f"{ENGINES}/{self.run}")

    def _take_over(self, worker: str, at: float, reading: Reading) -> None:
        """`at` is by the clock of the worker's machine, which may be another one's than ours."""
        with self._lock:
            heard = self.workers[worker].last_s if worker in self.workers else 0.0
            died = min(self._now(), max(heard, at - self.started.timestamp()))
            begun = max(0.0, died - reading.up_s)
            known = self.workers.setdefault(
                worker, WorkerLedger(begun, died, self.gpus_per_replica)
            )
            # Its last, whatever has been supposed of it since.
            known.reading, known.last_s, known.is_gone = reading, died, True
            self._dead.add(worker)
            self._forget_silence(worker)
            self._mark(died, "engine died", worker)

    @property
    def engine(self) -> Usage:
        """What all engines of the run did, by their own counters; and no less than what is
        committed, as a worker that is killed may not have told of all."""
        with self._lock:
            total = NOTHING_USED
            for worker in self.workers.values():
                total += worker.reading.usage
            pairs = zip(asdict(total).values(), asdict(self.committed).values(), strict=True)
            return Usage(*(max(did, kept) for did, kept in pairs))

    @property
    def lost(self) -> Usage:
        """What they did for rows that are in no part of this run: it is done again."""
        with self._lock:
            pairs = zip(asdict(self.engine).values(), asdict(self.committed).values(), strict=True)
            return Usage(*(did - kept for did, kept in pairs))

    @property
    def gpu_s(self) -> float:
        """GPU-seconds that the replicas have taken so far; those too of one that is still loading
        its model."""
        with self._lock:
            heard = sum(worker.gpus * self._up_s_of(worker) for worker in self.workers.values())
            return heard + self._unheard_gpu_s + self._unheard_of_lane()

    @property
    def up_s(self) -> float:
        """Seconds that all replicas together have been up, their starts included."""
        with self._lock:
            return sum(map(self._up_s_of, self.workers.values()))

    @property
    def busy_share(self) -> float | None:
        """Share of that time in which their engines had work, as far as readings tell."""
        with self._lock:
            up = sum(worker.reading.up_s for worker in self.workers.values())
            busy = sum(worker.reading.busy_s for worker in self.workers.values())
            return busy / up if up else None

    def to_json(self) -> dict[str, Any]:
        with self._lock:
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
                            "busy": [
                                min(1.0, busy / bins.bin_s) for busy in bins.of(f"{name} busy")
                            ],
                        }
                        for name, worker in self.workers.items()
                    ],
                    "marks": sorted(self.marks, key=lambda mark: mark["at_s"]),
                },
            }

    def _now(self) -> float:
        return self.clock() - self.began

    def _up_s_of(self, worker: WorkerLedger) -> float:
        idle = 0.0 if worker.is_gone else self._now() - worker.last_s
        return worker.reading.up_s + idle

    def _unheard_of_lane(self) -> float:
        """GPU-seconds of its replicas that have not sent a receipt yet."""
        unheard = max(0, self._at_once - (len(self.workers) - self._heard_before))
        return unheard * self.gpus_per_replica * (self._now() - self._lane_from_s)

    def _alive(self) -> list[str]:
        return [name for name, worker in self.workers.items() if not worker.is_gone]

    def _end_silent(self, heard: str) -> bool:
        """If there is one worker too many, the one that was last heard of longest ago is gone, but
        not `heard`. Whether there was."""
        others = [name for name in self._alive() if name != heard]
        if len(others) < self.replicas:
            return False
        self._is_gone(min(others, key=lambda name: self.workers[name].last_s))
        return True

    def _is_gone(self, worker: str) -> None:
        """Since it was last heard of."""
        self.workers[worker].is_gone = True
        self._mark(self.workers[worker].last_s, SILENT, worker)

    def _forget_silence(self, worker: str) -> None:
        self.marks = [m for m in self.marks if (m["replica"], m["what"]) != (worker, SILENT)]

    def _mark(self, at_s: float, what: str, worker: str) -> None:
        self.marks.append({"at_s": round(at_s, 1), "what": what, "replica": worker})


def _later(reading: Reading, seconds: float) -> Reading:
    """The same, after so many idle seconds."""
    return Reading(reading.usage, reading.busy_s, reading.up_s + seconds)
