"""What a plan expects of rows: which are rejected, cut, deferred or repeated, and what they ask."""

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from pipeline.accounting import Usage
from pipeline.chunking import split
from pipeline.errors import RowRejected
from pipeline.records import Output
from pipeline.task import Task
from tests.conftest import PreparedJob
from tests.forecasts import estimate

Prepare = Callable[..., PreparedJob]


def test_rejected_rows_are_counted_by_reason(prepared: Prepare) -> None:
    found = estimate(prepared([None, " ", "a text", "another"] * 1_000))
    assert found.tokens
    assert found.tokens.not_ok == {"rejected: null": 1_000, "rejected: empty": 1_000}
    assert found.tokens.requests.mid == 2_000


def test_cut_rows_are_counted_with_their_requests(prepared: Prepare) -> None:
    long = ". ".join(["a sentence of some words"] * 40)
    pieces = len(split(long, 50, lambda text: len(text.split())).chunks)
    job = prepared(["short text", long] * 100, task={"chunk_tokens": 50})
    found = estimate(job)
    assert found.tokens and found.tokens.cut == {"chunk": 100}
    assert found.tokens.requests.mid == 100 + 100 * pieces
    cut = estimate(job.changed(task={"chunk_tokens": 50, "overflow": "truncate_tail"}))
    assert cut.tokens and cut.tokens.cut == {"truncate_tail": 100}
    assert cut.tokens.requests.mid == 200
    refused = estimate(job.changed(task={"chunk_tokens": 50, "overflow": "reject"}))
    assert refused.tokens and refused.tokens.not_ok == {"rejected: too_long": 100}


def test_deferred_rows_go_to_a_lane_of_their_own(prepared: Prepare) -> None:
    long, longest = "word " * 900, "word " * 5_000
    texts = ["a b c"] * 90 + [long] * 9 + [longest]
    model = {"context": "auto", "engine": {"max_model_len": 1_000}}
    job = prepared(texts, model=model, task={"overflow": "reject"}, sampling={"max_tokens": 1_500})
    found = estimate(job)
    assert found.tokens and found.tokens.deferred == 9
    lanes = {lane.lane.name: lane for lane in found.tokens.lanes}
    assert {name: lane.rows for name, lane in lanes.items()} == {"native": 91, "yarn": 9}
    assert 1_000 < lanes["yarn"].lane.model.engine["max_model_len"] <= 4_000
    assert lanes["yarn"].prompt > 900 > lanes["native"].prompt
    assert found.tokens.not_ok == {"rejected: too_long": 1}
    assert found.tokens.fits_native == pytest.approx(0.91)


def test_waiting_rows_are_estimated_as_the_yarn_lane_will_see_them(prepared: Prepare) -> None:
    texts = (["a b c"] * 9 + ["word " * 900]) * 10
    model = {"context": "auto", "engine": {"max_model_len": 1_000}}
    job = prepared(texts, model=model, sampling={"max_tokens": 1_500})
    made = job.plan()
    outputs = [
        Output(None, "deferred", "deferred: 1900 tokens", needs=1_900)
        if len(text) > 100
        else Output("-", usage=Usage(1, 9, 0, 3))
        for text in texts
    ]
    [unit] = made.shards[0].units()
    job.commit(made, unit, outputs)
    found = estimate(job)
    assert (found.rows, found.covers) == (10, "waiting")
    assert found.tokens and [lane.lane.name for lane in found.tokens.lanes] == ["yarn"]
    assert found.tokens.requests.mid == 10


class Strange(Task):
    """Wants answers that nobody can make up."""

    kind: str = "strange"
    fails: str = ""

    @property
    def columns(self) -> list[str]:
        return ["text"]

    async def run(self, row: Any, generate: Any) -> Output:
        if self.fails == "before":
            raise KeyError("a bug")
        completion = await generate([{"role": "user", "content": row["text"]}])
        if self.fails == "reject":
            raise RowRejected("no_label")
        return Output(json.loads(completion.text)["answer"])


@pytest.mark.parametrize(
    ("fails", "not_ok"),
    [("", {}), ("reject", {}), ("before", {"failed: task_error": 20})],
)
def test_what_follows_from_a_made_up_answer_is_not_counted(
    prepared: Prepare, fails: str, not_ok: dict[str, int]
) -> None:
    found = estimate(prepared(["a text"] * 20), Strange(fails=fails))
    assert found.tokens and found.tokens.not_ok == not_ok


KINDS: list[dict[str, Any]] = [
    {"kind": "summarize", "text": "text"},
    {"kind": "ask", "text": "text", "question": "Who?"},
    {"kind": "classify", "text": "text", "labels": ["good", "bad"]},
    {"kind": "extract", "text": "text", "schema": {
        "type": "object", "properties": {"who": {"type": "string"}}}},
    {"kind": "prompt", "prompt": "Say it: {{ text }}"},
]  # fmt: skip


@pytest.mark.parametrize("task", KINDS, ids=lambda task: task["kind"])
def test_each_kind_asks_once_for_a_short_text(prepared: Prepare, task: dict[str, Any]) -> None:
    job = prepared(["a text", None] * 20)
    job.config = job.config.model_copy(update={"task": task})
    found = estimate(job)
    assert found.tokens and found.tokens.requests == (20, 20, 20)
    assert found.tokens.not_ok == {"rejected: null": 20}
    low, _, high = found.tokens.completion
    if task["kind"] == "prompt":
        assert (found.tokens.answers, low, high) == ("unknown", 20, 20 * 1024)
    else:
        assert found.tokens.answers == "expected" and 20 <= low < high < 20 * 1024


def test_texts_not_nfc_and_repeated_rows_are_seen(prepared: Prepare) -> None:
    texts = [unicodedata.normalize("NFD", "가나"), "같은 글", "같은 글", "글 4"]
    found = estimate(prepared(texts))
    assert (found.decomposed, found.duplicates) == (0.25, 0.25)


def test_rows_without_a_text_are_not_repeated_ones(prepared: Prepare) -> None:
    assert estimate(prepared([None, None, None, "", "", "one"])).duplicates == 0


def test_a_job_without_rows_is_planned(prepared: Prepare) -> None:
    job = prepared()
    job.write("a.parquet", pa.table({"text": pa.array([], pa.string())}))
    assert estimate(job).to_json()["rows"] == 0
