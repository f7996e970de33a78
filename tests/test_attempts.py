"""Engines die: whose fault it was is found out, and only that row fails."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import attempts, worker
from pipeline.attempts import (
    IDLE_DEATHS,
    JUDGING_DEATHS,
    START_TRIES,
    Crash,
    Journal,
    bury,
    bury_the_dead,
    crashes_of,
    is_suspect,
    may_start_again,
    pieces,
    read_crashes,
)
from pipeline.engine import EngineGone
from pipeline.engine.echo import EchoEngine
from pipeline.errors import EngineError
from pipeline.parts import missing_ranges, parts_among, read_counts_inside
from pipeline.records import Completion, Counts, Receipt, Unit
from pipeline.storage import Folder
from pipeline.worker import Worker
from tests.conftest import make_job
from tests.workers import do_unit, spec_here

ranges = st.tuples(st.integers(0, 300), st.integers(1, 300)).map(lambda p: (p[0], p[0] + p[1]))


@given(ranges, st.lists(st.tuples(ranges, st.booleans()), max_size=8))
def test_pieces_cover_their_unit_once_and_in_order(
    of: tuple[int, int], crashed: list[tuple[tuple[int, int], bool]]
) -> None:
    unit = Unit("s", *of)
    cut = list(pieces(unit, [Crash(*rows, alone) for rows, alone in crashed]))
    assert [piece.start for piece in cut] == [unit.start, *(piece.stop for piece in cut[:-1])]
    assert cut[-1].stop == unit.stop
    assert unit.rows == 1 or max(piece.rows for piece in cut) < unit.rows


def test_journal_of_a_dead_worker_becomes_crash_records(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from pipeline.attempts import Journal
from pipeline.records import Unit
journal = Journal(Path(sys.argv[1]), "run")
with journal.holding(Unit("a b.parquet", 0, 5), alone=False):
    pass
with journal.holding(Unit("a b.parquet", 5, 9), False), journal.holding(Unit("c", 1, 2), True):
    os._exit(9)
"""
    output, folder = Folder(str(tmp_path / "out")), tmp_path / "machine"
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-c", code, folder], check=True)
    mine = Journal(folder, "run")
    bury_the_dead(folder, "another run", "another run", output)
    assert not output.list()

    bury_the_dead(folder, "run", "run", output)
    bury_the_dead(folder, "run", "run", output)

    assert read_crashes(output, "a b.parquet") == [Crash(5, 9, alone=False)]
    assert read_crashes(output, "c") == [Crash(1, 2, alone=True)]
    assert crashes_of(Unit("c", 0, 100), read_crashes(output, "c")) == [Crash(1, 2, alone=True)]
    assert crashes_of(Unit("c", 2, 100), read_crashes(output, "c")) == []
    assert mine.path.exists(), "the journal of a living worker is not touched"


def test_two_workers_that_bury_the_same_dead_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first is at one journal, the second has done the next."""
    output, folder = Folder(str(tmp_path / "out")), tmp_path / "machine"
    folder.mkdir()
    for number in (1, 2):
        line = json.dumps(["in", "s", number, number + 1, False])
        (folder / f"run.{number}.journal").write_text(line)

    def bury_and_be_overtaken(journal: Path, output: Folder) -> None:
        monkeypatch.undo()
        bury_the_dead(folder, "run", "run", output)
        bury(journal, output)

    monkeypatch.setattr(attempts, "bury", bury_and_be_overtaken)
    bury_the_dead(folder, "run", "run", output)
    assert sorted(read_crashes(output, "s")) == [Crash(n, n + 1, alone=False) for n in (1, 2)]


def test_engines_that_die_without_having_done_anything_end_the_job(tmp_path: Path) -> None:
    output = Folder(str(tmp_path / "out"))

    def die(number: int, finished: bool, judged: bool = False) -> None:
        journal = Journal(tmp_path, "run")
        if finished:
            with journal.holding(Unit("s", 0, 4), alone=False):
                pass
        if judged:
            journal.judged(Unit("s", number, number + 1))
        with suppress(Died), journal.holding(Unit("s", 4, 8), alone=False):
            raise Died
        journal.close()
        journal.path.rename(tmp_path / f"run.{number}.journal")
        bury_the_dead(tmp_path, "run", "run", output)

    for number in range(IDLE_DEATHS - 1):
        die(number, finished=False)
    die(IDLE_DEATHS, finished=True)
    for number in range(IDLE_DEATHS + 1, 2 * IDLE_DEATHS):
        die(number, finished=False)
    with pytest.raises(EngineError, match="before they finished anything"):
        die(2 * IDLE_DEATHS, finished=False)
    die(2 * IDLE_DEATHS + 1, finished=True)
    for number in range(20, 19 + JUDGING_DEATHS):
        die(number, finished=False, judged=True)
    with pytest.raises(EngineError, match=f"{JUDGING_DEATHS} engines in a row"):
        die(19 + JUDGING_DEATHS, finished=False, judged=True)


def test_a_death_makes_no_unit_list_the_parts_of_its_file_but_suspects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be hundreds of thousands of parts, and as many units to come."""
    listed: list[Unit] = []

    def list_parts(output: Folder, unit: Unit) -> dict[Unit, Counts]:
        listed.append(unit)
        return read_counts_inside(output, unit)

    monkeypatch.setattr(worker, "read_counts_inside", list_parts)
    spec = spec_here(make_job(tmp_path), tmp_path, monkeypatch)
    spec.output.create("_axbatch/attempts/s/0-4.alone.x", b"")
    suspect, other = Unit("s", 0, 4), Unit("s", 4, 8)

    async def live() -> list[Receipt | None]:
        alive, rows = Worker(spec), {"text": ["a", "b", "c", "d"]}
        return [await do_unit(alive, unit, rows) for unit in (suspect, other, other, suspect)]

    receipts = asyncio.run(live())
    assert [receipt.counts.rows for receipt in receipts if receipt] == [4, 4, 4, 4]
    assert listed == [suspect, suspect]


def test_engine_that_worked_before_is_started_three_times(tmp_path: Path) -> None:
    output = Folder(str(tmp_path / "out"))
    assert not may_start_again(tmp_path, "run"), "the first failure of all is the job's"
    assert may_start_again(tmp_path, "run", works_elsewhere=True), "this machine is new"
    worked = tmp_path / "run.1.journal"
    worked.write_text("\n".join(json.dumps([what, "s", 0, 4, False]) for what in ("in", "out")))
    tries = 1
    while may_start_again(tmp_path, "run") or tries == 1:
        bury_the_dead(tmp_path, "run", "run", output)
        tries += 1
        (tmp_path / f"run.{tries}.journal").touch()
    assert tries - 1 == START_TRIES


class Died(BaseException):
    """In place of the process's end."""


class Fragile(EchoEngine):
    """Dies of some texts."""

    async def chat(self, body: Mapping[str, Any]) -> Completion:
        await asyncio.sleep(0)  # all rows of a unit are in the engine before the first one kills it
        text = body["messages"][-1]["content"]
        if text.startswith("poison"):
            raise EngineGone(text)
        return await super().chat(body)


@pytest.mark.parametrize(
    "poison", [[], [0], [17], [255], [0, 1], [3, 4], [1, 100, 200], [*range(60, 68)]], ids=str
)
def test_only_the_rows_that_kill_engines_fail(
    tmp_path: Path, poison: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(code: int) -> None:
        raise Died

    monkeypatch.setattr(worker.os, "_exit", die)
    spec = spec_here(make_job(tmp_path), tmp_path, monkeypatch, Fragile)
    texts = [f"poison {i}" if i in poison else f"text {i}" for i in range(256)]
    units = [Unit("in.parquet", start, start + 64) for start in range(0, 256, 64)]

    async def live(waiting: list[Unit]) -> None:
        """One worker's life: all units at once, as Ray hands them out. Its end ends them all."""
        alive = Worker(spec)

        async def do(unit: Unit) -> None:
            rows = {"text": texts[unit.start : unit.stop]}
            receipt = await do_unit(alive, unit, rows)
            assert receipt
            receipts.append(receipt)

        with suppress(Died):
            await asyncio.gather(*map(do, waiting))

    receipts: list[Receipt] = []
    lives = 0
    while waiting := [unit for unit in units if unit not in {r.unit for r in receipts}]:
        asyncio.run(live(waiting))
        lives += 1
        assert lives < 40

    counts = Counts()
    for receipt in receipts:
        counts.add(receipt.counts)
    assert counts.rows == 256 and counts.statuses["failed"] == len(poison) == counts.not_ok
    assert counts.reasons.keys() <= {"failed: engine_crash"}
    output = Folder(spec.job.output.path)
    assert missing_ranges(256, parts_among(output.list())["in.parquet"]) == []
    assert lives <= 1 + 4 * len(poison), "twice among others, once in its piece, once alone"


def test_is_suspect() -> None:
    together = Crash(0, 8, alone=False)
    assert not is_suspect([]) and not is_suspect([together])
    assert is_suspect([together, together]) and is_suspect([Crash(0, 1, alone=True)])


def test_bury_leaves_no_trace_of_what_was_finished(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    with journal.holding(Unit("s", 0, 1), alone=True):
        pass
    bury(journal.path, Folder(str(tmp_path / "out")))
    assert not Folder(str(tmp_path / "out")).list()
