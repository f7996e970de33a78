"""JSON Schemas as Arrow types, and the answers that follow them."""

import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel, field_validator

from pipeline.errors import RowRejected
from pipeline.schemas import AnswerSchema, Schema, load_model


def an_object(**properties: Any) -> Schema:
    return {"type": "object", "properties": properties}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def type_of(schema: Any) -> pa.DataType:
    """Of a property with this schema."""
    return AnswerSchema(an_object(a=schema)).type.field("a").type


@pytest.mark.parametrize(
    ("schema", "arrow"),
    [
        (STRING, pa.string()),
        ({"type": "string", "format": "date"}, pa.string()),
        (INTEGER, pa.int64()),
        (NUMBER, pa.float64()),
        ({"type": "boolean"}, pa.bool_()),
        ({"enum": ["a", "b"]}, pa.string()),
        ({"enum": ["a", None]}, pa.string()),
        ({"enum": [1, 2]}, pa.int64()),
        ({"const": "a"}, pa.string()),
        ({"type": "number", "enum": [1, 2.5]}, pa.float64()),
        ({"type": ["integer", "null"]}, pa.int64()),
        ({"anyOf": [NUMBER, {"type": "null"}]}, pa.float64()),
        ({"oneOf": [{"const": None}, STRING]}, pa.string()),
        ({"anyOf": [{"const": "a"}, {"type": "string", "pattern": "^b"}]}, pa.string()),
        ({"type": "string", "anyOf": [{"minLength": 2}, {"const": ""}]}, pa.string()),
        ({"type": "array", "items": INTEGER}, pa.list_(pa.int64())),
        (
            {"type": "array", "items": an_object(b=STRING)},
            pa.list_(pa.struct([("b", pa.string())])),
        ),
        ({"properties": {"b": STRING}}, pa.struct([("b", pa.string())])),
        ({"allOf": [STRING], "description": "x"}, pa.string()),
    ],
)
def test_schema_becomes_the_arrow_type(schema: Any, arrow: pa.DataType) -> None:
    assert type_of(schema) == arrow


@pytest.mark.parametrize("room", ["$defs", "definitions"])
def test_references_are_followed(room: str) -> None:
    schema = an_object(a={"$ref": f"#/{room}/x~1y"}, b={"allOf": [{"$ref": f"#/{room}/x~1y"}]})
    schema[room] = {"x/y": {"$ref": f"#/{room}/z"}, "z": an_object(c=INTEGER)}
    inner = pa.struct([("c", pa.int64())])
    assert AnswerSchema(schema).type == pa.struct([("a", inner), ("b", inner)])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (True, r"\$\.a: takes any value; give it a `type`"),
        ({}, r"\$\.a: has no type"),
        ({"type": "null"}, r"\$\.a: has no type"),
        ({"type": ["string", "integer"]}, r"\$\.a: may be of several types \(integer, string\)"),
        ({"enum": ["a", 1]}, r"\$\.a: may be of several types"),
        ({"anyOf": [STRING, NUMBER]}, r"\$\.a: may be of several types; choose one"),
        ({"oneOf": [an_object(b=STRING), an_object(c=STRING)]}, r"\$\.a: may be of several types"),
        ({"type": "object"}, r"\$\.a: its properties have no names; list them in `properties`"),
        ({"type": "object", "additionalProperties": STRING}, r"\$\.a: its properties have"),
        ({"type": "object", "properties": {}}, r"\$\.a: its properties have no names"),
        ({**an_object(b=STRING), "additionalProperties": True}, r"\$\.a: may have"),
        ({**an_object(b=STRING), "required": ["c"]}, r"\$\.a: requires `c`"),
        ({"type": "array"}, r"\$\.a: its items have no one type"),
        ({"type": "array", "prefixItems": [STRING], "items": STRING}, r"\$\.a: its items have no"),
        ({"type": "array", "items": an_object(b={})}, r"\$\.a\[\]\.b: has no type"),
        ({"type": "string", "enum": [True, False]}, r"\$\.a: has values that are no string; YAML"),
        ({"allOf": [STRING, {"minLength": 2}]}, r"\$\.a: `allOf` may hold one schema"),
        ({"$ref": "#/$defs/nowhere"}, r"\$\.a: no such `\$ref`: #/\$defs/nowhere"),
        ({"$ref": "https://x.example/a.json"}, r"\$\.a: no such `\$ref`"),
        ({"$ref": "#"}, r"\$\.a\.a: holds itself \(#\); write out"),
        ({"$ref": "#/properties/a"}, r"\$\.a: holds itself"),
        ({"type": "strin"}, "is no JSON Schema: at properties.a.type: 'strin'"),
        ({"enum": [object()]}, "is no JSON "),
        ({"enum": [float("nan")]}, "is no JSON "),
        ({"properties": {True: STRING}}, "has a key that is no text"),
    ],
)  # fmt: skip
def test_what_has_no_type_is_refused_with_its_place(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        type_of(schema)


NO_WHOLE = [
    STRING,
    {},
    {"$ref": "#"},
    {**an_object(a=STRING), "type": ["object", "null"]},
]


@pytest.mark.parametrize("schema", NO_WHOLE)
def test_the_whole_is_an_object_or_an_array(schema: Schema) -> None:
    with pytest.raises(ValueError, match=r"^\$: "):
        AnswerSchema(schema)
    assert AnswerSchema({"type": "array", "items": STRING}).type == pa.list_(pa.string())


def test_an_object_is_known_by_its_properties() -> None:
    """JSON Schema would take a text in its place."""
    answers = AnswerSchema(an_object(address={"properties": {"city": STRING}}))
    assert answers.read('{"address": {"city": "서울"}}') == {"address": {"city": "서울"}}
    with pytest.raises(RowRejected, match="schema_mismatch"):
        answers.read('{"address": "서울"}')


@pytest.mark.parametrize("several", ["anyOf", "oneOf"])
def test_what_narrows_an_object_does_not_close_it(several: str) -> None:
    branches = [
        {"properties": {"kind": {"const": "a"}}},
        {"properties": {"kind": {"const": "b"}}, "required": ["x"]},
    ]
    schema = an_object(kind={"enum": ["a", "b"]}, x=STRING) | {several: branches, "required": []}
    answers = AnswerSchema(schema)
    assert answers.read('{"kind": "b", "x": "q"}') == {"kind": "b", "x": "q"}
    for wrong in ('{"kind": "b"}', '{"kind": "a", "y": 1}'):
        with pytest.raises(RowRejected, match="schema_mismatch"):
            answers.read(wrong)


def test_objects_are_closed_wherever_they_do_not_say() -> None:
    item = an_object(properties=STRING)
    given_ = {**an_object(a={"type": "array", "items": item}), "$defs": {"d": item}}
    before = json.dumps(given_)
    closed = {**item, "additionalProperties": False}
    assert AnswerSchema(given_).schema == {
        **an_object(a={"type": "array", "items": closed}),
        "$defs": {"d": closed},
        "additionalProperties": False,
    }
    assert json.dumps(given_) == before


# --- answers ---------------------------------------------------------------------------------

NAMES = st.text(min_size=1, max_size=4).filter(lambda name: name.isprintable())


def schemas() -> st.SearchStrategy[Schema]:
    scalars = st.sampled_from([
        STRING, INTEGER, NUMBER, {"type": "boolean"}, {"enum": ["a", "나", None]},
        {"type": ["string", "null"]}, {"anyOf": [INTEGER, {"type": "null"}]},
    ])  # fmt: skip

    def around(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
        arrays = inner.map(lambda items: {"type": "array", "items": items})
        objects = st.dictionaries(NAMES, inner, min_size=1, max_size=4).flatmap(
            lambda properties: st.sets(st.sampled_from(sorted(properties))).map(
                lambda required: {**an_object(**properties), "required": sorted(required)}
            )
        )
        return arrays | objects

    return around(st.recursive(scalars, around, max_leaves=6))


def values(schema: Schema) -> st.SearchStrategy[Any]:
    """Data that follow the schema."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([values(each) for each in schema["anyOf"]])
    if isinstance(schema["type"], list):
        return st.one_of([values({"type": each}) for each in schema["type"]])
    match schema["type"]:
        case "object":
            properties = {name: values(inner) for name, inner in schema["properties"].items()}
            required = {name: properties.pop(name) for name in schema["required"]}
            return st.fixed_dictionaries(required, optional=properties)
        case "array":
            return st.lists(values(schema["items"]), max_size=3)
        case "integer":
            whole = st.integers(-(2**63), 2**63 - 1)
            return whole | st.integers(-(2**53), 2**53).map(float)
        case "number":
            return st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
    return st.text()


def with_nulls(value: Any, schema: Schema) -> Any:
    """What a reader of the column sees."""
    if isinstance(value, dict):
        inner = schema["properties"]
        return {name: with_nulls(value.get(name), inner[name]) for name in inner}
    if isinstance(value, list):
        return [with_nulls(item, schema["items"]) for item in value]
    return value


@given(st.data())
def test_a_valid_answer_reads_back_equal(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    value = data.draw(values(schema))
    answers = AnswerSchema(schema)
    read = answers.read(json.dumps(value, ensure_ascii=data.draw(st.booleans())))
    [back] = pa.array([read], answers.type).to_pylist()
    assert back == with_nulls(value, schema)
    assert AnswerSchema(answers.schema).schema == answers.schema


def reason(answer: str, schema: Any, model: type[BaseModel] | None = None) -> str:
    with pytest.raises(RowRejected) as raised:
        AnswerSchema(schema, model).read(answer)
    return raised.value.reason


ORDER = {
    **an_object(
        items={"type": "array", "items": {**an_object(price=INTEGER), "required": ["price"]}},
        paid={"enum": ["card", "cash"]},
        share=NUMBER,
    ),
    "required": ["items"],
}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"items": [{"price": 1}, {"price": "SECRET"}]}', "schema_mismatch: $.items[1].price"),
        ('{"items": [{}]}', "schema_mismatch: $.items[0].price: required"),
        ('{"items": [{"price": 1.5}]}', "schema_mismatch: $.items[0].price: type"),
        ('{"items": [{"price": true}]}', "schema_mismatch: $.items[0].price: type"),
        ('{"items": [], "paid": "SECRET"}', "schema_mismatch: $.paid: enum"),
        ('{"items": [], "SECRET": 1}', "schema_mismatch: $: additionalProperties"),
        ('{"items": [{"price": 9223372036854775808}]}',
         "schema_mismatch: $.items[0].price: more than 64 bits"),
        ('{"items": [], "share": 1' + "0" * 400 + "}", "schema_mismatch: $.share: more"),
        ("[]", "schema_mismatch: $: type"),
        ("", "invalid_json: Expecting value, character 1"),
        ("SECRET", "invalid_json: Expecting value, character 1"),
        ('{"items": []} SECRET', "invalid_json: Extra data, character 15"),
        ('{"items": [], "items": []}', "invalid_json: an object has two properties of one name"),
        ('{"items": [], "share": NaN}', "invalid_json: a number is not finite"),
        ('{"items": [], "share": -Infinity}', "invalid_json: a number is not finite"),
        ('{"items": [], "share": 1e999}', "invalid_json: a number is not finite"),
        ('{"items": [], "paid": "\\ud800"}', "invalid_json: half a surrogate pair"),
        ('{"items": ' + "[" * 100_000, "invalid_json: maximum recursion depth exceeded"),
        ('{"items": [{"price": ' + "1" * 5000, "invalid_json: Exceeds the limit"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_told_by_place_and_rule_without_its_words(answer: str, said: str) -> None:
    told = reason(answer, ORDER)
    assert told.startswith(said)
    assert "SECRET" not in told


def test_whole_numbers_may_be_written_as_decimals() -> None:
    read = AnswerSchema(ORDER).read('{"items": [{"price": 3.0}], "share": 2}')
    assert read == {"items": [{"price": 3}], "paid": None, "share": 2.0}
    assert [type(read["items"][0]["price"]), type(read["share"])] == [int, float]


def test_decimals_are_multiples_of_decimals() -> None:
    of_cents = {"type": "object", "properties": {"price": {"type": "number", "multipleOf": 0.01}}}
    schema = AnswerSchema(of_cents)
    for price in (19.99, 0.07, 0.29, 4.35, 12, 1e300):
        assert schema.read(json.dumps({"price": price})) == {"price": price}
    with pytest.raises(RowRejected, match=r"^schema_mismatch: \$\.price: multipleOf"):
        schema.read('{"price": 0.015}')


def test_an_answer_may_stand_in_a_code_block() -> None:
    for answer in ('```json\n{"items": []}\n```', ' ```\n{"items": []}```\n'):
        assert AnswerSchema(ORDER).read(answer)["items"] == []
    assert reason('Here: ```json\n{"items": []}\n```', ORDER).startswith("invalid_json")


# --- pydantic --------------------------------------------------------------------------------


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Item(BaseModel):
    name: str
    color: Color | None = None
    size: Literal["s", "m"] = "m"


class Order(BaseModel):
    items: list[Item]
    first: Item = Field(description="the first of them")
    won: float | None

    @field_validator("won")
    @classmethod
    def _pays_something(cls, won: float | None) -> float | None:
        if won == 0:
            raise ValueError("SECRET")
        return won


class Tree(BaseModel):
    children: list["Tree"]


class Free(BaseModel):
    notes: dict[str, int]


class Unwritable(BaseModel):
    call: Callable[[], int]


Orders = RootModel[list[Order]]


def test_a_pydantic_class_is_its_schema_and_its_validators() -> None:
    answers = AnswerSchema.of(f"{__name__}:Order")
    item = pa.struct([("name", pa.string()), ("color", pa.string()), ("size", pa.string())])
    fields = [("items", pa.list_(item)), ("first", item), ("won", pa.float64())]
    assert answers.type == pa.struct(fields)
    right = {"items": [], "first": {"name": "tent"}, "won": None}
    expected = {**right, "first": {"name": "tent", "color": None, "size": None}}
    assert answers.read(json.dumps(right)) == expected
    with pytest.raises(RowRejected, match=r"^schema_mismatch: \$\.won: value_error$"):
        answers.read(json.dumps({**right, "won": 0}))
    assert AnswerSchema.of(f"{__name__}:Orders").type == pa.list_(pa.struct(fields))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Order", "`Order` is not of the form module:name"),
        (":Order", "`:Order` is not of the form module:name"),
        ("no_such_module:Order", "`no_such_module:Order` can't be imported, .*ModuleNotFoundError"),
        (f"{__name__}:Nothing", f"`{__name__}:Nothing`: {__name__} has no `Nothing`"),
        ("json:JSONDecoder", "`json:JSONDecoder` is no pydantic class"),
        ("json:loads", "`json:loads` is no pydantic class"),
        (f"{__name__}:Tree", r"\$\.children\[\]: holds itself \(#/\$defs/Tree\)"),
        (f"{__name__}:Free", r"\$\.notes: its properties have no names"),
        (f"{__name__}:Unwritable", f"{__name__}:Unwritable has no JSON Schema: "),
    ],
)
def test_a_class_that_will_not_do_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        AnswerSchema.of(path)


def test_modules_are_sought_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("orders_of_mine.py").write_text(
        "from pydantic import BaseModel\nclass Mine(BaseModel):\n    a: int\n"
    )
    assert load_model("orders_of_mine:Mine").__name__ == "Mine"
    Path("broken_of_mine.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"can't be imported, .*: ZeroDivisionError"):
        load_model("broken_of_mine:Mine")
