"""Attempts: which rows were in an engine when it died, so that no row kills engines for ever.

    <machine's temporary folder>/<run>.<lane>.<pid>.journal  what is in a worker's engine now
    <output>/_axbatch/attempts/<shard>/<range>.<how>.<id>    one per crash and range, durable

A worker writes its journal before rows reach its engine; that is local, and costs microseconds.
When the engine dies, the worker turns what the journal holds into crash records and leaves; when
the worker itself dies, the next one of the run on that machine does it. A unit with two crashes is
suspect: it is done with nothing else in the engine, in pieces, of which each is a part of its own.
A piece that crashes alone is done row by row; a row that crashes alone has failed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import EngineError
from pipeline.records import Unit
from pipeline.storage import Folder

ATTEMPTS = "_axbatch/attempts"
CRASHES_OF_A_SUSPECT = 2
IDLE_DEATHS = 5
"""So many engines that die in a row on one machine, none having finished anything, are no row's
fault."""

JUDGING_DEATHS = 20
"""Nor are so many of which none has done more than to find that rows had killed those before."""

START_TRIES = 3
"""So often an engine is started where one has worked before."""

RECORD = re.compile(r"/(\d+)-(\d+)\.(alone|together)\.\w+")


class Crash(NamedTuple):
    """Rows that were in an engine that died; `alone` if they were all that was in it."""

    start: int
    stop: int
    alone: bool


class Journal:
    """What is in the engine of this worker, readable after its death. One per process."""

    def __init__(self, folder: Path, run: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{run}.{os.getpid()}.journal"
        # Locked as long as this process lives: so others know that the journal still grows.
        self._file = self.path.open("w", encoding="utf-8", buffering=1)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def close(self) -> None:
        """As the process's end does."""
        self._file.close()

    @contextmanager
    def holding(self, unit: Unit, alone: bool) -> Iterator[None]:
        """The block in which rows of `unit` are in the engine. What it raises leaves them there:
        it may be the engine's death."""
        line = [unit.shard, unit.start, unit.stop, alone]
        self._file.write(json.dumps(["in", *line]) + "\n")
        yield
        self._file.write(json.dumps(["out", *line]) + "\n")

    def judged(self, unit: Unit) -> None:
        """This row is known to kill engines: it has not been in this one, and is done."""
        self._file.write(json.dumps(["judged", unit.shard, unit.start, unit.stop, True]) + "\n")


def bury(journal: Path, output: Folder) -> None:
    """Turn what a dead worker's journal holds into crash records. Raises StorageError, and then
    the journal stays for the next one."""
    for shard, start, stop, alone in _held(journal):
        how = "alone" if alone else "together"
        name = f"{Unit(shard, start, stop).id}.{how}.{uuid.uuid4().hex[:8]}"
        output.create(f"{ATTEMPTS}/{shard}/{name}", journal.name.encode())
    journal.rename(journal.with_suffix(".buried"))


def bury_the_dead(folder: Path, run: str, lane: str, output: Folder) -> None:
    """Do so for all workers of the run that died on this machine. `lane` is what the names of its
    lane's journals begin with: when a lane is through, its idle workers end and are no deaths.

    Raises:
        EngineError: the last IDLE_DEATHS of the lane had finished nothing.
    """
    for journal in sorted(folder.glob(f"{run}.*.journal")):
        # Another worker that was started meanwhile may have buried it.
        with suppress(FileNotFoundError), journal.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # it lives
            bury(journal, output)
    buried = _buried(folder, lane)
    for deaths, has_worked in ((IDLE_DEATHS, _did_some), (JUDGING_DEATHS, _finished_some)):
        if len(buried) < deaths or any(map(has_worked, buried[-deaths:])):
            continue
        raise EngineError(
            f"{deaths} engines in a row died on this machine before they finished anything",
            "Look into the log for the reason; what is committed stays.",
        )


def may_start_again(folder: Path, run: str, works_elsewhere: bool = False) -> bool:
    """Whether an engine that has not started is worth another try on this machine: one of the run
    has worked here, or works elsewhere, and fewer than START_TRIES - 1 have failed since. What the
    dead one held, such as GPU memory, may need a moment to be free; so may a model's download."""
    buried = _buried(folder, run)
    if works_elsewhere and len(buried) < START_TRIES - 1:
        return True
    return any(map(_finished_some, buried[1 - START_TRIES :]))


def forget_journals(folder: Path, run: str) -> None:
    """Once the run has ended, nobody will ask on this machine."""
    for suffix in ("journal", "buried"):
        for journal in folder.glob(f"{run}.*.{suffix}"):
            journal.unlink()


def read_crashes(output: Folder, shard: str) -> list[Crash]:
    """The crashes in which rows of the shard took part."""
    folder = f"{ATTEMPTS}/{shard}"
    records = [RECORD.fullmatch(entry.path.removeprefix(folder)) for entry in output.list(folder)]
    return [Crash(int(r[1]), int(r[2]), r[3] == "alone") for r in records if r]


def crashes_of(unit: Unit, crashes: Sequence[Crash]) -> list[Crash]:
    """Those in which rows of the unit took part."""
    return [crash for crash in crashes if crash.start < unit.stop and unit.start < crash.stop]


def is_suspect(crashes: Sequence[Crash]) -> bool:
    """Whether a unit must be done alone and in pieces."""
    return len(crashes) >= CRASHES_OF_A_SUSPECT or any(crash.alone for crash in crashes)


def pieces(unit: Unit, crashes: Sequence[Crash]) -> Iterator[Unit]:
    """A suspect unit in about as many pieces as each has rows; one that crashed alone, in rows."""
    size = math.isqrt(unit.rows)
    for start in range(unit.start, unit.stop, size):
        piece = Unit(unit.shard, start, min(unit.stop, start + size))
        if crashed_alone(piece, crashes):
            yield from (Unit(unit.shard, row, row + 1) for row in range(piece.start, piece.stop))
        else:
            yield piece


def crashed_alone(piece: Unit, crashes: Sequence[Crash]) -> bool:
    return Crash(piece.start, piece.stop, alone=True) in crashes


def _buried(folder: Path, run: str) -> list[Path]:
    """Journals of the run's dead workers on this machine, in the order of their deaths."""
    return sorted(folder.glob(f"{run}.*.buried"), key=lambda path: path.stat().st_mtime)


def _held(journal: Path) -> list[tuple[str, int, int, bool]]:
    held: list[tuple[str, int, int, bool]] = []
    for line in journal.read_text(encoding="utf-8").splitlines():
        what, shard, start, stop, alone = json.loads(line)
        if what == "in":
            held.append((shard, start, stop, alone))
        elif what == "out":
            held.remove((shard, start, stop, alone))
    return held


def _finished_some(journal: Path) -> bool:
    return '["out"' in journal.read_text(encoding="utf-8")


def _did_some(journal: Path) -> bool:
    return _finished_some(journal) or '["judged"' in journal.read_text(encoding="utf-8")
