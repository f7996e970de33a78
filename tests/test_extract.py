"""Extract, with a fake model: the request, typed results, wrong answers, odd rows, identity."""

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from pydantic import BaseModel

from infra.demo_model import extraction
from jobs import load_task
from jobs.extract import PROMPT, Extract
from pipeline.config import JobConfig
from pipeline.errors import JobFileError, RowRejected
from pipeline.identity import identity_fields, identity_hash
from pipeline.records import Output
from pipeline.worker import _encodable
from tests.fake_model import FakeModel

SCHEMA = {
    "type": "object",
    "properties": {"item": {"type": "string"}, "quantity": {"type": "integer"}},
    "required": ["item"],
    "additionalProperties": False,
}
KEYS = {"kind": "extract", "text": "text", "schema": SCHEMA}
ROW = {"text": "3 tents, please."}


class Order(BaseModel):
    item: str
    quantity: int | None = None


def extract(**keys: Any) -> Extract:
    return Extract.model_validate(KEYS | keys)


def identity(job: JobConfig) -> str:
    return identity_hash(identity_fields(job, load_task(job).identity()))


async def test_one_request_with_the_schema_in_the_prompt_and_for_the_engine() -> None:
    model = FakeModel('{"item": "tent", "quantity": 3}')
    assert await extract().run(ROW, model) == Output({"item": "tent", "quantity": 3})
    assert model.asked == [[
        {"role": "system", "content": extraction.system_prompt(SCHEMA)},
        {"role": "user", "content": "3 tents, please."},
    ]]  # fmt: skip
    form = {"name": "answer", "schema": SCHEMA, "strict": True}
    assert model.bodies == [{"response_format": {"type": "json_schema", "json_schema": form}}]


def test_the_prompt_is_the_one_that_the_demo_model_knows() -> None:
    assert PROMPT == extraction.PROMPT


async def test_servers_without_structured_outputs_are_asked_without() -> None:
    model = FakeModel('```json\n{"item": "tent"}\n```')
    output = await extract(structured=False).run(ROW, model)
    assert output == Output({"item": "tent", "quantity": None})
    assert model.bodies == [{}]


def test_an_open_schema_is_closed_in_prompt_and_result() -> None:
    task = extract(schema={key: SCHEMA[key] for key in ("type", "properties", "required")})
    assert task.system_prompt == extract().system_prompt
    assert task.output_type == pa.struct([("item", pa.string()), ("quantity", pa.int64())])


def test_instructions_stand_on_a_line_of_their_own() -> None:
    told = extract(instructions="Items in the singular.")
    assert told.system_prompt == f"{extract().system_prompt}\nItems in the singular."


async def test_a_wrong_answer_is_asked_for_once_more_by_place_and_rule() -> None:
    answers = iter(['{"item": "tent", "quantity": "drei"}', '{"item": "tent", "quantity": 3}'])
    model = FakeModel(lambda text: next(answers))
    assert (await extract().run(ROW, model)).value == {"item": "tent", "quantity": 3}
    first, second = model.asked
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": '{"item": "tent", "quantity": "drei"}'}
    assert "schema_mismatch: $.quantity: type" in second[3]["content"]
    assert "drei" not in second[3]["content"]
    assert model.bodies[0] == model.bodies[1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Three tents.", "invalid_json: Expecting value, character 1"),
        ('{"quantity": 3}', "schema_mismatch: $.item: required"),
        ('{"item": "tent", "color": "red"}', "schema_mismatch: $: additionalProperties"),
    ],
)
async def test_an_answer_that_is_wrong_twice_rejects_the_row(answer: str, reason: str) -> None:
    model = FakeModel(answer)
    with pytest.raises(RowRejected) as raised:
        await extract().run(ROW, model)
    assert raised.value.reason == reason
    assert len(model.asked) == 2


async def test_an_answer_that_was_cut_off_is_not_asked_for_again() -> None:
    model = FakeModel(('{"item": "te', "length"))
    with pytest.raises(RowRejected, match=r"^truncated: "):
        await extract().run(ROW, model)
    assert len(model.asked) == 1


@pytest.mark.parametrize(("text", "reason"), [(None, "null"), (" ", "empty"), (3, "not_text: ")])
async def test_a_row_without_text_costs_no_request(text: object, reason: str) -> None:
    model = FakeModel()
    with pytest.raises(RowRejected, match=f"^{reason}"):
        await extract().run({"text": text}, model)
    assert model.asked == []


async def test_a_text_may_have_what_max_tokens_leaves_of_the_context() -> None:
    model = FakeModel('{"item": "tent"}', max_tokens=100, max_model_len=1000)
    await extract().run({"text": "word " * 700}, model)
    with pytest.raises(RowRejected, match=r"^too_long: "):
        await extract().run({"text": "word " * 900}, model)
    assert len(model.asked) == 1
    text = " ".join(map(str, range(900)))
    await extract(overflow="truncate_tail").run({"text": text}, model)
    assert text.startswith(model.texts[1])


@pytest.mark.parametrize(
    "change",
    [
        {"instructions": "Be exact."},
        {"structured": False},
        {"overflow": "truncate_tail"},
        {"schema": {**SCHEMA, "required": []}},
        {"schema": {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}},
    ],
)
def test_all_that_decides_the_answer_is_in_the_identity(
    tmp_path: Any, job: Callable[..., JobConfig], change: dict[str, Any]
) -> None:
    def of(keys: dict[str, Any]) -> str:
        made = job(tmp_path)
        return identity(made.model_copy(update={"task": keys}))

    assert of(KEYS | change) != of(KEYS)


def test_a_class_counts_by_its_schema_and_not_by_its_path() -> None:
    by_path = extract(schema=f"{__name__}:Order")
    by_schema = extract(schema=Order.model_json_schema())
    assert by_path.identity() == by_schema.identity()
    assert json.dumps(by_path.answers.schema) in by_path.system_prompt
    assert by_path.output_type == pa.struct([("item", pa.string()), ("quantity", pa.int64())])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 3}, "task.schema: must be a JSON Schema, or `module:Class`"),
        ({"schema": {"type": "object"}}, r"task.schema: \$: its properties have no names"),
        ({"schema": "nowhere:Order"}, "task.schema: `nowhere:Order` can't be imported"),
        ({"overflow": "chunk"}, "task.overflow: "),
    ],
)
def test_a_wrong_key_is_named(
    tmp_path: Any, job: Callable[..., JobConfig], change: dict[str, Any], message: str
) -> None:
    made = job(tmp_path).model_copy(update={"task": KEYS | change})
    with pytest.raises(JobFileError, match=message):
        load_task(made)


@pytest.mark.parametrize(
    "value", ["\ud800", {"a": "\ud800"}, {"\ud800": 1}, [{"a": ["x", "\ud800"]}]]
)
def test_what_parquet_cannot_hold_is_found_at_any_depth(value: Any) -> None:
    right = Output({"a": ["x", None, 1.5, {"나": True}]})
    lost = Output(None, "rejected", f"markup_lost: invented {value}")
    unfit = Output(None, "failed", "invalid_utf8")
    assert _encodable([right, Output(value)]) == [right, unfit]
    if isinstance(value, str):
        assert _encodable([lost]) == [unfit]
