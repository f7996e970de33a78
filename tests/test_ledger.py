"""The ledger and the meter: what engines did is told once, whatever the order it is heard in."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting import NOTHING_USED, Usage
from pipeline.ledger import AMOUNTS, BINS, ENGINES, SILENT, Bins, Ledger, leave_reading
from pipeline.meter import Meter, Reading
from pipeline.records import Counts, Output, Receipt, Unit
from pipeline.report.timeline import Timeline
from pipeline.storage import Folder

USED = Usage(1, 10, 2, 5)
"""Of a row."""

SPREADS = st.lists(
    st.tuples(
        st.sampled_from(["rows", "busy"]),
        st.floats(0, 1e6),
        st.floats(0, 1e5),
        st.integers(0, 10**6),
    ),
    max_size=30,
)


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A ledger, by its own clock: seconds from the run's begin."""

    def __init__(self, folder: Path, replicas: int = 2, gpus: int = 0) -> None:
        self._clock, self._rows = Clock(), 0
        self.output = Folder(str(folder))
        self.ledger = Ledger("run", self.output, replicas, clock=self._clock)
        self.ledger.begin_lane(replicas, gpus)

    def at(self, seconds: float) -> None:
        self._clock.now = 1000.0 + seconds

    def commit(
        self,
        worker: str,
        at: float,
        up: float | None = None,
        busy: float = 0.0,
        rows: int = 1,
        engine: Usage = NOTHING_USED,
        seconds: float = 1.0,
    ) -> None:
        """A receipt is heard at this time, with a reading that the worker took when it was `up`."""
        self.at(at)
        counts = Counts()
        for _ in range(rows):
            counts.count(Output("x", usage=USED))
        unit = Unit("shard", self._rows, self._rows + rows)
        self._rows += rows
        reading = Reading(engine, busy, at if up is None else up)
        self.ledger.add(Receipt(unit, counts, worker, seconds, reading))

    def die(self, worker: str, at: float, up: float, engine: Usage = NOTHING_USED) -> None:
        """The worker's engine does; `at` by the clock of the worker's machine."""
        leave_reading(self.output, "run", worker, Reading(engine, up / 2, up))
        file = Path(self.output.url, ENGINES, "run", f"{worker.replace(':', '-')}.json")
        when = self.ledger.started + timedelta(seconds=at)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"at": when.timestamp()}))

    @property
    def marks(self) -> list[tuple[float, str, str]]:
        marks = self.ledger.to_json()["timeline"]["marks"]
        return [(mark["at_s"], mark["what"], mark["replica"]) for mark in marks]

    @property
    def replicas(self) -> dict[str, Any]:
        return {each["name"]: each for each in self.ledger.to_json()["timeline"]["replicas"]}


def times(number: int) -> Usage:
    return Usage(*(number * each for each in asdict(USED).values()))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@given(spreads=SPREADS)
def test_bins_conserve_amounts_and_stay_few(spreads: list[tuple[str, float, float, int]]) -> None:
    bins = Bins()
    totals = {"rows": 0, "busy": 0}
    for name, start, length, amount in spreads:
        bins.add(name, start, start + length, amount)
        totals[name] += amount
    for name, series in bins.series.items():
        assert len(series) <= BINS
        assert min(series) >= 0
        assert sum(series) == pytest.approx(totals[name], rel=1e-6)


@given(spreads=SPREADS, late=st.floats(0, 1e6))
def test_bins_that_double_are_those_that_were_as_wide_from_the_start(
    spreads: list[tuple[str, float, float, int]], late: float
) -> None:
    grown, wide = Bins(), Bins()
    wide.add("end", late, late, 1)
    for name, start, length, amount in spreads:
        stop = min(start + length, late)
        grown.add(name, min(start, stop), stop, amount)
        wide.add(name, min(start, stop), stop, amount)
    grown.add("end", late, late, 1)
    assert grown.bin_s == wide.bin_s
    for name, series in wide.series.items():
        length = max(len(series), len(grown.series[name]))
        one, other = (
            [*each, *[0.0] * (length - len(each))] for each in (series, grown.series[name])
        )
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_amount_lies_where_it_was_spread() -> None:
    bins = Bins()
    bins.add("rows", 1.5, 3.5, 8)
    assert bins.of("rows") == [0, 2, 4, 2]
    assert bins.of("never heard of") == []


@given(
    units=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.integers(0, 5)), max_size=20
    ),
    overtaking=st.randoms(use_true_random=False),
)
def test_engine_is_committed_and_lost_whatever_the_order_of_receipts(
    tmp_path_factory: pytest.TempPathFactory,
    units: list[tuple[str, int, int]],
    overtaking: Any,
) -> None:
    """Each unit: its worker, its rows, and rows that the engine did beside, for nothing."""
    run = Run(tmp_path_factory.mktemp("ledger"), replicas=3)
    did = dict.fromkeys("abc", 0)
    said = []
    for at, (worker, rows, lost) in enumerate(units, 1):
        did[worker] += rows + lost
        said.append((worker, float(at), rows, times(did[worker])))
    overtaking.shuffle(said)
    for worker, up, rows, engine in said:
        run.commit(worker, 100.0, up, busy=up / 2, rows=rows, engine=engine)
    ledger = run.ledger
    assert ledger.committed == times(sum(rows for _, rows, _ in units))
    assert ledger.lost == times(sum(lost for *_, lost in units))
    assert ledger.engine == ledger.committed + ledger.lost
    assert ledger.rows == sum(rows for _, rows, _ in units)


def test_engine_did_no_less_than_what_is_committed(run: Run) -> None:
    """A worker was killed after a commit, and another found its part."""
    run.commit("a:1", 5, engine=NOTHING_USED, rows=3)
    assert run.ledger.engine == run.ledger.committed == times(3)
    assert run.ledger.lost == NOTHING_USED


def test_idle_engine_is_up_until_its_lane_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, replicas=2, gpus=4)
    run.commit("a:1", 20, up=15, busy=10)
    run.commit("b:1", 30, up=30, busy=20)
    run.at(40)
    assert run.ledger.up_s == (15 + 20) + (30 + 10)
    run.ledger.end_lane()
    run.at(1000)
    assert run.ledger.up_s == 75
    assert run.ledger.gpu_s == 4 * 75
    assert run.ledger.busy_share == pytest.approx(30 / 75)


def test_replica_takes_its_gpus_before_it_is_heard_of(run: Run) -> None:
    """And if it never is: a model that is loaded costs what one that computes does."""
    run.at(10)
    run.ledger.begin_lane(3, 4, at_once=2)
    run.at(30)
    assert run.ledger.gpu_s == 4 * 2 * 20
    run.commit("a:1", 40, up=29)
    assert run.ledger.gpu_s == 4 * (29 + 30)
    run.ledger.end_lane()
    run.at(100)
    assert run.ledger.gpu_s == 4 * (29 + 30)
    run.ledger.begin_lane(3, 4, at_once=2)
    run.commit("b:1", 110, up=10)
    run.commit("b:2", 110, up=10)
    run.commit("b:3", 115, up=4)
    assert run.ledger.gpu_s == 4 * (29 + 30) + 4 * (15 + 15 + 4)


def test_receipt_that_was_overtaken_takes_no_time_back(run: Run) -> None:
    run.commit("a:1", 20, up=20)
    run.commit("a:1", 25, up=10)
    assert run.ledger.up_s == 25


def test_lanes_take_the_gpus_that_they_have(tmp_path: Path) -> None:
    run = Run(tmp_path, replicas=1, gpus=2)
    run.commit("a:1", 10)
    run.ledger.begin_lane(1, 8)
    run.commit("b:1", 30, up=20)
    run.at(35)
    assert run.ledger.gpu_s == 2 * 10 + 8 * 25
    assert not run.marks, "nobody was replaced"


def test_replaced_worker_is_marked_and_its_time_stops(run: Run) -> None:
    run.commit("a:1", 10)
    run.commit("b:1", 12)
    run.commit("a:1", 20)
    run.commit("c:1", 30, up=15)  # there are two replicas, so one of the others has died
    assert run.marks == [(12.0, "last heard of", "b:1"), (15.0, "replaced", "c:1")]
    run.at(50)
    assert run.ledger.up_s == 50 + 12 + 35
    run.ledger.end_lane()
    run.at(60)
    assert run.ledger.up_s == 50 + 12 + 35


def test_worker_that_was_only_slow_is_taken_back_and_the_other_is_gone(run: Run) -> None:
    run.commit("slow:1", 10)
    run.commit("killed:1", 12)
    run.commit("new:1", 30, up=15)
    assert ("last heard of", "slow:1") in [mark[1:] for mark in run.marks]
    run.commit("slow:1", 40)
    assert run.marks == [(12.0, "last heard of", "killed:1"), (15.0, "replaced", "new:1")]
    run.at(50)
    assert run.ledger.up_s == 50 + 12 + 35


def test_dead_engine_is_taken_over_once(run: Run) -> None:
    run.commit("a:1", 10, engine=times(1))
    run.die("a:1", at=18, up=18, engine=times(4))
    run.at(25)
    for _ in range(3):
        run.ledger.read_the_dead()
    assert run.ledger.engine == times(4)
    assert run.ledger.lost == times(3)
    assert run.ledger.up_s == 18
    assert run.marks == [(18.0, "engine died", "a:1")]
    run.commit("a:1", 26, up=15, engine=times(2))  # it was on its way
    assert run.ledger.engine == times(4)
    assert run.ledger.committed == times(2)
    run.at(99)
    assert run.ledger.up_s == 18, "it stays dead"


def test_readings_of_the_dead_are_dropped_once_they_are_told(run: Run) -> None:
    leave_reading(run.output, "another", "b:1", Reading(times(1), 1, 2))
    run.die("a:1", at=18, up=18, engine=times(4))
    run.at(25)
    run.ledger.read_the_dead()
    run.ledger.forget_the_dead()
    assert [entry.path for entry in run.output.list(ENGINES)] == [f"{ENGINES}/another/b-1.json"]
    run.ledger.read_the_dead()
    run.ledger.forget_the_dead()
    assert run.ledger.engine == times(4)


def test_engine_that_died_before_its_first_receipt_is_known_too(tmp_path: Path) -> None:
    run = Run(tmp_path, gpus=2)
    run.die("a:1", at=18, up=6, engine=times(4))
    run.at(25)
    run.ledger.read_the_dead()
    assert run.ledger.engine == run.ledger.lost == times(4)
    assert run.ledger.gpu_s == 2 * 6
    assert run.replicas["a:1"]["from_s"] == 12 and run.replicas["a:1"]["to_s"] == 18


def test_engine_found_dead_after_its_lane_was_not_idle_until_then(run: Run) -> None:
    run.commit("a:1", 10, engine=times(1))
    run.die("a:1", at=18, up=18, engine=times(4))
    run.at(100)
    run.ledger.end_lane()
    run.ledger.read_the_dead()
    assert run.ledger.engine == times(4)
    assert run.ledger.up_s == 18


def test_found_dead_worker_is_not_called_silent_too(run: Run) -> None:
    run.commit("a:1", 10)
    run.commit("b:1", 12)
    run.commit("c:1", 30, up=15)
    run.die("a:1", at=11, up=11)
    run.ledger.read_the_dead()
    assert run.marks == [(11.0, "engine died", "a:1"), (15.0, "replaced", "c:1")]


@pytest.mark.parametrize("skew", [-86_400, 86_400])
def test_wrong_clock_of_another_machine_moves_no_death_out_of_the_run(
    run: Run, skew: float
) -> None:
    run.commit("a:1", 10, up=8)
    run.die("a:1", at=18 + skew, up=16)
    run.die("b:1", at=18 + skew, up=16)
    run.at(25)
    run.ledger.read_the_dead()
    for replica in run.replicas.values():
        assert 0 <= replica["from_s"] <= replica["to_s"] <= 25
    assert all(0 <= at <= 25 for at, *_ in run.marks)
    assert run.ledger.up_s == 16 + 16, "spans are by one clock each"


@given(
    told=st.lists(
        st.tuples(st.sampled_from("abcd"), st.floats(0, 500), st.floats(0, 1), st.floats(0, 900)),
        min_size=1,
        max_size=25,
    ),
    ends=st.booleans(),
)
def test_page_draws_any_ledger_and_shares_are_shares(
    tmp_path_factory: pytest.TempPathFactory,
    told: list[tuple[str, float, float, float]],
    ends: bool,
) -> None:
    run = Run(tmp_path_factory.mktemp("ledger"))
    at, meters = 0.0, dict.fromkeys("abcd", (0.0, 0.0))
    for worker, later, busy, seconds in told:
        at += later
        up, so_far = meters[worker]
        grown = max(0.0, at - up) / 2
        meters[worker] = up + grown, so_far + busy * grown
        run.commit(worker, at, meters[worker][0], meters[worker][1], seconds=seconds)
    if ends:
        run.ledger.end_lane()
    said = json.loads(json.dumps(run.ledger.to_json(), allow_nan=False))
    assert 0 <= (said["busy_share"] or 0) <= 1
    rows = 0.0
    for replica in said["timeline"]["replicas"]:
        assert all(0 <= busy <= 1 for busy in replica["busy"])
        assert len({len(replica[what]) for what in AMOUNTS}) == 1
        assert 0 <= replica["from_s"] <= replica["to_s"]
        rows += sum(replica["rows"])
    assert rows == pytest.approx(len(told), abs=0.1)
    drawn = Timeline({"timeline": said["timeline"], "wall_s": at + 1})
    assert drawn.rows_plot() and drawn.tokens_plot() and drawn.busy_plot()


def test_others_may_read_while_the_driver_adds(run: Run) -> None:
    """A dictionary that grows under an iteration would end the display's thread, or the run."""
    wrong: list[BaseException] = []
    through = threading.Event()

    def read(look: Callable[[], object]) -> None:
        try:
            while not through.is_set():
                look()
        except BaseException as error:
            wrong.append(error)

    looks: list[Callable[[], object]] = [
        lambda: run.ledger.engine,
        lambda: run.ledger.gpu_s,
        run.ledger.to_json,
    ]
    readers = [threading.Thread(target=read, args=[look]) for look in looks]
    for reader in readers:
        reader.start()
    for number in range(400):
        run.commit(f"a:{number}", 1.0 + number / 100)
    through.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_meter_is_busy_from_the_first_of_overlapping_requests_to_the_last() -> None:
    clock = Clock()
    meter = Meter(clock)

    async def request(begin: float, end: float) -> None:
        while clock.now < 1000 + begin:
            await asyncio.sleep(0)
        with meter.request():
            while clock.now < 1000 + end:
                await asyncio.sleep(0)

    async def requests() -> list[Reading]:
        spans = [(1, 4), (2, 6), (6, 6), (8, 9), (8, 10)]
        tasks = [asyncio.create_task(request(*span)) for span in spans]
        readings = []
        for now in range(13):
            clock.now = 1000.0 + now
            for _ in range(5):
                await asyncio.sleep(0)
            readings.append(meter.read())
        await asyncio.gather(*tasks)
        return readings

    readings = asyncio.run(requests())
    assert [each.up_s for each in readings] == [*range(13)]
    assert [each.busy_s for each in readings] == [0, 0, 1, 2, 3, 4, 5, 5, 5, 6, 7, 7, 7]
    assert meter.in_flight == 0


def test_meter_is_idle_again_after_a_request_that_fails() -> None:
    clock = Clock()
    meter = Meter(clock)
    with pytest.raises(ValueError, match="no"), meter.request():
        clock.now += 3
        raise ValueError("no")
    clock.now += 4
    assert (meter.read().busy_s, meter.read().up_s, meter.in_flight) == (3, 7, 0)


def test_meter_counts_tokens_as_they_come_and_a_reading_stays_as_it_was() -> None:
    meter = Meter(Clock())
    meter.count(USED)
    before = meter.read()
    meter.count_completion(3)
    meter.count(USED)
    assert before.usage == USED
    assert meter.read().usage == times(2) + Usage(completion_tokens=3)
    read = replace(meter.read(), busy_s=1.5, up_s=2.5)
    assert Reading.from_json(json.loads(json.dumps(read.to_json()))) == read


def test_workers_of_a_machine_that_is_gone_cost_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path, replicas=3, gpus=2)
    run.ledger.see_machines({"a", "b"})
    run.commit("a:1", at=10)
    run.commit("b:1", at=20)
    run.commit("b:2", at=20)
    run.ledger.see_machines({"a"})
    run.commit("a:1", at=100)
    assert run.marks == [(20.0, SILENT, "b:1"), (20.0, SILENT, "b:2")]
    assert run.ledger.gpu_s == 2 * (100 + 20 + 20)
    run.commit("c:1", at=105, up=10)
    assert run.marks[2:] == [(95.0, "replaced", "c:1")]
    assert run.ledger.gpu_s == 2 * (105 + 20 + 20 + 10)
    run.commit("b:1", at=110)  # it was there all the same
    run.ledger.end_lane()
    assert run.ledger.gpu_s == 2 * (110 + 110 + 20 + 15)
