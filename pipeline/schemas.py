"""JSON Schemas as Arrow types, and answers that must follow one.

`$.orders[].price` names a place in the data: the `price` of each item of `orders`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import pyarrow as pa
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.validators import extend
from pydantic import BaseModel
from pydantic import ValidationError as ModelError
from pydantic.errors import PydanticUserError

from pipeline.config.section import check_json
from pipeline.errors import RowRejected
from pipeline.imports import import_named

Schema = dict[str, Any]

SCALARS = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
LARGEST = 2**63 - 1
SEVERAL = ("anyOf", "oneOf")


def _multiple_of(validator: Any, of: Any, value: Any, _: Schema) -> Iterator[ValidationError]:
    """As they are written: in binary fractions, 19.99 is no multiple of 0.01."""
    if validator.is_type(value, "number") and _exact(value) % _exact(of):
        yield ValidationError(f"is not a multiple of {of}")


def _exact(number: float) -> Fraction:
    return Fraction(number if isinstance(number, int) else str(number))


ExactValidator: Any = extend(Draft202012Validator, {"multipleOf": _multiple_of})


class AnswerSchema:
    """A JSON Schema (2020-12) whose data fit one Arrow type."""

    def __init__(self, schema: Schema, model: type[BaseModel] | None = None) -> None:
        """`model` is the pydantic class that `schema` is of: its validators count, too.

        Raises ValueError if it is no schema, or one without an Arrow type.
        """
        _check(schema)
        self.schema = _closed(schema)
        """As it was given, but objects have no more properties than it names."""
        self.type = _Types(self.schema).of_root()
        self._model = model

    @classmethod
    def of(cls, given: Schema | str) -> AnswerSchema:
        """Of a schema itself, or of the pydantic class at `module:Class`. Raises ValueError."""
        if not isinstance(given, str):
            return cls(given)
        model = load_model(given)
        try:
            return cls(model.model_json_schema(), model)
        except PydanticUserError as error:
            raise ValueError(f"{given} has no JSON Schema: {error.message}") from None

    def read(self, answer: str) -> Any:
        """The data in an answer, as values of the Arrow type.

        Raises RowRejected, `invalid_json: …` or `schema_mismatch: …`, with places and rules and no
        word of the answer.
        """
        data = _parse(answer)
        if error := best_match(self._validator.iter_errors(data)):
            raise RowRejected(f"schema_mismatch: {_place_and_rule(error)}")
        self._ask_model(data)
        return _as_arrow(data, self.type, "$")

    def _ask_model(self, data: Any) -> None:
        if self._model is None:
            return
        try:
            self._model.model_validate_json(json.dumps(data))
        except ModelError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            path = _path(part for part in first["loc"])
            raise RowRejected(f"schema_mismatch: {path}: {first['type']}") from None

    @cached_property
    def _validator(self) -> Any:
        return ExactValidator(self.schema)


def load_model(path: str) -> type[BaseModel]:
    """The pydantic class at `module:Class`, see `import_named`. Raises ValueError."""
    model = import_named(path)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise ValueError(f"`{path}` is no pydantic class")
    return model


def _check(schema: Schema) -> None:
    """Raises ValueError if it is no JSON Schema."""
    check_json(schema)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = ".".join(map(str, error.absolute_path)) or "the top"
        message = error.context[0].message if error.context else error.message
        raise ValueError(f"is no JSON Schema: at {place}: {message}") from None


def check_values(schema: Any, path: str = "$") -> None:
    """Raises ValueError where a schema, at any depth, lists a value that is not of the type beside
    it: YAML's yes, no, on and off are no words."""
    if isinstance(schema, list):
        for index, inner in enumerate(schema):
            check_values(inner, f"{path}[{index}]")
    if not isinstance(schema, dict):
        return
    listed = schema.get("enum")
    values = [*listed] if isinstance(listed, list) else []
    if isinstance(schema.get("type"), str) and (values or "const" in schema):
        _kind({**schema, "enum": values} if values else schema, path)
    for key, inner in schema.items():
        check_values(inner, f"{path}.{key}")


def _closed(schema: Any, refines: bool = False) -> Any:
    """`schema` with `type: object` and `additionalProperties: false` at each object that does not
    say. `refines`: it stands in a schema that says what the object is, and narrows it."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    is_refined = bool({"type", "properties"} & schema.keys())
    for key in ("properties", "$defs", "definitions"):
        if key in closed:
            closed[key] = {name: _closed(inner, refines) for name, inner in closed[key].items()}
    for key in (*SEVERAL, "allOf"):
        if key in closed:
            closed[key] = [_closed(inner, refines or is_refined) for inner in closed[key]]
    if "items" in closed:
        closed["items"] = _closed(closed["items"], refines)
    if "properties" in closed and not refines:
        closed.setdefault("type", "object")
        closed.setdefault("additionalProperties", False)
    return closed


class _Types:
    """The Arrow types of the parts of one schema. All methods raise ValueError."""

    def __init__(self, root: Schema) -> None:
        self._root = root

    def of_root(self) -> pa.DataType:
        schema = self._resolved(self._root, "$", ())[0]
        if schema.get("type") not in ("object", "array"):
            raise ValueError("$: must have `type: object` or `type: array`")
        return self._of(self._root, "$", ())

    def _of(self, schema: Any, path: str, within: tuple[str, ...]) -> pa.DataType:
        """`within` are the references that led here."""
        if not isinstance(schema, dict):
            raise ValueError(f"{path}: takes any value; give it a `type`")
        schema, within = self._resolved(schema, path, within)
        for key in SEVERAL:
            if key in schema and not {"type", "properties"} & schema.keys():
                return self._of_several(schema[key], path, within)
        kind = _kind(schema, path)
        if kind == "object":
            return self._of_object(schema, path, within)
        if kind == "array":
            if "prefixItems" in schema or "items" not in schema:
                raise ValueError(f"{path}: its items have no one type; give it `items`")
            return pa.list_(self._of(schema["items"], f"{path}[]", within))
        return SCALARS[kind]

    def _of_several(self, some: list[Any], path: str, within: tuple[str, ...]) -> pa.DataType:
        types = [self._of(each, path, within) for each in some if not _is_null(each)]
        if not types or any(other != types[0] for other in types):
            raise ValueError(f"{path}: may be of several types; choose one (or null beside it)")
        return types[0]

    def _of_object(self, schema: Schema, path: str, within: tuple[str, ...]) -> pa.DataType:
        properties = schema.get("properties")
        if not properties or schema.get("patternProperties"):
            raise ValueError(f"{path}: its properties have no names; list them in `properties`")
        if schema.get("additionalProperties", True) is not False:
            raise ValueError(f"{path}: may have properties without names; "
                             "set `additionalProperties: false`")  # fmt: skip
        for name in schema.get("required", ()):
            if name not in properties:
                raise ValueError(f"{path}: requires `{name}`; list it in `properties`")
        fields = [(name, self._of(of, f"{path}.{name}", within)) for name, of in properties.items()]
        return pa.struct(fields)

    def _resolved(
        self, schema: Schema, path: str, within: tuple[str, ...]
    ) -> tuple[Schema, tuple[str, ...]]:
        """What a reference, or an `allOf` of one, stands for."""
        while "$ref" in schema or "allOf" in schema:
            if {"type", "properties", *SEVERAL} & schema.keys():
                raise ValueError(f"{path}: has a `type` beside `$ref` or `allOf`; keep one of them")
            if "allOf" in schema:
                if len(schema["allOf"]) != 1 or "$ref" in schema:
                    raise ValueError(f"{path}: `allOf` may hold one schema; write out the rest")
                schema = schema["allOf"][0]
                continue
            reference = schema["$ref"]
            if reference in within:
                raise ValueError(f"{path}: holds itself ({reference}); write out as deep as needed")
            within = (*within, reference)
            schema = self._target(reference, path)
        return schema, within

    def _target(self, reference: str, path: str) -> Schema:
        target: Any = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            target = target.get(part) if isinstance(target, dict) else None
        if not reference.startswith("#") or not isinstance(target, dict):
            raise ValueError(f"{path}: no such `$ref`: {reference}; it must be `#/$defs/…`")
        return target


def _kind(schema: Schema, path: str) -> str:
    """The one JSON type of a schema, null aside."""
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else []
    held = {_type_name(value) for value in values} - {"null"}
    named = schema.get("type", [*held] or ("object" if "properties" in schema else []))
    kinds = {named} if isinstance(named, str) else {*named}
    kinds -= {"null"}
    if not kinds:
        raise ValueError(f"{path}: has no type; give it a `type`")
    if len(kinds) > 1:
        raise ValueError(
            f"{path}: may be of several types ({', '.join(sorted(kinds))}); choose one"
        )
    [kind] = kinds
    if not held <= {kind} | ({"integer"} if kind == "number" else set()):
        raise ValueError(f"{path}: has values that are no {kind}; YAML wants words such as yes, "
                         "no and dates in quotes")  # fmt: skip
    return str(kind)


def _type_name(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
    return "object" if isinstance(value, dict) else "array"


def _is_null(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    values = schema.get("enum", [schema.get("const", "")])
    return schema.get("type") in ("null", ["null"]) or values == [None]


def _parse(text: str) -> Any:
    """Strict JSON, in a Markdown code block or not."""
    try:
        data = json.loads(
            _without_fence(text),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_finite,
        )
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except json.JSONDecodeError as error:
        raise RowRejected(f"invalid_json: {error.msg}, character {error.pos + 1}") from None
    except UnicodeEncodeError:
        raise RowRejected("invalid_json: half a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise RowRejected(f"invalid_json: {error}") from None
    return data


def _without_fence(text: str) -> str:
    first, _, rest = text.strip().partition("\n")
    if first in ("```json", "```") and rest.endswith("```"):
        return rest.removesuffix("```")
    return text


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("an object has two properties of one name")
    return dict(pairs)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value


def _place_and_rule(error: ValidationError) -> str:
    place, rule = _path(error.absolute_path), str(error.validator)
    if rule == "required":
        missing = [name for name in error.validator_value if name not in error.instance]
        return f"{place}.{missing[0]}: {rule}"
    return f"{place}: {rule}"


def _path(parts: Any) -> str:
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


def _as_arrow(value: Any, to: pa.DataType, path: str) -> Any:
    """Valid data as Arrow takes it: absent properties are null, integers are no floats."""
    if value is None:
        return None
    if pa.types.is_struct(to):
        return {f.name: _as_arrow(value.get(f.name), f.type, f"{path}.{f.name}") for f in to}
    if pa.types.is_list(to):
        return [_as_arrow(item, to.value_type, f"{path}[{i}]") for i, item in enumerate(value)]
    convert = _CONVERSIONS.get(to)
    return convert(value, path) if convert else value


def _int64(value: float, path: str) -> int:
    number = int(value)
    if not -LARGEST - 1 <= number <= LARGEST:
        raise RowRejected(f"schema_mismatch: {path}: more than 64 bits")
    return number


def _float64(value: float, path: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise RowRejected(f"schema_mismatch: {path}: more than 64 bits") from None


_CONVERSIONS: Mapping[pa.DataType, Callable[[float, str], Any]] = {
    pa.int64(): _int64,
    pa.float64(): _float64,
}
