"""Which rows wait for a longer engine: those that it helps, and they alone."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.translate import Translate
from pipeline.accounting import Usage
from pipeline.errors import RowDeferred, RowRejected
from pipeline.generate import EngineGenerate, texts_of
from pipeline.parts import name_of, overlay_key
from pipeline.records import Counts, Output
from pipeline.task import LongTextTask, room
from pipeline.tokens import RowText
from tests.conftest import asking
from tests.fake_model import FakeModel
from tests.test_engines import echo
from tests.test_translate import translate


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


def deferring(max_tokens: int) -> EngineGenerate:
    """With a context of 400 tokens here, and one of 1,600 later."""
    engine, sampling = echo(max_model_len=400), {"max_tokens": max_tokens}
    return EngineGenerate(engine, asking(engine), sampling, RowText(), longest=1600, defers=True)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.none() | st.integers(1, 900))
async def test_conversation_waits_where_it_and_its_answer_do_not_fit(
    words: list[int], max_tokens: int | None
) -> None:
    """An answer without a limit has the job's."""
    generate = deferring(max_tokens=500)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "w " * count} for count in words]
    }
    if max_tokens:
        body["max_tokens"] = max_tokens
    prompt = sum(words) + 64 + 4 * len(words)
    # The job's own limit is not in a body that is sent as it is.
    fits = prompt <= room(400, max_tokens or 500) and (max_tokens or 0) <= 400
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
    generate = deferring(max_tokens=50)
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


def test_deferred_rows_keep_their_key_while_they_are_the_same() -> None:
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
