"""Lanes: rows that don't fit the first engine are done by a longer one, and they alone."""

from __future__ import annotations

import json
import signal
from array import array
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.translate import Translate
from pipeline.accounting import Usage
from pipeline.config import JobConfig, ModelConfig
from pipeline.errors import ModelError, RowDeferred, RowRejected
from pipeline.generate import EngineGenerate, texts_of
from pipeline.lanes import first_lane, own_context, yarn_lane
from pipeline.parts import overlay_key
from pipeline.records import Counts, Output
from pipeline.task import LongTextTask, room
from pipeline.tokens import RowText
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
        {"context": "yarn", "engine": {"max_model_len": "64k"}},
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
        printed(job, "retry", "--json", "--reason", "truncated", "--set", "sampling.max_tokens=200")
    )
    assert lanes_of(retried)["yarn"]["rows"] == retried["lanes"][0]["deferred"] == 4
    for row, was in zip(job.rows(), before, strict=True):
        assert (row["_status"], row["_reason"], row["ko"]) == (
            was["_status"], was["_reason"], was["ko"],
        )  # fmt: skip
        again = 2 if was["_reason"] and "truncated" in was["_reason"] else 1
        assert row["_usage"]["requests"] == again * was["_usage"]["requests"]


def printed(job: Job, *arguments: str) -> str:
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
    from pipeline.parts import name_of

    key = overlay_key("a/b.parquet/0123456789ab", array("q", [1, 5]))
    assert key != overlay_key("a/b.parquet/0123456789ab", array("q", [1, 6]))
    assert name_of(key) == "a/b.parquet"


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
