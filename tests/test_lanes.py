"""Lanes: rows that don't fit the first engine are done by a longer one, and they alone."""

from __future__ import annotations

import json
import signal
import threading
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.translate import Translate
from pipeline.config import JobConfig, ModelConfig
from pipeline.errors import ModelError, RowDeferred, RowRejected, TooManyNotOkError
from pipeline.generate import EngineGenerate, texts_of
from pipeline.lanes import first_lane, own_context, plan_deferred, yarn_lane
from pipeline.parts import not_ok_rows, overlay_key, part_path
from pipeline.plan import Plan, find_deferred
from pipeline.progress import Progress
from pipeline.records import Counts, Output, Receipt, Unit, Usage
from pipeline.run import check_hope
from pipeline.status import read_status
from pipeline.storage import Folder
from pipeline.task import LongTextTask, room
from pipeline.tokens import RowText
from tests.conftest import commit_unit, make_job, make_plan_of, write_table
from tests.fake_model import FakeModel
from tests.runs import Job
from tests.test_engines import echo
from tests.test_translate import translate

AX = {"max_position_embeddings": 32_768, "num_attention_heads": 64}


def model_with(folder: Path, config: dict[str, Any], **keys: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig.model_validate({"id": str(folder), "context": "auto"} | keys)


# --- the longer engine -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
@given(st.integers(32_769, 131_072))
def test_yarn_has_the_least_factor_that_holds_the_longest_row(
    tmp_path_factory: pytest.TempPathFactory, rope: dict[str, Any], tokens: int
) -> None:
    model = model_with(tmp_path_factory.mktemp("model"), AX | rope)
    lane = yarn_lane(model, tokens)
    overrides = lane.model.engine["hf_overrides"]
    assert lane.model.engine["max_model_len"] == tokens
    assert lane.factor - 0.001 < tokens / 32_768 <= lane.factor <= 4
    assert overrides["rope_parameters"] == {
        "rope_type": "yarn",
        "factor": lane.factor,
        "original_max_position_embeddings": 32_768,
        "rope_theta": 5e5,
    }
    assert tokens <= overrides["max_position_embeddings"] <= tokens + 33


def test_lanes_of_each_context(tmp_path: Path) -> None:
    config = AX | {"rope_theta": 1e4}
    native = first_lane(model_with(tmp_path, config, context="native"))
    auto = first_lane(model_with(tmp_path, config, yarn={"factor": 3.0}))
    yarn = first_lane(model_with(tmp_path, config, context="yarn"))
    assert (native.name, native.longest, native.factor) == ("native", 0, 1)
    assert (auto.name, auto.longest, auto.model.engine) == ("native", 98_304, {})
    assert (yarn.name, yarn.longest, yarn.factor) == ("yarn", 0, 4)
    assert yarn.model.engine["max_model_len"] == 131_072


def test_options_of_the_yarn_lane_are_its_own(tmp_path: Path) -> None:
    model = model_with(
        tmp_path,
        AX,
        engine={"max_num_seqs": 512, "dtype": "bfloat16"},
        yarn={"engine": {"max_num_seqs": 8, "tensor_parallel_size": 2}},
    )
    assert first_lane(model).model.max_num_seqs == 512
    lane = yarn_lane(model, 40_000).model
    assert (lane.max_num_seqs, lane.world_size, lane.engine["dtype"]) == (8, 2, "bfloat16")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_position_embeddings": "many"},
        AX | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        AX | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
    ],
)
def test_model_that_cannot_be_stretched_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"model\.context: native"):
        first_lane(model_with(tmp_path, config))


def test_demo_model_is_made_for_2048() -> None:
    assert own_context(ModelConfig(id="demo")) == 2048


@pytest.mark.parametrize(
    "keys",
    [
        {"yarn": {"factor": 2.0}},
        {"context": "auto", "backend": "http", "base_url": "http://a/v1"},
        {"context": "auto", "engine": {"hf_overrides": {}}},
        {"context": "auto", "yarn": {"factor": 1.0}},
        {"context": "auto", "yarn": {"engine": {"max_model_len": 9}}},
        {"context": "longer"},
    ],
)
def test_context_that_makes_no_sense_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelConfig.model_validate({"id": "a/b"} | keys)


# --- which rows wait -------------------------------------------------------------------------


class Whole(LongTextTask):
    """Its answers are short."""

    kind: str = "whole"
    answers_are_short = True

    @property
    def columns(self) -> list[str]:
        return ["text"]

    async def run(self, row: Any, generate: Any) -> Output:
        pieces = await self.fit(row["text"], generate, "")
        return Output(len(pieces.chunks))


async def pieces_of(task: LongTextTask, words: int, model: FakeModel) -> int:
    """In how many the text goes to the model; 0 if it is rejected."""
    try:
        split = await task.fit("w " * words, model, "")
    except RowRejected as rejected:
        assert rejected.code == "too_long"
        return 0
    return len(split.chunks)


@given(
    st.integers(1, 5000),
    st.integers(1, 3000),
    st.sampled_from([None, 16, 300, 2000]),
    st.sampled_from(["reject", "chunk"]),
    st.sampled_from([Whole, Translate]),
)
async def test_a_text_waits_for_the_shortest_context_that_lets_it_go_whole(
    words: int, max_tokens: int, chunk_tokens: int | None, overflow: str, kind: type[LongTextTask]
) -> None:
    keys = {"kind": "translate", "text": "text", "source": "en", "target": "ko"}
    more = keys if kind is Translate else {}
    task = kind.model_validate({**more, "overflow": overflow, "chunk_tokens": chunk_tokens})

    async def in_context(tokens: int, longest: int = 0) -> int:
        return await pieces_of(task, words, FakeModel(
            max_model_len=tokens, longest_model_len=longest, max_tokens=max_tokens,
        ))  # fmt: skip

    natively, at_most = await in_context(1000), await in_context(4000)
    try:
        assert await in_context(1000, 4000) == natively
        assert natively == 1 or at_most != 1
    except RowDeferred as deferred:
        assert natively != 1
        assert at_most == 1
        assert 1000 < deferred.tokens <= 4000
        assert await in_context(deferred.tokens) == 1
        assert await in_context(deferred.tokens - 1) != 1


async def test_translation_waits_only_where_a_longer_context_helps() -> None:
    """Its answer is as long as its text: with too few `max_tokens` no context does."""
    text = {"text": "word. " * 900}
    short = FakeModel(max_model_len=1000, longest_model_len=4000, max_tokens=100)
    await translate().run(text, short)
    assert len(short.asked) > 9
    long = FakeModel(max_model_len=1000, longest_model_len=4000, max_tokens=1200)
    with pytest.raises(RowDeferred) as deferred:
        await translate().run(text, long)
    assert 2 * 900 < deferred.value.tokens <= 4000


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.none() | st.integers(1, 900))
async def test_conversation_waits_where_it_and_its_answer_do_not_fit(
    words: list[int], max_tokens: int | None
) -> None:
    """An answer without a limit has the job's."""
    generate = EngineGenerate(
        echo(max_model_len=400), {"max_tokens": 500}, RowText(), longest=1600, defers=True
    )
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "w " * count} for count in words]
    }
    if max_tokens:
        body["max_tokens"] = max_tokens
    prompt = sum(words) + 64 + 4 * len(words)
    fits = prompt <= room(400, max_tokens or 500)
    try:
        await generate.send(body)
    except RowDeferred as deferred:
        assert not fits
        assert deferred.tokens == min(1600, prompt + (max_tokens or 500))
    except RowRejected:
        assert prompt > room(1600, max_tokens or 500)
    else:
        assert fits or prompt > room(1600, max_tokens or 500)


async def test_conversation_that_has_begun_waits_for_the_longest_context() -> None:
    """It goes on growing there."""
    generate = EngineGenerate(
        echo(max_model_len=400), {"max_tokens": 50}, RowText(), longest=1600, defers=True
    )
    await generate([{"role": "user", "content": "w " * 100}])
    with pytest.raises(RowDeferred) as deferred:
        await generate([{"role": "user", "content": "w " * 350}])
    assert deferred.value.tokens == 1600


def test_all_text_of_a_body_is_counted() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]
    call = {"function": {"name": "f", "arguments": "{}"}}
    body = {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "b"},
            "no message",
        ],
        "tools": [{"type": "function"}],
    }
    texts = list(texts_of(body))
    assert texts == ["a", "", json.dumps([call]), "b", json.dumps(body["tools"])]


def test_counts_keep_deferred_rows_apart() -> None:
    counts = Counts()
    counts.count(Output("a", usage=Usage(1, 2, 0, 3)))
    counts.count(Output(None, "deferred", "deferred: 70 tokens", Usage(1, 1, 0, 1), needs=70))
    assert (counts.rows, counts.not_ok, counts.deferred, counts.longest) == (1, 0, 1, 70)
    assert Counts.from_json(counts.to_json()) == counts
    before = counts.to_json()
    del before["deferred"], before["longest"]  # as parts made before there were lanes
    assert Counts.from_json(before).rows == 1


# --- whole runs ------------------------------------------------------------------------------

WORDS = {
    "a.parquet": [10, 300, 20, 1000, 5, None, 700, 3000],
    "b.parquet": [12, 14, 500],
    "c.parquet": [3, 4, 5, 6],
}
"""Words of each row. The first lane holds 119, the second 719."""
LONG = [300, 700, 500]
TOO_LONG = [1000, 3000]


class LanesJob(Job):
    """Two lanes of echo engines, without Ray."""

    module = "tests.faults.without_ray"

    def __init__(self, folder: Path, **keys: Any) -> None:
        model = {"id": "echo", "backend": "echo", "context": "auto"}
        super().__init__(
            folder,
            task={
                "kind": "translate", "text": "en", "source": "en", "target": "ko",
                "overflow": "reject",
            },
            input={"path": str(folder / "in"), "rows_per_unit": 2},
            model=model | {"engine": {"max_model_len": 400}} | keys,
            limits={"max_failed_fraction": 1.0},
        )  # fmt: skip
        for name, words in WORDS.items():
            texts = [None if count is None else "w " * count for count in words]
            self.write_input(name, pa.table({"en": texts, "n": range(len(texts))}))

    def rows(self) -> list[dict[str, Any]]:
        return [row for name in WORDS for row in pq.read_table(self.output / name).to_pylist()]


def lanes_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {lane["name"]: lane for lane in summary["lanes"]}


def test_each_row_is_done_once_by_its_lane(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    lanes = lanes_of(job.run())

    rows = job.rows()
    for row, words in zip(
        rows, [count for counts in WORDS.values() for count in counts], strict=True
    ):
        expected = "rejected" if words in (None, *TOO_LONG) else "ok"
        assert (row["_status"], len((row["ko"] or "").split())) == (
            expected, words if expected == "ok" else 0,
        )  # fmt: skip
    assert lanes["native"]["deferred"] == lanes["yarn"]["rows"] == len(LONG)
    long = [row["_usage"] for row in rows if len((row["en"] or "").split()) in LONG]
    assert lanes["yarn"]["usage"]["requests"] == len(LONG), "a short row met the YaRN engine"
    assert lanes["yarn"]["usage"]["prompt_tokens"] == sum(u["prompt_tokens"] for u in long)
    assert lanes["yarn"]["engine"]["max_model_len"] == 1480
    assert job.verify()["statuses"] == {"ok": 12, "rejected": 3, "failed": 0}
    assert not job.parts()
    assert job.run()["lanes"] == []


def test_no_second_engine_without_a_long_row(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / "in" / name).unlink()
    assert [lane["name"] for lane in job.run()["lanes"]] == ["native"]


def test_resumed_job_starts_only_the_engines_it_needs(tmp_path: Path) -> None:
    """Killed while the second lane has one row after the other for a second each."""
    options = {"engine": {"max_num_seqs": 1, "seconds_per_request": 0.7}}
    job = LanesJob(tmp_path, yarn=options)
    run = job.start("run")
    run.wait_until((job.output / "a.parquet").is_file)
    run.kill()
    summary = job.run()
    lanes = lanes_of(summary)
    assert list(lanes) == ["yarn"]
    assert lanes["yarn"]["engine"]["max_model_len"] == 1480
    assert 0 < lanes["yarn"]["rows"] < len(LONG)
    assert summary["job"]["statuses"] == {"ok": 12, "rejected": 3, "failed": 0}
    assert job.verify()["rows"] == len(job.rows())


def test_rows_done_again_go_through_both_lanes(tmp_path: Path) -> None:
    """With few tokens for an answer long rows are cut off; a row that is again is as it was."""
    job = LanesJob(tmp_path)
    job.run("--set", "sampling.max_tokens=200")
    before = job.rows()
    retried = json.loads(
        _printed(
            job, "retry", "--json", "--reason", "truncated", "--set", "sampling.max_tokens=200"
        )
    )
    assert lanes_of(retried)["yarn"]["rows"] == retried["lanes"][0]["deferred"] == 4
    for row, was in zip(job.rows(), before, strict=True):
        assert (row["_status"], row["_reason"], row["ko"]) == (
            was["_status"], was["_reason"], was["ko"],
        )  # fmt: skip
        again = 2 if was["_reason"] and "truncated" in was["_reason"] else 1
        assert row["_usage"]["requests"] == again * was["_usage"]["requests"]


def _printed(job: Job, *arguments: str) -> str:
    run = job.start(*arguments)
    assert run.wait() == 0, run.errors
    return run.printed


def test_what_is_too_long_for_both_lanes_is_cut_for_the_first(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    summary = job.run("--set", "task.overflow=chunk")
    assert summary["job"]["statuses"] == {"ok": 14, "rejected": 1, "failed": 0}
    assert summary["lanes"][1]["usage"]["requests"] == len(LONG)
    assert all(row["ko"].split() == row["en"].split() for row in job.rows() if row["en"])


def test_sigterm_between_the_lanes_loses_nothing(tmp_path: Path) -> None:
    job = LanesJob(tmp_path, yarn={"engine": {"max_num_seqs": 1, "seconds_per_request": 0.7}})
    run = job.start("run")
    run.wait_for_rows(sum(map(len, WORDS.values())))
    run.signal(signal.SIGTERM)
    assert run.wait() == 130
    assert job.run()["exit_code"] == 0
    assert job.verify()["statuses"] == {"ok": 12, "rejected": 3, "failed": 0}


def test_context_is_part_of_the_identity(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    job.run()
    run = job.start("run", "--set", "model.yarn.factor=2.0")
    assert run.wait() == 4
    assert "model.yarn.factor: was 4.0, is 2.0" in run.errors


def test_native_job_has_the_identity_it_had() -> None:
    from pipeline.config import identity_fields

    job = JobConfig.model_validate({
        "name": "a", "task": {"kind": "translate"}, "input": {"path": "in"},
        "output": {"path": "out", "column": "ko"}, "model": {"id": "a/b"},
    })  # fmt: skip
    assert not [key for key in identity_fields(job, {}) if "context" in key or "yarn" in key]


def test_deferred_rows_keep_their_key_while_they_are_the_same() -> None:
    from pipeline.parts import name_of, overlay_key

    key = overlay_key("a/b.parquet/0123456789ab", array("q", [1, 5]))
    assert key != overlay_key("a/b.parquet/0123456789ab", array("q", [1, 6]))
    assert name_of(key) == "a/b.parquet"


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

    told = json.loads(_printed(job, "status", "--json", *each))
    # 4 of 15 rows wait for the second lane; of `a` 300, 1000 and 700 words, and 500 of `b`
    assert (told["rows_pending"], told["rows_deferred"], told["committed"]["rows"]) == (2, 2, 13)
    assert [file["rows_done"] for file in told["files"]] == [7, 2, 4]
    examples = {entry["reason"]: entry["examples"] for entry in told["not_ok"]}
    assert examples["rejected: truncated"] == [
        {"file": "a.parquet", "row": 1}, {"file": "a.parquet", "row": 3},
    ]  # fmt: skip
    assert not any("deferred" in reason for reason in examples)
    shown = " ".join(_printed(job, "status", *each).split())
    assert "rows done 13 of 15 2 rows waiting for the YaRN engine" in shown
    shown = " ".join(_printed(job, "plan", *each).split())
    assert "to do 2 rows 2 rows waiting for the YaRN engine" in shown
    verify = job.start("verify", *each)
    assert verify.wait() != 0
    assert "a.parquet: not published, 1 of 8 rows still to do" in verify.errors

    shown = " ".join(_printed(job, "run", *each).split())
    assert "2 rows to do in 2 file(s), 13 rows done before, 2 of them too long" in shown
    assert "lane yarn 2 rows; context" in shown


def test_summary_tells_the_lanes_apart(tmp_path: Path) -> None:
    job = LanesJob(tmp_path)
    shown = " ".join(_printed(job, "run").split())
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
    assert "lane native" not in _printed(job, "run")


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


# --- real documents, the real tokenizer ------------------------------------------------------

SHARED = Path(__file__).parents[2] / "shared" / "data"
DOCUMENTS = {
    "en/gutenberg_3261_news_from_nowhere.txt": 109_786,
    "en/gutenberg_972_devils_dictionary.txt": 101_329,
    "ko/law_civil_act.txt": 68_266,
    "ko/law_patent_act.txt": 48_609,
    "ko/law_personal_information_protection_act.txt": 29_117,
}
"""Tokens of A.X 3.1 (see the folder's notes)."""


class AxModel(FakeModel):
    """A.X 3.1's tokenizer and context, and no weights."""

    def __init__(self, **keys: Any) -> None:
        from tokenizers import Tokenizer

        super().__init__(max_model_len=32_768, longest_model_len=131_072, **keys)
        self._tokenizer = Tokenizer.from_file(str(SHARED / "ax31" / "A.X-3.1" / "tokenizer.json"))

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])


@pytest.mark.skipif(
    not (SHARED / "long-docs").is_dir(), reason="the long documents are not beside the checkout"
)
async def test_long_documents_find_their_lane_and_none_is_lost() -> None:
    texts = {name: (SHARED / "long-docs" / name).read_text("utf-8") for name in DOCUMENTS}
    model = AxModel(max_tokens=4096)
    assert {name: model.count_tokens(text) for name, text in texts.items()} == DOCUMENTS

    # Whole: all five wait for YaRN; the last one has room for itself, but not for its answer too.
    task = Whole.model_validate({"overflow": "reject"})
    for name, text in texts.items():
        with pytest.raises(RowDeferred) as deferred:
            await task.run({"text": text}, model)
        assert deferred.value.tokens == DOCUMENTS[name] + 4096 + 64
    assert (await task.run({"text": texts[name][:40_000]}, model)).value == 1
    with pytest.raises(RowRejected, match=r"^too_long: 211\d\d\d tokens, the limit is 126912"):
        await task.run({"text": "\n".join([*texts.values()][:2])}, model)

    # Cut for the native lane: as translation does it, whose answers are as long as its texts.
    cut = translate(chunk_tokens=2048)
    for name, text in texts.items():
        language = name[:2]
        pieces = await cut.fit(text, model, "", language)
        assert pieces.join() == text
        counts = [model.count_tokens(chunk.text) for chunk in pieces.chunks]
        assert max(counts) <= 2048
        assert DOCUMENTS[name] / 2048 < len(counts) < 1.5 * DOCUMENTS[name] / 2048
