"""Conversations and whole chat bodies from a dataset: decoded, checked, made safe to send.

What comes from JSON has not been through the worker's cleaning (tokens.py): `\\u003c|im_end|>` is
a control token once it is decoded, also as a key, also in the JSON inside a tool call's
`arguments`. So all that is sent goes through `clean` here, once it is decoded.

Reasons: `null`, `invalid_json`, `bad_messages`, `bad_request`. None quotes the row; messages are
counted from 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
from pydantic_core import from_json

from pipeline.checks import check_finished, finished_text
from pipeline.errors import RowFailed, RowRejected
from pipeline.records import Completion, Message, Row
from pipeline.tokens import ZERO_WIDTH_SPACE

ROLES = ("system", "developer", "user", "assistant", "tool")

TEXT_OF_PART = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Where each type of content part that becomes text of a prompt has it, as vLLM does it."""

LONGEST_TOKEN = 200
"""Characters of a control token, at most."""

Clean = Callable[[Any], Any]
"""`Generate.clean`."""

CALL_TYPE = pa.struct([
    ("id", pa.string()),
    ("type", pa.string()),
    ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),  # JSON text
])  # fmt: skip

MESSAGE_TYPE = pa.struct([
    ("role", pa.string()),
    ("content", pa.string()),
    ("reasoning", pa.string()),
    ("refusal", pa.string()),
    ("tool_calls", pa.list_(CALL_TYPE)),
])  # fmt: skip
"""An answer."""

MESSAGES_TYPE = pa.list_(pa.struct([*MESSAGE_TYPE, ("tool_call_id", pa.string())]))
"""What the model and the tools said, in order."""


# --- what a row holds ------------------------------------------------------------------------


def decode_json(text: str) -> Any:
    """Strict JSON. Raises RowRejected (`invalid_json`, with the position)."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise RowRejected(f"invalid_json: {error}") from None


def value_of(row: Row, column: str) -> Any:
    """A column of structs or of JSON text, as lists and dicts. Raises RowRejected (`null`,
    `invalid_json`)."""
    value = row[column]
    if value is None:
        raise RowRejected("null")
    return decode_json(value) if isinstance(value, str) else without_nulls(value)


def without_nulls(value: Any) -> Any:
    """Arrow's structs as JSON would have them: all rows of a column have all keys of all rows,
    so null means that the row has no such key. A map's list of pairs becomes a dict."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        return without_nulls(dict(value))
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


# --- what is sent ----------------------------------------------------------------------------


def check_body(value: Any, clean: Clean) -> dict[str, Any]:
    """A whole chat body for `Generate.send`, as it is but for what makes it safe: see
    `check_messages`. Raises RowRejected (`bad_request`, `bad_messages`)."""
    if not isinstance(value, dict):
        raise RowRejected("bad_request: the body must be an object")
    if value.get("stream"):
        raise RowRejected("bad_request: `stream` does not go with a batch; leave it out")
    body: dict[str, Any] = cleaned(value, clean)
    # What is compared with the answer, and is in no prompt.
    body |= {key: value[key] for key in ("stop", "bad_words") if key in value}
    body["messages"] = check_messages(value.get("messages"), clean)
    if body.get("tools") is not None:
        body["tools"] = check_tools(value["tools"], clean)
    return body


def check_tools(value: Any, clean: Clean) -> list[dict[str, Any]]:
    """Tool definitions, made safe; the engine looks at the rest. Raises RowRejected
    (`bad_request`)."""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowRejected("bad_request: tools must be a list of objects")
    return list(cleaned(value, clean))


def check_messages(value: Any, clean: Clean) -> list[Message]:
    """A conversation in copies that are safe to send: without keys that are null, an assistant's
    missing content beside tool calls is empty (templates may fail on null), `developer` is
    `system` (templates may leave out a role they don't know), calls have an `id` and a `type`,
    and their `arguments` are JSON text.

    Raises RowRejected (`bad_messages`).
    """
    if not isinstance(value, list) or not value:
        raise RowRejected("bad_messages: must be a list of at least one message")
    messages = []
    for number, message in enumerate(value, start=1):
        try:
            messages.append(_checked(cleaned(message, clean), clean))
        except ValueError as error:
            raise RowRejected(f"bad_messages: message {number}: {error}") from None
    return messages


def cleaned(value: Any, clean: Clean) -> Any:
    """A deep copy with all text cleaned, that of keys too."""
    if isinstance(value, Mapping):
        return {clean(key): cleaned(item, clean) for key, item in value.items()}
    if isinstance(value, list):
        return [cleaned(item, clean) for item in value]
    return clean(value)


def _checked(given: Any, clean: Clean) -> Message:
    """Raises ValueError: what is wrong with it."""
    if not isinstance(given, dict):
        raise ValueError("must be an object")
    message: Message = {key: value for key, value in given.items() if value is not None}
    # A template may put the role between two halves of a control token.
    if message.get("role") not in ROLES:
        raise ValueError(f"`role` must be one of {', '.join(ROLES)}")
    if message["role"] == "developer":
        message["role"] = "system"
    if calls := message.pop("tool_calls", None):
        if message["role"] != "assistant" or not isinstance(calls, list):
            raise ValueError("`tool_calls` must be a list, of an assistant's message")
        message = {"content": "", **message}
        message["tool_calls"] = [
            _checked_call(call, f"call-{i}", clean) for i, call in enumerate(calls, start=1)
        ]
    if "content" not in message:
        raise ValueError("has no `content`")
    content = message["content"]
    if not isinstance(content, str) and not _are_parts(content):
        raise ValueError("`content` must be text or a list of parts, each with its `type`")
    if not isinstance(content, str):
        _keep_apart(content, clean)
    return message


def _keep_apart(parts: list[dict[str, Any]], clean: Clean) -> None:
    """Break a control token whose pieces stand in parts that a template may put side by side."""
    before = ""
    for part in parts:
        key = TEXT_OF_PART.get(part["type"], "")
        if not isinstance(part.get(key), str):
            continue
        if clean(before + part[key]) != before + part[key]:
            before, part[key] = "", ZERO_WIDTH_SPACE + part[key]
        before = (before + part[key])[-LONGEST_TOKEN:]


def _are_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and isinstance(part.get("type"), str)
        and (part["type"] != "text" or isinstance(part.get("text"), str))
        for part in content
    )


def _checked_call(call: Any, default_id: str, clean: Clean) -> dict[str, Any]:
    """Many datasets leave out `id` and `type`, on which vLLM insists."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call must have a `function` with a `name`")
    arguments = json.dumps(cleaned(arguments_of(function), clean), ensure_ascii=False)
    return {
        "id": call.get("id") or default_id,
        "type": call.get("type") or "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def arguments_of(function: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a tool call, which APIs have as JSON text and datasets as an object too.
    Raises ValueError."""
    arguments: Any = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments, allow_inf_nan=False)
        except ValueError as error:
            raise ValueError(f"a tool call's `arguments` are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError("a tool call's `arguments` must be an object")
    return arguments


# --- what comes back -------------------------------------------------------------------------


def finished_message(completion: Completion) -> Message:
    """The answer, as MESSAGE_TYPE has it. Raises RowRejected (`empty_answer`) if there is neither
    text nor a tool call, and what `check_finished` does."""
    check_finished(completion)
    if not completion.message.get("tool_calls"):
        finished_text(completion)
    return said(completion.message)


def said(message: Message) -> Message:
    """A message by the keys of MESSAGES_TYPE, nothing shared with `message`. Raises RowFailed if
    it has text that Parquet can't hold."""
    calls = [
        {
            "id": call.get("id"),
            "type": call.get("type", "function"),
            "function": {key: call["function"].get(key) for key in ("name", "arguments")},
        }
        for call in message.get("tool_calls") or []
    ]
    result = {
        "role": message["role"],
        "content": message.get("content"),
        "reasoning": message.get("reasoning") or message.get("reasoning_content"),
        "refusal": message.get("refusal"),
        "tool_calls": calls or None,
        "tool_call_id": message.get("tool_call_id"),
    }
    try:
        json.dumps(result, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # an escaped half of a surrogate pair, in a call's arguments
        raise RowFailed("invalid_utf8") from None
    return {key: value for key, value in result.items() if value is not None}
