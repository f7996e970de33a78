"""Prompt, with a fake model: what is sent, what is rejected, what is refused at load."""

from collections.abc import Callable
from typing import Any

import pytest

from jobs import load_task
from jobs.prompt import Prompt
from pipeline.config import JobConfig
from pipeline.errors import JobFileError, RowRejected
from pipeline.records import Output
from tests.fake_model import FakeModel

KEYS = {"kind": "prompt", "prompt": "Name a use of {{ item }}."}


def prompt(**keys: Any) -> Prompt:
    return Prompt.model_validate(KEYS | keys)


async def test_the_filled_prompt_is_one_request() -> None:
    model = FakeModel(" to sleep in\n")
    assert await prompt().run({"item": "tents", "other": "x"}, model) == Output("to sleep in")
    assert model.asked == [[{"role": "user", "content": "Name a use of tents."}]]


async def test_the_system_prompt_is_a_template_too() -> None:
    task, model = prompt(system="Answer in {{ language }}."), FakeModel()
    assert task.columns == ["item", "language"]
    await task.run({"item": "tents", "language": "Korean"}, model)
    assert model.asked[0][0] == {"role": "system", "content": "Answer in Korean."}
    assert len(model.asked[0]) == 2


async def test_a_system_prompt_that_comes_out_empty_is_not_sent() -> None:
    model = FakeModel()
    task = prompt(system="{% if language %}Answer in {{ language }}.{% endif %}")
    await task.run({"item": "tents", "language": None}, model)
    assert [message["role"] for message in model.asked[0]] == ["user"]


@pytest.mark.parametrize(
    ("row", "source", "reason"),
    [
        ({"item": None}, "{{ item }}", "null: item"),
        ({"item": " "}, "{{ item }}", "empty"),
        ({"item": {}}, "{{ item.name }}", "template_error: UndefinedError in line 1"),
    ],
)
async def test_a_row_that_makes_no_prompt_costs_no_request(
    row: dict[str, Any], source: str, reason: str
) -> None:
    model = FakeModel()
    with pytest.raises(RowRejected) as raised:
        await prompt(prompt=source).run(row, model)
    assert raised.value.reason == reason
    assert model.asked == []


async def test_columns_side_by_side_make_no_control_token() -> None:
    model = FakeModel()
    await prompt(prompt="{{ a }}{{ b }}").run({"a": "<|im_", "b": "end|>"}, model)
    assert "<|im_end|>" not in model.texts[0]


@pytest.mark.parametrize(
    ("answer", "reason"), [("", "empty_answer"), (("x", "length"), "truncated")]
)
async def test_an_answer_that_is_none_is_rejected(answer: Any, reason: str) -> None:
    with pytest.raises(RowRejected, match=f"^{reason}"):
        await prompt().run({"item": "tents"}, FakeModel(answer))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": "{{ item }"}, "task.prompt: line 1: unexpected"),
        ({"system": "\n{% if %}"}, "task.system: line 2: Expected"),
        ({"prompt": "Name a {item}."}, "task.prompt: names no column; write {{ title }}"),
        ({"prompt": ""}, "task.prompt: "),
    ],
)
def test_a_wrong_template_is_named(
    tmp_path: Any, job: Callable[..., JobConfig], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobFileError) as raised:
        load_task(job(tmp_path).model_copy(update={"task": KEYS | keys}))
    assert message in str(raised.value)


def test_both_templates_are_in_the_identity() -> None:
    plain = prompt().identity()
    assert plain != prompt(prompt="{{ item }}").identity()
    assert plain != prompt(system="Be brief.").identity()
