"""Whose turn it is at an engine, in virtual time: full while there is work, and long rows early."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.cluster import MAX_UNITS_IN_FLIGHT, units_to_hold
from pipeline.lease import Watch
from pipeline.records import Unit
from pipeline.schedule import BEGUN, Schedule
from pipeline.worker import Worker
from tests.conftest import make_job
from tests.virtual_time import run_virtually
from tests.workers import do_unit, spec_here

slots_of_engines = st.integers(1, 9)


def room(slots: int) -> int:
    """Most requests that an engine is to have."""
    return math.ceil(1.25 * slots)


def now() -> float:
    return asyncio.get_running_loop().time()


# --- requests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    comes: int
    length: int
    cancelled_after: int | None = None
    """Seconds after it came."""


class Engine:
    """Computes as many requests at once as it has slots, each for as long as its length."""

    def __init__(self, slots: int, longest_first: bool = True) -> None:
        self.schedule = Schedule(slots, longest_first)
        self._free = asyncio.Semaphore(slots)
        self.waiting = self.has = self.most = 0
        self.begun: list[int] = []
        """Numbers of requests, as they came to the engine."""
        self.ended: dict[int, float] = {}

    async def compute(self, number: int, length: int) -> None:
        self.waiting += 1
        try:
            await self.schedule.request(length)
        finally:
            self.waiting -= 1
        self.has += 1
        self.most = max(self.most, self.has)
        self.begun.append(number)
        try:
            async with self._free:
                await asyncio.sleep(length)
            self.ended[number] = now()
        finally:
            self.has -= 1
            self.schedule.answered()

    async def compute_all(self, lengths: Sequence[int]) -> None:
        """They come in this order, at once."""
        await asyncio.gather(*(self.compute(*each) for each in enumerate(lengths)))


requests = st.builds(
    Request, st.integers(0, 20), st.integers(1, 30), st.none() | st.none() | st.integers(0, 40)
)


@given(st.lists(requests, max_size=60), slots_of_engines, st.booleans())
def test_engine_is_full_while_a_request_waits_and_none_is_forgotten(
    some: list[Request], slots: int, longest_first: bool
) -> None:
    async def play() -> None:
        engine = Engine(slots, longest_first)

        async def come(number: int, request: Request) -> None:
            await asyncio.sleep(request.comes)
            with suppress(TimeoutError):
                async with asyncio.timeout(request.cancelled_after):
                    await engine.compute(number, request.length)

        async def watch() -> None:
            await asyncio.sleep(0.5)  # all else happens at whole seconds
            while True:
                assert engine.has == room(slots) or not engine.waiting
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(come(*each) for each in enumerate(some)))
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        assert engine.most <= room(slots)
        assert engine.ended.keys() >= {i for i, r in enumerate(some) if r.cancelled_after is None}

        # Every place was given back.
        engine.most = 0
        await engine.compute_all([1] * (room(slots) + 1))
        assert engine.most == room(slots)

    run_virtually(play())


def test_request_that_is_cancelled_at_its_turn_gives_its_place_back() -> None:
    async def play() -> None:
        schedule = Schedule(1, longest_first=True)
        for _ in range(room(1)):
            await schedule.request(1)
        waiting = [asyncio.create_task(schedule.request(1)) for _ in range(2)]
        await asyncio.sleep(1)
        schedule.answered()
        waiting[0].cancel()  # has its turn, and doesn't know yet
        await asyncio.wait(waiting)
        assert waiting[0].cancelled() and not waiting[1].cancelled()

    run_virtually(play())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), slots_of_engines)
def test_first_come_first_served_unless_the_longest_is_first(
    lengths: list[int], slots: int
) -> None:
    engine = Engine(slots, longest_first=False)
    run_virtually(engine.compute_all(lengths))
    assert engine.begun == sorted(engine.begun)


@given(st.integers(0, 50), st.integers(1, 60), slots_of_engines)
def test_requests_of_one_length_are_first_come_first_served(
    length: int, count: int, slots: int
) -> None:
    engine = Engine(slots)
    run_virtually(engine.compute_all([length] * count))
    assert engine.begun == sorted(engine.begun)


@pytest.mark.parametrize("slots", [1, 4, 32])
@pytest.mark.parametrize("place", [0.6, 0.9, 1.0])
def test_long_request_ends_with_those_that_came_before_it(slots: int, place: float) -> None:
    """Neither alone at the end, nor before all others, whose units it would keep waiting."""
    long, count = 20, 100 * slots
    number = round(place * (count - 1))
    lengths = [1] * count
    lengths[number] = long
    engine = Engine(slots)
    run_virtually(engine.compute_all(lengths))
    assert slots * engine.ended[number] == pytest.approx(number, rel=0.15)

    as_they_come = Engine(slots, longest_first=False)
    run_virtually(as_they_come.compute_all(lengths))
    assert as_they_come.ended[number] == pytest.approx(number / slots + long, abs=2)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=60), slots_of_engines)
def test_long_request_goes_earlier_than_if_it_were_short(lengths: list[int], slots: int) -> None:
    def place(length: int) -> int:
        """In the engine's order, of the request that comes last."""
        engine = Engine(slots)
        run_virtually(engine.compute_all([*lengths, length]))
        return engine.begun.index(len(lengths))

    places = [place(length) for length in (0, 1, 3, 10, 30, 1000)]
    assert places == sorted(places, reverse=True)
    assert places[0] == len(lengths)


# --- units -----------------------------------------------------------------------------------


class Units:
    """Begins units of rows that take so many seconds each."""

    def __init__(self, slots: int) -> None:
        self.schedule = Schedule(slots, longest_first=True)
        self.enough = BEGUN * slots
        self.rows = self.waiting = 0
        """Rows that are begun and not over; units that wait."""
        self.begun: list[int] = []
        self.ended: dict[int, float] = {}

    async def do(self, number: int, rows: Sequence[int]) -> None:
        self.waiting += 1
        async with self.schedule.together(len(rows)):
            self.waiting -= 1
            assert self.rows < self.enough
            self.begun.append(number)
            self.rows += len(rows)
            await asyncio.gather(*map(self._row, rows))
        self.ended[number] = now()

    async def _row(self, seconds: int) -> None:
        await asyncio.sleep(seconds)
        self.rows -= 1
        self.schedule.finished(1)


units_of_rows = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=25), max_size=12)


@given(units_of_rows, st.integers(1, 4))
def test_units_begin_in_order_just_while_too_few_rows_are_begun(
    some: list[list[int]], slots: int
) -> None:
    async def play() -> None:
        units = Units(slots)

        async def watch() -> None:
            while len(units.ended) < len(some):
                await asyncio.sleep(0.5)
                assert not units.waiting or units.rows >= units.enough
                await asyncio.sleep(0.5)

        await asyncio.gather(watch(), *(units.do(*each) for each in enumerate(some)))
        assert units.begun == [*range(len(some))]

    run_virtually(play())


def test_row_of_many_times_the_mean_length_holds_up_no_other_unit() -> None:
    async def play() -> None:
        units = Units(slots=4)
        many = [[1] * (units.enough - 1) + [1000], *([1] * units.enough for _ in range(50))]
        await asyncio.gather(*(units.do(*each) for each in enumerate(many)))
        *others, with_the_long_row = sorted(units.ended.values())
        assert with_the_long_row == units.ended[0] == 1000
        assert max(others) < 60

    run_virtually(play())


async def are_nothing_counted(schedule: Schedule, slots: int) -> bool:
    """Whether units begin as at first: just as many as are enough."""
    begun = []

    async def begin(unit: str, rows: int) -> None:
        async with schedule.together(rows):
            begun.append(unit)
            await asyncio.sleep(1)
            schedule.finished(rows)

    units = {"first": BEGUN * slots - 1, "second": 1, "third": 1}
    tasks = [asyncio.create_task(begin(*unit)) for unit in units.items()]
    await asyncio.sleep(0.5)
    before = [*begun]
    await asyncio.gather(*tasks)
    async with schedule.alone():
        pass  # no unit is there
    return before == ["first", "second"] and begun[2:] == ["third"]


def test_units_that_do_not_begin_leave_nothing_counted() -> None:
    """Once the job drains."""

    async def play() -> None:
        schedule = Schedule(3, longest_first=True)

        async def leave(rows: int) -> None:
            async with schedule.together(rows):
                schedule.finished(rows)

        await asyncio.gather(*map(leave, [5, 7, 256, 1, 30, 29]))
        assert await are_nothing_counted(schedule, 3)

    run_virtually(play())


@pytest.mark.parametrize("has_its_turn", [False, True])
def test_unit_that_is_cancelled_leaves_nothing_counted(has_its_turn: bool) -> None:
    async def play() -> None:
        schedule = Schedule(3, longest_first=True)
        rows = BEGUN * 3

        async def do() -> None:
            async with schedule.together(rows):
                schedule.finished(rows)

        async with schedule.together(rows):
            cancelled, last = asyncio.create_task(do()), asyncio.create_task(do())
            await asyncio.sleep(1)
            if has_its_turn:
                schedule.finished(rows)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            if not has_its_turn:
                schedule.finished(rows)
        await last
        assert cancelled.cancelled()
        assert await are_nothing_counted(schedule, 3)

    run_virtually(play())


@dataclass(frozen=True)
class Use:
    """A unit that comes and takes its time."""

    comes: int
    takes: int
    alone: bool
    rows: int = 1


uses = st.builds(Use, st.integers(0, 20), st.integers(1, 10), st.booleans(), st.integers(1, 30))


@given(st.lists(uses, max_size=15))
def test_alone_means_alone_and_is_soon(some: list[Use]) -> None:
    """No unit that comes later begins before, and all get through."""

    async def play() -> None:
        schedule = Schedule(2, longest_first=True)
        times: dict[Use, list[tuple[float, float]]] = {}

        async def use(each: Use) -> None:
            await asyncio.sleep(each.comes)
            turn = schedule.alone() if each.alone else schedule.together(each.rows)
            async with turn:
                began = now()
                await asyncio.sleep(each.takes)
                for _ in range(each.rows):
                    schedule.finished(1)
            times.setdefault(each, []).append((began, now()))

        await asyncio.gather(*map(use, some))
        spans = [(each, *span) for each, of in times.items() for span in of]
        assert len(spans) == len(some)
        for one, began, ended in spans:
            for other, begins, ends in spans:
                is_same = (one, began) == (other, begins)
                assert not one.alone or is_same or ends <= began or begins >= ended
                assert not one.alone or one.comes >= other.comes or other.alone or begins >= ended
        assert await are_nothing_counted(schedule, 2)

    run_virtually(play())


def test_unit_that_wants_to_be_alone_and_is_cancelled_changes_nothing() -> None:
    async def play() -> None:
        schedule = Schedule(2, longest_first=True)

        async def be_alone() -> None:
            async with schedule.alone():
                raise AssertionError("another is there")

        async with schedule.together(BEGUN * 2):
            cancelled = asyncio.create_task(be_alone())
            await asyncio.sleep(1)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert cancelled.cancelled()
            schedule.finished(BEGUN * 2)
        assert await are_nothing_counted(schedule, 2)

    run_virtually(play())


def test_all_units_of_a_worker_come_back_when_the_run_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait, too: no row that is left is to keep them waiting."""
    monkeypatch.setattr(Watch, "says_stop", lambda self: True)
    job = make_job(tmp_path, model={"engine": {"max_num_seqs": 2}})
    spec = spec_here(job, tmp_path, monkeypatch)

    async def live() -> None:
        alive = Worker(spec)
        units = [Unit("a.parquet", 8 * number, 8 * number + 8) for number in range(20)]
        doing = (do_unit(alive, unit, {"text": ["a"] * 8}) for unit in units)
        async with asyncio.timeout(20):
            assert await asyncio.gather(*doing) == [None] * 20

    asyncio.run(live())


# --- units that a worker holds ---------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(1, 300), st.integers(1, 4096), st.integers(1, 50))
@example(10**6, 1.0, 256, 1)  # short units of long documents
@example(0, 1.0, 1, 1)
def test_worker_holds_units_enough_for_its_engine_and_no_more_than_its_share(
    units: int, rows_per_unit: float, slots: int, replicas: int
) -> None:
    held = units_to_hold(units, rows_per_unit, slots, replicas)
    share = math.ceil(units / replicas)
    assert 1 <= held <= max(1, share)
    assert held <= MAX_UNITS_IN_FLIGHT
    if held < min(share, MAX_UNITS_IN_FLIGHT):
        assert (held - 1) * rows_per_unit >= BEGUN * slots, "while one is being committed"
        assert (held - 3) * rows_per_unit < 11 * slots, "what is held is lost with its engine"
