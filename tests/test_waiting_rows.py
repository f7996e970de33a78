"""What is said of rows that wait for the second lane: plan, status, verify, progress, summary."""

from __future__ import annotations

import json
import threading
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.accounting import Usage
from pipeline.errors import TooManyNotOkError
from pipeline.lanes import plan_deferred
from pipeline.parts import not_ok_rows, overlay_key, part_path
from pipeline.plan import Plan, find_deferred
from pipeline.progress import Progress
from pipeline.records import Counts, Output, Receipt, Unit
from pipeline.run import check_hope
from pipeline.status import read_status
from pipeline.storage import Folder
from tests.conftest import commit_unit, make_job, make_plan_of, write_table
from tests.lanes_job import LanesJob
from tests.runs import printed

# --- what is on storage while rows wait ------------------------------------------------------

DEFERRED = Output(None, "deferred", "waits: 70 tokens", needs=70)  # the reason's code is any
OK = Output("a", usage=Usage(1, 5, 0, 2))
FAILED = Output(None, "failed", "engine_error")


class Waiting:
    """Two files of four rows each, in parts of two, all committed; rows 1 and 3 of `a` wait, and
    row 0 of `b`."""

    def __init__(self, folder: Path) -> None:
        model = {"context": "auto", "engine": {"max_model_len": 64}}
        for name in "ab":
            write_table(folder / f"in/{name}.parquet", {"text": ["w"] * 4})
        self.folder = folder
        self.config = make_job(folder, model=model, input={"rows_per_unit": 2})
        self.output = Folder(self.config.output.path)
        a, b = self.plan().shards
        self.a, self.b = a.key, b.key
        self.commit(a.key, 0, [OK, DEFERRED])
        self.commit(a.key, 2, [FAILED, DEFERRED])
        self.commit(b.key, 0, [DEFERRED, OK])
        self.commit(b.key, 2, [OK, OK])
        self.later = overlay_key(a.key, array("q", [1, 3]))
        """The key of what waits in `a`."""

    def plan(self) -> Plan:
        return make_plan_of(self.config)

    def commit(self, key: str, start: int, rows: list[Output]) -> Unit:
        unit, plan = Unit(key, start, start + len(rows)), self.plan()
        fingerprint = next(s for s in plan.shards if key.startswith(s.key)).shard.fingerprint
        commit_unit(self.output, unit, plan.identity, fingerprint, rows)
        return unit


@pytest.fixture
def waiting(tmp_path: Path) -> Waiting:
    return Waiting(tmp_path)


def test_rows_are_to_do_until_the_lane_that_they_wait_for_has_done_them(waiting: Waiting) -> None:
    def facts(plan: Plan) -> tuple[int, ...]:
        done = [shard.done_rows for shard in plan.shards]
        return (plan.to_do_rows, plan.waiting_rows, plan.pending_rows, plan.done_rows, *done)

    assert facts(waiting.plan()) == (3, 3, 0, 5, 2, 3)
    waiting.commit(waiting.later, 1, [OK])
    waiting.commit(overlay_key(waiting.a, array("q", [9])), 0, [])  # nobody's any more
    plan = waiting.plan()
    assert facts(plan) == (2, 2, 0, 6, 3, 3)
    assert (plan.deferred_rows, plan.longest) == (3, 70)
    waiting.commit(waiting.later, 0, [OK])
    assert facts(waiting.plan()) == (1, 1, 0, 7, 4, 3)


def test_status_counts_what_both_lanes_have_committed(waiting: Waiting) -> None:
    waiting.commit(waiting.later, 1, [Output(None, "rejected", "truncated", Usage(1, 9, 0, 3))])
    status = read_status(waiting.plan(), waiting.output)
    told = status.to_json()
    assert told["committed"]["statuses"] == {"ok": 4, "rejected": 1, "failed": 1}
    assert (told["committed"]["deferred"], told["rows_deferred"], told["rows_pending"]) == (2, 2, 2)
    assert told["committed"]["usage"]["prompt_tokens"] == 4 * 5 + 9
    assert [file["rows_done"] for file in told["files"]] == [3, 3]
    assert status.examples == {
        "failed: engine_error": [("a.parquet", 2)],
        "rejected: truncated": [("a.parquet", 3)],
    }


def test_plan_and_status_while_parts_are_dropped(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run that publishes does."""
    waiting.commit(waiting.later, 1, [FAILED])
    before, read = waiting.plan(), Folder.open
    (gone := waiting.output).delete_folder("_axbatch/parts/b.parquet")
    assert read_status(before, gone).counts.rows == 3
    gone.delete_folder(f"_axbatch/parts/{waiting.a}")
    assert read_status(before, gone).examples == {}

    def dropped_meanwhile(folder: Folder, path: str) -> Any:
        folder.delete_folder("_axbatch/parts/a.parquet")
        return read(folder, path)

    monkeypatch.setattr(Folder, "open", dropped_meanwhile)
    monkeypatch.setattr("pipeline.shards._read_shard", lambda *_: before.shards[0].shard)
    assert waiting.plan().deferred_rows == 0


def test_footers_of_all_shards_are_read_at_the_same_time(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import plan

    all_at_once, read = threading.Barrier(4), plan.read_stamp

    def together(output: Folder, path: str) -> Any:
        all_at_once.wait(20)
        return read(output, path)

    monkeypatch.setattr(plan, "read_stamp", together)
    assert waiting.plan().deferred_rows == 3


def test_a_run_opens_only_parts_with_deferred_rows_again(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[str] = Counter()
    read = Folder.open

    def counted(folder: Folder, path: str) -> Any:
        opened[path] += 1
        return read(folder, path)

    monkeypatch.setattr(Folder, "open", counted)
    plan = waiting.plan()
    deferred = plan_deferred(plan.identity, plan.unpublished, waiting.output, plan.longest)
    assert [s.overlay.rows for s in deferred.shards if s.overlay] == [
        array("q", [1, 3]), array("q", [0]),
    ]  # fmt: skip
    a, b = waiting.a, waiting.b
    assert [opened[part_path(Unit(k, s, s + 2))] for k in (a, b) for s in (0, 2)] == [2, 2, 2, 1]


def test_deferred_rows_are_found_in_pieces_of_units_and_where_parts_overlap(
    waiting: Waiting,
) -> None:
    """A unit that killed an engine is committed in pieces; merging takes a row's first part."""
    planned = replace(waiting.plan().shards[0], key="a.parquet/k")
    parts = [
        commit_rows(waiting, 0, [OK, DEFERRED, OK]),
        commit_rows(waiting, 1, [FAILED, DEFERRED, DEFERRED]),
        commit_rows(waiting, 2, [DEFERRED]),
        commit_rows(waiting, 4, [DEFERRED]),
        commit_rows(waiting, 5, [FAILED, OK]),
    ]
    known = (Unit("", 4, 7), Unit("", 0, 4))
    planned = replace(planned, deferred=replace(planned.deferred, units=known))
    found = find_deferred([planned], waiting.output, {"a.parquet/k": parts})
    assert [*found["a.parquet/k"]] == [1, 3, 4]
    assert [*not_ok_rows(waiting.output, part_path(parts[1]))] == [(0, "failed: engine_error")]


def commit_rows(waiting: Waiting, start: int, rows: list[Output]) -> Unit:
    unit = Unit("a.parquet/k", start, start + len(rows))
    commit_unit(waiting.output, unit, "identity", "fingerprint", rows)
    return unit


def test_what_is_told_of_a_job_whose_rows_wait(tmp_path: Path) -> None:
    """Killed with the two first rows of the second lane done."""
    job = LanesJob(tmp_path, yarn={"engine": {"max_num_seqs": 1, "seconds_per_request": 1.5}})
    each = ("--set", "input.rows_per_unit=1", "--set", "sampling.max_tokens=200")

    def parts_of_yarn() -> int:
        return sum("-deferred-" in str(path) for path in job.parts())

    run = job.start("run", *each)
    run.wait_until(lambda: parts_of_yarn() == 2)
    run.kill()

    told = json.loads(printed(job, "status", "--json", *each))
    # 4 of 15 rows wait for the second lane; of `a` 300, 1000 and 700 words, and 500 of `b`
    assert (told["rows_pending"], told["rows_deferred"], told["committed"]["rows"]) == (2, 2, 13)
    assert [file["rows_done"] for file in told["files"]] == [7, 2, 4]
    examples = {entry["reason"]: entry["examples"] for entry in told["not_ok"]}
    assert examples["rejected: truncated"] == [
        {"file": "a.parquet", "row": 1}, {"file": "a.parquet", "row": 3},
    ]  # fmt: skip
    assert not any("deferred" in reason for reason in examples)
    shown = " ".join(printed(job, "status", *each).split())
    assert "rows done 13 of 15 2 rows waiting for the YaRN engine" in shown
    shown = " ".join(printed(job, "plan", *each).split())
    assert "to do 2 rows 2 rows waiting for the YaRN engine" in shown
    verify = job.start("verify", *each)
    assert verify.wait() != 0
    assert "a.parquet: not published, 1 of 8 rows still to do" in verify.errors

    shown = " ".join(printed(job, "run", *each).split())
    assert "2 rows to do in 2 file(s), 13 rows done before, 2 of them too long" in shown
    assert "lane yarn 2 rows; context" in shown


def test_summary_tells_the_lanes_apart(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    shown = " ".join(printed(job, "run").split())
    assert "lane native 12 rows, 3 left to the next" in shown
    (record,) = (job.output / "_axbatch/runs").glob("*.json")
    told = json.loads(record.read_text())
    yarn = told["lanes"][1]
    context, factor = yarn["engine"]["max_model_len"], yarn["factor"]
    assert f"lane yarn 3 rows; context {context:,} tokens, factor {factor:g}" in shown
    assert (told["this_run"]["rows"], told["this_run"]["deferred"]) == (15, 0)
    assert [lane["deferred"] for lane in told["lanes"]] == [3, 0]


def test_summary_of_one_lane_names_none(tmp_path: Path) -> None:
    job = LanesJob(tmp_path, context="native")
    assert "lane native" not in printed(job, "run")


# --- progress --------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time that progress goes by."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr("pipeline.progress.time", SimpleNamespace(monotonic=lambda: now.time))
    return lambda time: setattr(now, "time", time)


def receipt(rows: int, deferred: int = 0, seconds: float = 1.0) -> Receipt:
    counts = Counts(Counter(ok=rows), usage=Usage(prompt_tokens=10 * rows), deferred=deferred)
    return Receipt(Unit("", 0, rows + deferred), counts, "worker", seconds)


def test_progress_goes_on_from_where_the_second_lane_was(
    waiting: Waiting, clock: Callable[[float], None]
) -> None:
    waiting.commit(waiting.later, 0, [OK])
    plan = waiting.plan()
    progress = Progress(plan, 1)
    assert dict(progress.facts())["rows"] == "6/8 (75%)"
    deferred = plan_deferred(plan.identity, plan.unpublished, waiting.output, plan.longest)
    progress.expect(deferred, "yarn x2.4")
    assert progress.line() == "starting 1 replica(s) of lane yarn x2.4, 0 s so far"
    clock(110.0)
    progress.add(receipt(1, seconds=2.0))
    assert dict(progress.facts())["rows"] == "7/8 (88%)"
    assert progress.line().startswith("lane yarn x2.4 · rows 7/8")
    assert dict(progress.facts())["ETA"] == "0:00:02"


def test_each_lane_has_its_own_rate(waiting: Waiting, clock: Callable[[float], None]) -> None:
    for part in waiting.output.list("_axbatch/parts"):
        waiting.output.delete_folder(part.path.rpartition("/")[0])
    before = waiting.plan()
    progress = Progress(before, 1)
    clock(101.0)
    progress.add(receipt(2, deferred=2))
    told = dict(progress.facts())
    assert (told["rows"], told["rows/s"], told["deferred"]) == ("2/8 (25%)", "2.0", "2")
    assert told["ETA"] == "0:00:01", "the lane passes four rows a second"
    assert "lane" not in told
    clock(102.0)
    progress.add(receipt(3, deferred=1))
    assert progress.counts.deferred == 3

    again = Waiting(waiting.folder)
    plan = again.plan()
    clock(200.0)
    progress.expect(
        plan_deferred(plan.identity, plan.unpublished, again.output, plan.longest), "yarn x4"
    )
    clock(220.0)
    progress.add(receipt(1, seconds=10.0))
    told = dict(progress.facts())
    assert (told["rows"], told["rows/s"], told["ETA"]) == ("6/8 (75%)", "0.1", "0:00:20")
    assert told["tokens/s in"] == "1"
    assert (progress.counts.rows, progress.counts.deferred) == (6, 2)
    assert progress.seconds == 12.0


def test_rows_that_wait_are_no_reason_to_give_up() -> None:
    finished = Counts(Counter(ok=900, rejected=1100), Counter({"rejected: null": 1100}))
    waiting = Counts(deferred=98_000)
    both = Counts()
    both.add(finished)
    both.add(waiting)
    check_hope(both, 0, 100_000, 0.2)
    with pytest.raises(TooManyNotOkError):
        check_hope(finished, 0, 100_000, 0.2)
    with pytest.raises(TooManyNotOkError, match="1,100 of this run's 100,000 rows"):
        check_hope(both, 19_000, 100_000, 0.2)
