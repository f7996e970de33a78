"""Translate, with a fake model of a few lines: prompts, long texts, markup, and odd rows."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import load_task
from jobs.translate import LANGUAGES, Translate
from pipeline.accounting import Usage
from pipeline.checks import REMINDERS, finished_text, text_of
from pipeline.config import JobConfig
from pipeline.errors import JobFileError, RowError, RowFailed, RowRejected
from pipeline.identity import identity_fields, identity_hash
from pipeline.records import Completion, Message, Output
from tests.fake_model import FakeModel, echo

KEYS = {"kind": "translate", "text": "text", "source": "en", "target": "ko"}


def translate(**keys: Any) -> Translate:
    return Translate.model_validate(KEYS | keys)


def identity(job: JobConfig) -> str:
    return identity_hash(identity_fields(job, load_task(job).identity()))


async def test_row_is_asked_for_once_with_its_text_as_the_user_turn() -> None:
    model = FakeModel(" <b>안녕</b>\n")
    assert await translate().run({"text": "Hello\n <b>you</b> "}, model) == Output("<b>안녕</b>")
    [[system, user]] = model.asked
    assert user == {"role": "user", "content": "Hello\n <b>you</b> "}
    assert system == {
        "role": "system",
        "content": "You are an expert who translates the user's English sentences into Korean. "
        "Answer with the translation only.",
    }


async def test_other_columns_never_reach_the_model() -> None:
    model, task = FakeModel(), translate(text="body")
    assert task.columns == ["body"]
    await task.run({"body": "Hello", "secret": "hidden"}, model)
    assert "hidden" not in repr(model.asked)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "null"),
        ("", "empty"),
        (" \n\t\u3000", "empty"),
        (7, "not_text: text holds int"),
        (["a"], "not_text: text holds list"),
        (b"a", "not_text: text holds bytes"),
    ],
)
async def test_row_without_text_is_rejected_and_costs_no_request(text: object, reason: str) -> None:
    model = FakeModel()
    with pytest.raises(RowRejected) as raised:
        await translate().run({"text": text}, model)
    assert raised.value.reason == reason
    assert model.asked == []


@pytest.mark.parametrize(
    ("answer", "finish_reason", "code"),
    [
        ("cut off in the mid", "length", "truncated"),
        ("", "length", "truncated"),
        ("", "stop", "empty_answer"),
        (None, "stop", "empty_answer"),
        (" \n ", "stop", "empty_answer"),
        ("half of it", "content_filter", "stopped"),
        ("half of it", "repetition", "stopped"),
        ("half of it", "abort", "engine_error"),
    ],
)
async def test_answer_that_is_none_is_not_ok(
    answer: str | None, finish_reason: str, code: str
) -> None:
    with pytest.raises(RowError) as raised:
        await translate().run({"text": "Hello"}, FakeModel(answer, finish_reason))
    assert raised.value.reason.partition(":")[0] == code


@pytest.mark.parametrize("error", [RowRejected("too_long: 9 of 8"), RuntimeError("bug")])
async def test_trouble_of_the_engine_passes_through(error: Exception) -> None:
    def fail(text: str) -> str:
        raise error

    with pytest.raises(type(error)) as raised:
        await translate().run({"text": "Hello"}, FakeModel(fail))
    assert raised.value is error


@given(st.text().filter(str.strip))
def test_text_is_passed_on_unchanged_and_answers_lose_only_outer_space(text: str) -> None:
    assert text_of({"text": text}, "text") == text
    message = {"role": "assistant", "content": text}
    assert finished_text(Completion(message, "stop", Usage())) == text.strip()


@pytest.mark.parametrize("tag", [*LANGUAGES, "en-GB", "haw"])
def test_prompt_names_both_languages(tag: str) -> None:
    other = "ko" if tag != "ko" else "en"
    assert LANGUAGES.get(tag, tag) in translate(source=tag, target=other).system_prompt
    assert f"into {LANGUAGES.get(tag, tag)}." in translate(source=other, target=tag).system_prompt


def test_instructions_stand_at_the_end_of_the_prompt() -> None:
    plain, told = translate(), translate(instructions="Formal. Keep {names}.")
    assert told.system_prompt == f"{plain.system_prompt}\nFormal. Keep {{names}}."


@pytest.mark.parametrize(
    "change",
    [
        {"instructions": "Be formal."},
        {"source": "de"},
        {"target": "ja"},
        {"text": "body"},
        {"chunk_tokens": 100},
        {"context": "rolling"},
        {"overflow": "reject"},
    ],
)
def test_all_keys_of_the_task_are_in_the_identity(
    tmp_path: Any, job: Callable[..., JobConfig], change: dict[str, Any]
) -> None:
    assert identity(job(tmp_path, task=KEYS | change)) != identity(job(tmp_path, task=KEYS))


def test_identity_holds_the_prompts_that_code_makes() -> None:
    assert translate().identity()["system_prompt"] == translate().system_prompt
    assert translate().identity()["reminders"] == REMINDERS


def test_default_keys_may_be_left_out_without_changing_the_identity(
    tmp_path: Any, job: Callable[..., JobConfig]
) -> None:
    given_ = identity(
        job(tmp_path, task={**KEYS, "instructions": "", "chunk_tokens": None, "context": "none"})
    )
    assert given_ == identity(job(tmp_path, task=KEYS))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": "en"}, "same language"),
        ({"target": "Korean!"}, "task.target"),
        ({"text": 7}, "task.text"),
        ({"chunk_tokens": 15}, "task.chunk_tokens"),
        ({"overflow": "cut"}, "task.overflow"),
        ({"context": "rollin"}, "task.context"),
        ({"instruction": "x"}, "`instructions`"),
        ({"kind": "tranlate"}, "`translate`"),
    ],
)
def test_wrong_key_is_a_job_file_error_that_names_it(
    tmp_path: Any, job: Callable[..., JobConfig], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(JobFileError) as raised:
        load_task(job(tmp_path, task=KEYS | change))
    assert named in str(raised.value)


# --- long texts ------------------------------------------------------------------------------


async def run(model: FakeModel, text: str, **keys: Any) -> str:
    """The translation, in pieces of 16 tokens unless `keys` says otherwise."""
    output = await translate(**{"chunk_tokens": 16, **keys}).run({"text": text}, model)
    assert output.status == "ok"
    return str(output.value)


SENTENCES = [f"Sentence number {i} has six words." for i in range(40)]
LONG = "  " + " ".join(SENTENCES[:20]) + "\r\n\r\n\t" + "  ".join(SENTENCES[20:]) + "\n"


@pytest.mark.parametrize("context", ["none", "rolling"])
async def test_a_long_text_is_asked_for_piece_by_piece_and_joined_as_it_was(context: str) -> None:
    model = FakeModel(echo)
    assert await run(model, LONG, context=context) == LONG
    assert len(model.texts) > 10
    assert " ".join(model.texts).split() == LONG.split()
    assert max(len(text.split()) for text in model.texts) <= 16


@settings(max_examples=200)
@given(st.text("ab가. \n\t\u3000#-`|>1", min_size=17, max_size=300).filter(str.strip))
async def test_nothing_of_a_text_is_lost_or_moved(text: str) -> None:
    model = FakeModel(echo)
    assert (await run(model, text)).strip() == text.strip()
    assert all(asked.strip() for asked in model.texts)


async def test_a_text_that_surely_fits_is_not_even_counted() -> None:
    model = FakeModel(max_tokens=1024)
    await translate().run({"text": "x" * 1024}, model)
    assert model.texts == ["x" * 1024]
    assert "x" * 1024 not in model.counted


async def test_a_text_is_tried_whole_if_an_answer_of_its_length_would_do() -> None:
    model, text = FakeModel(echo, max_tokens=400), "word. " * 400
    await run(model, text, chunk_tokens=None)
    assert model.texts == [text]


@pytest.mark.parametrize(
    ("limits", "budget"),
    [
        ({"max_tokens": 400, "max_model_len": 32_768}, 200),
        ({"max_tokens": 4000, "max_model_len": 682}, 200),
    ],
)
async def test_pieces_leave_room_for_answers_twice_as_long(
    limits: dict[str, int], budget: int
) -> None:
    model = FakeModel(echo, **limits)  # type: ignore[arg-type]
    await translate().run({"text": "word. " * 1000}, model)
    assert max(len(text.split()) for text in model.texts) == budget


async def test_a_code_block_over_the_budget_is_not_asked_for() -> None:
    code = "```\n" + "x = 1\n" * 30 + "```"
    model = FakeModel("한글")
    answer = await run(model, f"{SENTENCES[0]}\n\n{code}\n\n{SENTENCES[1]}")
    assert answer == f"한글\n\n{code}\n\n한글"
    assert model.texts == SENTENCES[:2]


async def test_rolling_shows_each_piece_the_one_before_it_and_its_translation() -> None:
    model = FakeModel(lambda text: f"번역: {text}")
    await run(model, LONG, context="rolling")
    for before, messages in pairwise(model.asked):
        shown = before[-1]["content"]
        assert messages[1:3] == [
            {"role": "user", "content": shown},
            {"role": "assistant", "content": f"번역: {shown}"},
        ]
        assert len(messages) == 4
    assert len(model.asked[0]) == 2


async def test_without_context_every_piece_is_asked_for_at_once() -> None:
    model, entered = FakeModel(echo), asyncio.Barrier(4)

    class Waiting(FakeModel):
        async def __call__(self, messages: list[Message], **body: Any) -> Completion:
            await entered.wait()
            return await model(messages, **body)

    text = "\n\n".join(" ".join(SENTENCES[i : i + 2]) for i in range(0, 8, 2))
    assert await asyncio.wait_for(run(Waiting(), text), timeout=20) == text


BAD = " ".join(SENTENCES[2:4])


@pytest.mark.parametrize("trouble", [("cut off", "length"), ("", "stop"), (None, "stop")])
@pytest.mark.parametrize("context", ["none", "rolling"])
async def test_one_bad_piece_is_halved_and_the_others_are_asked_for_once(
    trouble: tuple[str | None, str], context: str
) -> None:
    model = FakeModel(lambda text: trouble if text == BAD else text)
    text = "\n\n".join(" ".join(SENTENCES[i : i + 2]) for i in range(0, 8, 2))
    assert await run(model, text, context=context) == text
    assert sorted(model.texts) == sorted([*text.split("\n\n"), *SENTENCES[2:4]])


async def test_a_short_text_that_is_cut_off_is_halved_too() -> None:
    model = FakeModel(lambda text: ("cut", "length") if len(text.split()) > 6 else text)
    assert await run(model, BAD) == BAD


async def test_row_is_ok_only_if_all_its_pieces_are() -> None:
    model = FakeModel(lambda text: ("cut", "length") if "number 7 " in text else text)
    with pytest.raises(RowRejected, match=r"^truncated: "):
        await run(model, LONG)
    assert sum("number 7 " in text for text in model.texts) == 2


@pytest.mark.parametrize("context", ["none", "rolling"])
async def test_the_first_piece_that_fails_gives_the_reason(context: str) -> None:
    def answer(text: str) -> str | tuple[str, str]:
        if "number 30 " in text:
            raise RowFailed("engine_error: second")
        if "number 7 " in text:
            raise RowFailed("engine_error: first")
        return text

    with pytest.raises(RowFailed, match="first"):
        await run(FakeModel(answer), LONG, context=context)


# --- overflow --------------------------------------------------------------------------------


async def test_truncate_tail_asks_for_the_head_alone_and_truncate_head_for_the_tail() -> None:
    head, tail = FakeModel(echo), FakeModel(echo)
    assert LONG.strip().startswith(await run(head, LONG, overflow="truncate_tail"))
    assert LONG.strip().endswith(await run(tail, LONG, overflow="truncate_head"))
    for model in (head, tail):
        assert len(model.texts) == 1
        assert 0 < len(model.texts[0].split()) <= 16


async def test_reject_never_cuts() -> None:
    model = FakeModel(lambda text: ("cut", "length"))
    with pytest.raises(RowRejected, match=r"^too_long: 240 tokens, the limit is 16$"):
        await run(model, LONG, overflow="reject")
    assert model.texts == []
    with pytest.raises(RowRejected, match=r"^truncated: "):
        await run(model, LONG, overflow="reject", chunk_tokens=None)
    assert model.texts == [LONG]


@pytest.mark.parametrize("overflow", ["truncate_head", "truncate_tail", "reject"])
async def test_a_text_within_the_budget_is_asked_for_as_it_is(overflow: str) -> None:
    model, text = FakeModel(), f"  {BAD}  \n"
    assert await run(model, text, overflow=overflow) == "안녕"
    assert model.texts == [text]


@pytest.mark.parametrize("overflow", ["chunk", "truncate_head", "truncate_tail"])
async def test_a_context_too_small_for_anything_is_left_to_the_engine(overflow: str) -> None:
    model = FakeModel(echo, max_model_len=10)
    assert (await run(model, LONG, overflow=overflow)).strip() in LONG
    assert 0 < max(len(text.split()) for text in model.texts) <= 16
