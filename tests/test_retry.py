"""Retry: just the wanted rows are done again, and all else stays as it was, whatever happens."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RefusedError
from pipeline.parts import read_stamp
from pipeline.plan import Plan
from tests.conftest import PreparedJob
from tests.faults import without_ray
from tests.openai_server import Body, OpenAIServer, Reply, answer, error, serving, text_of
from tests.runs import Job

ROWS = 60
"""Of each of the two files of `published`."""


@pytest.mark.parametrize(
    ("status", "reason", "wanted"),
    [
        ("failed", None, {"failed"}),
        ("rejected", None, {"rejected"}),
        (None, "too_long", {"rejected"}),
        (None, None, {"failed", "rejected"}),
        ("failed", "too_long", set()),
        (None, "too", set()),
    ],
)
def test_plan_has_exactly_the_wanted_rows(
    published: Callable[[], PreparedJob], status: str | None, reason: str | None, wanted: set[str]
) -> None:
    job = published()
    plan = job.plan_retry(status, reason)
    for name in ("a.parquet", "b.parquet"):
        statuses = job.table(name)["_status"].to_pylist()
        expected = [row for row, status in enumerate(statuses) if status in wanted]
        found = [shard.shard.selected for shard in plan.shards if shard.shard.name == name]
        assert found == ([array("q", expected)] if expected else [])
    assert plan.untouched.rows == (0 if wanted else 2 * ROWS)


@settings(max_examples=15)
@given(data=st.data())
def test_only_the_wanted_rows_change_however_often_it_is_interrupted(
    published: Callable[[], PreparedJob], data: st.DataObject
) -> None:
    job = published()
    before = job.table("a.parquet")
    untouched = job.path("b.parquet").read_bytes()
    plan = job.plan_retry("failed")
    plan = Plan(plan.identity, [s for s in plan.shards if s.shard.name == "a.parquet"])
    units = [unit for shard in plan.shards for unit in shard.units()]
    done = data.draw(st.sets(st.sampled_from(units)))
    for unit in done:
        job.redo(plan, unit, "early")

    resumed = job.plan_retry("failed").shards[0]
    assert {*resumed.units()} == {*units} - done, "what is done stays done"
    for unit in resumed.units():
        job.redo(plan, unit, "late")
    job.republish(plan)

    made = job.table("a.parquet")
    early = {row for unit in done for row in range(unit.start, unit.stop)}
    redone = {row: index for index, row in enumerate(plan.shards[0].shard.selected or ())}
    for row, (old, new) in enumerate(zip(before.to_pylist(), made.to_pylist(), strict=True)):
        if row not in redone:
            assert new == old
            continue
        text = "early" if redone[row] in early else "late"
        first = old["_usage"]
        usage = {name: count + 1 for name, count in first.items()}
        assert new["ko"].startswith(text)
        assert (new["text"], new["_status"], new["_reason"]) == (old["text"], "ok", None)
        assert new["_usage"] == usage, "all that a row's attempts took"
    assert made.schema.equals(before.schema, check_metadata=False)
    assert job.path("b.parquet").read_bytes() == untouched
    stamp = read_stamp(job.output, "a.parquet")
    assert stamp is not None and (stamp.run, stamp.stop) == ("second", ROWS)
    assert stamp.counts.statuses["failed"] == 0 and stamp.counts.rows == ROWS
    assert not job.output.list("_axbatch/parts")
    assert not job.plan().unpublished


def test_parts_that_outlived_their_retry_are_never_merged_again(
    published: Callable[[], PreparedJob],
) -> None:
    job = published()
    plan = job.plan_retry("rejected")
    units = [unit for shard in plan.shards for unit in shard.units()]
    for unit in units:
        job.redo(plan, unit)
    job.republish(plan)
    made = job.table("a.parquet")
    for unit in units:  # as if the driver had died before it dropped them
        job.redo(plan, unit, "leftover")
    assert not job.plan_retry("rejected").shards
    with pytest.raises(RefusedError, match="published again meanwhile"):
        job.republish(plan)
    assert job.table("a.parquet").equals(made)


def bracketed(body: Body) -> Reply:
    return answer(f"[{text_of(body)}]")


def fail_on_bad(body: Body) -> Reply:
    return error(500, "no") if "bad" in text_of(body) else bracketed(body)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving(OpenAIServer(fail_on_bad)) as running:
        yield running


def test_retry_asks_for_the_failed_rows_alone_and_mends_them(
    tmp_path: Path, server: OpenAIServer
) -> None:
    model = {
        "id": "served",
        "backend": "http",
        "base_url": server.url,
        "engine": {"max_retries": 0},
    }
    job = Job(tmp_path, model=model, limits={"max_failed_fraction": 0.5})
    job.module = without_ray.__name__
    texts = [None if i == 3 else f"bad {i}" if i % 10 == 5 else f"good {i}" for i in range(40)]
    job.write_input("a.parquet", pa.table({"en": texts}))
    job.write_input("b.parquet", pa.table({"en": ["good"] * 5}))
    assert job.run()["job"]["statuses"] == {"ok": 40, "rejected": 1, "failed": 4}
    untouched = (job.output / "b.parquet").read_bytes()

    status = job.start("status", "--json")
    assert status.wait() == 0
    assert json.loads(status.printed)["not_ok"] == [
        {
            "reason": "failed: engine_error",
            "rows": 4,
            "examples": [{"file": "a.parquet", "row": row} for row in (5, 15, 25)],
        },
        {"reason": "rejected: null", "rows": 1, "examples": [{"file": "a.parquet", "row": 3}]},
    ]

    server.respond, server.bodies = bracketed, []
    retry = job.start("retry", "--json")
    assert retry.wait() == 0, retry.errors
    assert "4 rows to do again in 1 file(s)" in retry.errors

    assert sorted(server.asked) == ["bad 15", "bad 25", "bad 35", "bad 5"]
    summary = json.loads(retry.printed)
    assert summary["this_run"]["rows"] == 4
    assert summary["job"] == job.verify()
    assert summary["job"]["statuses"] == {"ok": 44, "rejected": 1, "failed": 0}
    assert pq.read_table(job.output / "a.parquet")["ko"].to_pylist() == [
        text and f"[{text}]" for text in texts
    ]
    assert (job.output / "b.parquet").read_bytes() == untouched
    again = job.start("retry")
    assert again.wait() == 0
    assert "no row is to be done again" in again.printed
