"""What of a chat job's tools and formats decides its output, and what YAML makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest

from pipeline.config import JobConfig
from pipeline.identity import identity_fields, identity_hash
from tests.test_chat import FUNCTIONS, TOOL, chat

SHORTEN = {"type": "function", "function": {"name": "cut", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "change",
    [
        {"messages": "other"},
        {"system": "S"},
        {"tools": [TOOL]},
        {"tools_column": "t"},
        {"functions": FUNCTIONS},
        {"max_rounds": 5},
        {"seed": 1},
        {"returns": "response"},
    ],
)
def test_all_keys_are_in_the_identity(
    tmp_path: Any, job: Callable[..., JobConfig], change: dict[str, Any]
) -> None:
    def identity(**keys: Any) -> str:
        fields = identity_fields(job(tmp_path), chat(**{"messages": "talk", **keys}).identity())
        return identity_hash(fields)

    assert identity(**change) != identity() == identity(tools=None, max_rounds=4)


def test_the_order_of_properties_is_in_the_identity(
    tmp_path: Any, job: Callable[..., JobConfig]
) -> None:
    """The model fills them in, and is told of them, as they stand there."""

    def identity(*names: str) -> set[str]:
        schema = {"type": "object", "properties": {name: {} for name in names}}
        function = {"name": "f", "parameters": schema}
        keys: list[dict[str, Any]] = [
            {"tools": [{"type": "function", "function": function}]},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        ]
        return {
            identity_hash(identity_fields(job(tmp_path), chat(messages="talk", **given).identity()))
            for given in keys
        }

    assert len(identity("a", "b") | identity("b", "a") | identity("a") | identity()) == 8


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "enum": [True, False, "auto"]}, "words such as yes"),
        ({"type": "string", "const": False}, "words such as yes"),
        ({"properties": {False: {"type": "string"}}}, "words such as yes"),
        ({"examples": [date(2025, 7, 15)]}, "put dates in quotes"),
    ],
)
def test_what_yaml_makes_of_words_and_dates_is_refused(schema: dict[str, Any], says: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for keys in ({"tools": [tool]}, {"response_format": {"json_schema": {"schema": schema}}}):
        with pytest.raises(ValueError, match=says):
            chat(messages="talk", **keys)


def test_the_identity_holds_what_the_model_is_told_of_functions() -> None:
    def told(**keys: Any) -> Any:
        [tool] = json.loads(chat(**keys).identity()["tools"])
        return tool

    assert told(functions={"cut": "textwrap:shorten"}, tools=[SHORTEN]) == SHORTEN
    tool = told(functions={"cut": "textwrap:dedent"})
    assert tool["function"]["description"].startswith("Remove any common leading whitespace")
