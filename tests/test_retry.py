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

from pipeline.accounting import Usage
from pipeline.config import JobConfig
from pipeline.errors import RefusedError
from pipeline.merging import publish, republish
from pipeline.parts import Stamp, read_stamp, result_fields
from pipeline.plan import Plan, Retry, plan_retry
from pipeline.records import Counts, Output, Unit
from pipeline.storage import Folder
from tests.openai_server import Body, OpenAIServer, Reply, answer, error, serving, text_of
from tests.runs import Job

ROWS = 60
FIELDS = result_fields("ko", pa.string())


class Published:
    """Two published files of 60 rows, every seventh row rejected, others failed; see conftest."""

    def __init__(
        self,
        folder: Path,
        job: Callable[..., JobConfig],
        plan: Callable[[JobConfig], Plan],
        write_parquet: Callable[..., Path],
        commit: Callable[..., bool],
    ) -> None:
        for name in ("a", "b"):
            texts = {"text": [f"{name} {row}" for row in range(ROWS)]}
            write_parquet(folder / f"in/{name}.parquet", texts, row_group_size=13)
        self.job = job(folder, input={"rows_per_unit": 4})
        self.output = Folder(self.job.output.path)
        self._plan, self._commit = plan, commit
        for shard in self.plan().shards:
            for unit in shard.units():
                commit(self.output, unit, self.plan().identity, shard.shard.fingerprint)
        for shard in self.plan().shards:
            file, fingerprint = shard.shard, shard.shard.fingerprint
            stamp = Stamp(self.plan().identity, file.name, fingerprint, 0, ROWS, Counts(), "first")
            unchanged = file.check_unchanged
            publish(file.source, file.path, self.output, stamp, shard.key, FIELDS, unchanged)

    def plan(self) -> Plan:
        return self._plan(self.job)

    def plan_retry(self, status: str | None = None, reason: str | None = None) -> Plan:
        return plan_retry(self.plan(), self.output, Retry(status, reason))

    def table(self, name: str) -> pa.Table:
        return pq.read_table(Path(self.output.url) / name)

    def commit(self, plan: Plan, unit: Unit, text: str = "again") -> None:
        planned = next(shard for shard in plan.shards if shard.key == unit.shard)
        rows = [Output(f"{text} {row}", usage=Usage(1, 1, 1, 1)) for row in range(unit.rows)]
        self._commit(self.output, unit, plan.identity, planned.shard.fingerprint, rows)

    def republish(self, plan: Plan, run: str = "second") -> None:
        for planned in plan.shards:
            shard = planned.shard
            assert shard.selected is not None
            republish(self.output, shard.name, shard.selected, planned.key, run)


@pytest.fixture(scope="session")
def published(
    tmp_path_factory: pytest.TempPathFactory,
    job: Callable[..., JobConfig],
    plan: Callable[[JobConfig], Plan],
    write_parquet: Callable[..., Path],
    commit: Callable[..., bool],
) -> Callable[[], Published]:
    return lambda: Published(tmp_path_factory.mktemp("published"), job, plan, write_parquet, commit)


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
    published: Callable[[], Published], status: str | None, reason: str | None, wanted: set[str]
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
    published: Callable[[], Published], data: st.DataObject
) -> None:
    job = published()
    before = job.table("a.parquet")
    untouched = Path(job.output.url, "b.parquet").read_bytes()
    plan = job.plan_retry("failed")
    plan = Plan(plan.identity, [s for s in plan.shards if s.shard.name == "a.parquet"])
    units = [unit for shard in plan.shards for unit in shard.units()]
    done = data.draw(st.sets(st.sampled_from(units)))
    for unit in done:
        job.commit(plan, unit, "early")

    resumed = job.plan_retry("failed").shards[0]
    assert {*resumed.units()} == {*units} - done, "what is done stays done"
    for unit in resumed.units():
        job.commit(plan, unit, "late")
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
    assert Path(job.output.url, "b.parquet").read_bytes() == untouched
    stamp = read_stamp(job.output, "a.parquet")
    assert stamp is not None and (stamp.run, stamp.stop) == ("second", ROWS)
    assert stamp.counts.statuses["failed"] == 0 and stamp.counts.rows == ROWS
    assert not job.output.list("_axbatch/parts")
    assert not job.plan().unpublished


def test_parts_that_outlived_their_retry_are_never_merged_again(
    published: Callable[[], Published],
) -> None:
    job = published()
    plan = job.plan_retry("rejected")
    units = [unit for shard in plan.shards for unit in shard.units()]
    for unit in units:
        job.commit(plan, unit)
    job.republish(plan)
    made = job.table("a.parquet")
    for unit in units:  # as if the driver had died before it dropped them
        job.commit(plan, unit, "leftover")
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


@pytest.mark.ray
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
