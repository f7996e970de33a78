"""Translate, with a fake model of a few lines: the prompt, and what becomes of odd rows."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import load_task
from jobs.translate import LANGUAGES, Translate
from pipeline.checks import finished_text, text_of
from pipeline.config import JobConfig, identity_fields, identity_hash
from pipeline.errors import JobFileError, RowRejected
from pipeline.records import Completion, Message, Output, Usage

KEYS = {"kind": "translate", "text": "text", "source": "en", "target": "ko"}


class FakeModel:
    """Answers always the same, and remembers what it was asked."""

    def __init__(self, answer: str | None = "안녕", finish_reason: str = "stop") -> None:
        self.answer, self.finish_reason = answer, finish_reason
        self.asked: list[list[Message]] = []

    async def __call__(self, messages: list[Message], **body: Any) -> Completion:
        self.asked.append(messages)
        message = {"role": "assistant", "content": self.answer}
        return Completion(message, self.finish_reason, Usage(1, 9, 0, 7))


def translate(**keys: str) -> Translate:
    return Translate.model_validate(KEYS | keys)


def identity(job: JobConfig) -> str:
    return identity_hash(identity_fields(job, load_task(job).identity()))


async def test_row_is_asked_for_once_with_its_text_as_the_user_turn() -> None:
    model = FakeModel()
    assert await translate().run({"text": "Hello\n <b>you</b> "}, model) == Output("안녕")
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
    ],
)
async def test_answer_that_is_none_is_rejected(
    answer: str | None, finish_reason: str, code: str
) -> None:
    with pytest.raises(RowRejected) as raised:
        await translate().run({"text": "Hello"}, FakeModel(answer, finish_reason))
    assert raised.value.reason.partition(":")[0] == code


@pytest.mark.parametrize("error", [RowRejected("too_long: 9 of 8"), RuntimeError("bug")])
async def test_trouble_of_the_engine_passes_through(error: Exception) -> None:
    async def generate(messages: list[Message], **body: Any) -> Completion:
        raise error

    with pytest.raises(type(error)) as raised:
        await translate().run({"text": "Hello"}, generate)
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
    ],
)
def test_all_keys_of_the_task_are_in_the_identity(
    tmp_path: Any, job: Callable[..., JobConfig], change: dict[str, str]
) -> None:
    assert identity(job(tmp_path, task=KEYS | change)) != identity(job(tmp_path, task=KEYS))


def test_identity_holds_the_prompt_that_code_makes() -> None:
    assert translate().identity()["system_prompt"] == translate().system_prompt


def test_default_keys_may_be_left_out_without_changing_the_identity(
    tmp_path: Any, job: Callable[..., JobConfig]
) -> None:
    given_ = identity(job(tmp_path, task={**KEYS, "instructions": ""}))
    assert given_ == identity(job(tmp_path, task=KEYS))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target": "en"}, "same language"),
        ({"target": "Korean!"}, "task.target"),
        ({"text": 7}, "task.text"),
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
