"""Requests that were made before: computed once, and every row has its own right answer."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import repeats
from pipeline.accounting import NOTHING_USED, Usage
from pipeline.errors import RowFailed
from pipeline.meter import Reading
from pipeline.parts import part_path
from pipeline.records import Completion, Unit
from pipeline.repeats import ANSWER_BYTES, Repeats
from pipeline.worker import Worker
from tests.conftest import make_job
from tests.virtual_time import run_virtually
from tests.workers import do_unit, spec_here

Body = dict[str, Any]


def greedy(content: Any, **keys: Any) -> Body:
    return {"messages": [{"role": "user", "content": content}], "temperature": 0.0, **keys}


def text_of(body: Mapping[str, Any]) -> Any:
    return body["messages"][0]["content"]


class Computing:
    """Answers with the text of the body, after a second; `fails` so many times first."""

    def __init__(self, fails: int = 0) -> None:
        self.computed: list[Any] = []
        self._fails = fails
        self.ask = Repeats(self._compute).ask

    async def _compute(self, body: Mapping[str, Any]) -> Completion:
        self.computed.append(text_of(body))
        is_to_fail = len(self.computed) <= self._fails
        await asyncio.sleep(1)
        if is_to_fail:
            raise RowFailed("engine_error")
        message = {"role": "assistant", "content": f"to {text_of(body)!r}"}
        return Completion(message, "stop", Usage(1, 1, 0, 1))


# --- what is computed ------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=40))
def test_same_body_is_computed_once_asked_at_once_or_later(asked: list[tuple[int, int]]) -> None:
    async def play() -> None:
        computing = Computing()

        async def ask(comes: int, number: int) -> bool:
            await asyncio.sleep(comes / 4)
            answer, is_copy = await computing.ask(greedy(number))
            assert answer.text == f"to {number}"
            return is_copy

        copies = await asyncio.gather(*(ask(*each) for each in asked))
        numbers = {number for _, number in asked}
        assert Counter(computing.computed) == Counter(numbers)
        assert copies.count(False) == len(numbers)

    run_virtually(play())


values = st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from(["", "1", "a", "é", "é"])
some_bodies = st.builds(
    greedy, values, stop=values, user=values, tools=st.lists(values, max_size=2)
)


@given(some_bodies, some_bodies)
def test_bodies_that_differ_in_anything_are_no_copies(one: Body, two: Body) -> None:
    async def play() -> None:
        ask = Computing().ask
        await ask(one)
        _, is_copy = await ask(two)
        assert is_copy == (repr(one) == repr(two))

    run_virtually(play())


@pytest.mark.parametrize(
    "keys",
    [{}, {"temperature": 0.7}, {"temperature": None}, {"temperature": 0.7, "seed": None}],
    ids=str,
)
def test_sampling_without_a_seed_is_never_reused(keys: Body) -> None:
    async def play() -> None:
        computing = Computing()
        body = {"messages": greedy("a")["messages"], **keys}
        answers = await asyncio.gather(*(computing.ask(body) for _ in range(3)))
        answers.append(await computing.ask(body))
        assert len(computing.computed) == 4
        assert not any(is_copy for _, is_copy in answers)

    run_virtually(play())


@pytest.mark.parametrize(
    "keys", [{"temperature": 0}, {"temperature": 0.7, "seed": 0}, {"seed": 5}], ids=str
)
def test_greedy_and_seeded_answers_are_reused(keys: Body) -> None:
    async def play() -> None:
        ask = Computing().ask
        body = {"messages": greedy("a")["messages"], **keys}
        assert [(await ask(body))[1] for _ in range(2)] == [False, True]

    run_virtually(play())


@pytest.mark.parametrize(
    "keys", [{"n": 2}, {"logprobs": True, "top_logprobs": 5}, {"prompt_logprobs": 1}], ids=str
)
def test_answers_that_are_large_or_several_are_not_kept(keys: Body) -> None:
    async def play() -> None:
        ask = Computing().ask
        assert [(await ask({**greedy("a"), **keys}))[1] for _ in range(2)] == [False, False]

    run_virtually(play())


@given(st.integers(0, 8), st.integers(1, 8))
def test_failures_are_not_kept_and_all_who_waited_ask_themselves(fails: int, askers: int) -> None:
    async def play() -> None:
        computing = Computing(fails)
        asking = (computing.ask(greedy("a")) for _ in range(askers))
        answers = await asyncio.gather(*asking, return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, RowFailed)]
        assert len(failed) == min(fails, askers)
        assert len(computing.computed) == (askers if fails else 1)

    run_virtually(play())


def test_those_who_wait_for_an_asker_that_is_cancelled_get_their_answer() -> None:
    async def play() -> None:
        computing = Computing()
        first, *others = [asyncio.create_task(computing.ask(greedy("a"))) for _ in range(3)]
        await asyncio.sleep(0.5)
        first.cancel()
        copies = [(await other)[1] for other in others]
        assert copies == [False, False]
        assert len(computing.computed) == 3

    run_virtually(play())


async def test_lone_surrogates_are_text_like_any_other() -> None:
    async def compute(body: Mapping[str, Any]) -> Completion:
        return Completion({"content": text_of(body)}, "stop", NOTHING_USED)

    ask = Repeats(compute).ask
    texts = ["a\ud800", "a\udfff", "a?", "a\ufffd", "a\\ud800"]
    assert [(await ask(greedy(text)))[1] for text in texts] == [False] * len(texts)
    assert [(await ask(greedy(text)))[0].text for text in texts] == texts


def test_what_json_has_no_word_for_is_told_apart() -> None:
    """A message of structs may hold a date beside its content, say; engines don't look at it."""
    things = [datetime(2025, 7, 1, tzinfo=UTC), datetime(2025, 7, 2), Decimal("1.0"), b"1.0", 1.0]
    bodies = [greedy("a", metadata=thing) for thing in things]

    async def play() -> None:
        ask = Computing().ask
        assert [(await ask(body))[1] for body in bodies + bodies] == [False] * 5 + [True] * 5

    run_virtually(play())


# --- what is kept ----------------------------------------------------------------------------


async def asked_in_turn(names: str, length: int = 0) -> str:
    """Those that are computed, of bodies asked one after the other. Answers of such a length."""
    computed = []

    async def compute(body: Mapping[str, Any]) -> Completion:
        computed.append(text_of(body))
        return Completion({"content": "x" * length}, "stop", NOTHING_USED)

    ask = Repeats(compute).ask
    for name in names:
        await ask(greedy(name))
    return "".join(computed)


@pytest.fixture
def room_for_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "KEPT_BYTES", 3 * ANSWER_BYTES)


@pytest.mark.parametrize(
    ("asked", "computed"),
    [("abcabc", "abc"), ("abcda", "abcda"), ("abcdbcd", "abcd"), ("abcadacdb", "abcdb")],
)
@pytest.mark.usefixtures("room_for_three")
async def test_those_that_were_last_asked_for_longest_ago_leave_first(
    asked: str, computed: str
) -> None:
    assert await asked_in_turn(asked) == computed


@pytest.mark.usefixtures("room_for_three")
async def test_long_answers_take_more_room() -> None:
    assert await asked_in_turn("aba", length=ANSWER_BYTES // 8) == "ab"
    assert await asked_in_turn("abcabc", length=ANSWER_BYTES // 8) == "abcabc"
    assert await asked_in_turn("aab", length=ANSWER_BYTES) == "aab", "one too long to be kept"


# --- rows ------------------------------------------------------------------------------------


ROWS, ROWS_PER_UNIT, DISTINCT = 600, 50, 420


def texts_with_repeats() -> list[str]:
    """30% repeat others, some near, some far."""
    dice = random.Random(7)
    texts = [f"text {i}" + " word" * dice.randrange(30) for i in range(DISTINCT)]
    texts += dice.choices(texts, k=ROWS - DISTINCT)
    dice.shuffle(texts)
    assert len(set(texts)) == DISTINCT
    return texts


def rows_of_a_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any
) -> tuple[list[str], list[dict[str, Any]], Reading]:
    """Texts, result rows and the engine's meter, of a job that a worker does here."""
    model = {"engine": {"max_num_seqs": 8, "seconds_per_completion_token": 1e-4}}
    job = make_job(folder, model=model, **sections)
    texts = texts_with_repeats()
    units = [Unit("a.parquet", at, at + ROWS_PER_UNIT) for at in range(0, ROWS, ROWS_PER_UNIT)]
    spec = spec_here(job, folder, monkeypatch)

    async def live() -> Reading:
        alive = Worker(spec)
        rows = [{"text": texts[unit.start : unit.stop]} for unit in units]
        await asyncio.gather(*map(do_unit, [alive] * len(units), units, rows))
        return alive._engine.meter.read()

    reading = asyncio.run(live())
    parts = [pq.read_table(Path(spec.output.url) / part_path(unit)) for unit in units]
    return texts, pa.concat_tables(parts).to_pylist(), reading


def summed(rows: list[dict[str, Any]]) -> Usage:
    return sum((Usage(**row["_usage"]) for row in rows), NOTHING_USED)


def test_repeated_rows_have_their_own_output_and_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, rows, reading = rows_of_a_worker(tmp_path, monkeypatch)
    assert [row["ko"] for row in rows] == texts
    assert {row["_status"] for row in rows} == {"ok"}
    asked_of = Counter()
    for text, row in zip(texts, rows, strict=True):
        asked_of[text] += row["_usage"]["requests"]
        assert row["_usage"]["requests"] or Usage(**row["_usage"]) == NOTHING_USED
    assert set(asked_of.values()) == {1}
    assert summed(rows) == reading.usage
    assert reading.usage.requests == DISTINCT


@pytest.mark.parametrize(
    "sections",
    [{"schedule": {"reuse_answers": False}}, {"sampling": {"temperature": 0.5}}],
    ids=["not wanted", "left to chance"],
)
def test_every_row_is_asked_where_answers_are_not_reused(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, rows, reading = rows_of_a_worker(tmp_path, monkeypatch, **sections)
    assert [row["ko"] for row in rows] == texts
    assert {row["_usage"]["requests"] for row in rows} == {1}
    assert summed(rows) == reading.usage
    assert reading.usage.requests == ROWS
