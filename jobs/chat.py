"""chat: conversations or whole chat bodies, each answered; tools may be called on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from pipeline.config.section import check_json
from pipeline.conversations import (
    MESSAGE_TYPE,
    MESSAGES_TYPE,
    check_body,
    check_messages,
    check_tools,
    finished_message,
    value_of,
)
from pipeline.errors import RowRejected
from pipeline.records import Completion, Message, Output, Row
from pipeline.schemas import check_values
from pipeline.task import Generate, Task
from pipeline.tools import Toolbox, converse, import_function, name_of

REQUEST_KEYS = ("tool_choice", "parallel_tool_calls", "response_format", "n", "stop", "seed",
                "logprobs", "top_logprobs")  # fmt: skip
"""Keys of the task that are keys of each request."""


class Chat(Task):
    """Answer each conversation of the column `messages`, or each request of the column `body`."""

    kind: Literal["chat"]

    wants_raw_rows: ClassVar[bool] = True

    messages: str | None = None
    """Input column of conversations: OpenAI's messages, as a list of structs or as JSON text."""

    body: str | None = None
    """Input column of whole chat bodies, as structs or as JSON text. They are sent as they are,
    `model` excepted; neither `sampling` nor keys of the task are added."""

    returns: Literal["message", "messages", "response"] = "message"
    """message: the answer, a struct. messages: all that the model and the tools said. response:
    the API's `chat.completion` as JSON text, all choices and logprobs in it; one that was cut off
    is ok."""

    system: str | None = None
    """System turn of conversations that have none."""

    tools: list[dict[str, Any]] | None = None
    """Tool definitions, as in OpenAI's `tools`."""

    tools_column: str | None = None
    """Input column of tool definitions, a list of structs or JSON text; a row that has some is
    asked with them in place of `tools`."""

    tool_choice: Any = None
    """none, auto, required, or one of the tools, as in OpenAI's `tool_choice`."""

    parallel_tool_calls: bool | None = None
    """Whether one answer may hold several calls."""

    response_format: dict[str, Any] | None = None
    """What the answer must be: `{type: json_schema, json_schema: {name: …, schema: …}}`."""

    n: int | None = Field(None, ge=1)
    """Answers to each conversation; more than one wants a `sampling.temperature` above 0."""

    stop: str | list[str] | None = None
    """Strings that end an answer, in place of `sampling.stop`."""

    seed: int | None = None
    """In place of `sampling.seed`."""

    logprobs: bool | None = None
    """Whether the response tells the log probability of each token."""

    top_logprobs: int | None = Field(None, ge=0)
    """With `logprobs`: of so many of the likeliest tokens in each place."""

    functions: dict[str, str] = Field(default_factory=dict)
    """Python functions that the model may call: tool name -> module:function, plain or async. The
    module is in the current directory or installed, on every machine of a cluster. A row that is
    done again, after a crash say, calls them again."""

    max_rounds: int = Field(4, ge=1)
    """Most times in a row that the model may call functions before it answers."""

    tool_timeout_s: float = Field(30.0, gt=0)
    """Seconds for one call of a function; after that the model is told that it failed."""

    @field_validator("tools")
    @classmethod
    def _tools_are_defined(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        if tools == []:
            raise ValueError("names none; leave it out, or put definitions here")
        check_json(tools)
        check_values(tools)
        for tool in tools or []:
            name_of(tool)
        return tools

    @field_validator("response_format")
    @classmethod
    def _format_is_json(cls, response_format: dict[str, Any] | None) -> dict[str, Any] | None:
        check_json(response_format)
        check_values(response_format)
        return response_format

    @field_validator("functions")
    @classmethod
    def _functions_are_there(cls, functions: dict[str, str]) -> dict[str, str]:
        for name, path in functions.items():
            try:
                import_function(path)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return functions

    @model_validator(mode="after")
    def _keys_go_together(self) -> Chat:
        if (self.messages is None) == (self.body is None):
            raise ValueError("give either `messages` or `body`")
        asked = self.model_dump(exclude_defaults=True).keys()
        if self.body and (own := asked - {"kind", "body", "returns"}):
            raise ValueError(f"`{min(own)}` goes with `messages`; a `body` holds its own")
        if self.returns != "response" and ((self.n or 1) > 1 or self.logprobs):
            key = "logprobs" if self.logprobs else "n"
            raise ValueError(f"`{key}` is only seen in the whole answer: set `returns: response`")
        if self.tool_choice and not (self.tools or self.tools_column or self.functions):
            raise ValueError("`tool_choice` needs `tools`, `tools_column` or `functions`")
        if self.functions and ((self.n or 1) > 1 or self.tool_choice not in (None, "auto")):
            key = "n" if (self.n or 1) > 1 else "tool_choice"
            raise ValueError(f"`{key}` does not go with `functions`: the model must come to one "
                             "answer by itself")  # fmt: skip
        _ = self._toolbox  # what is wrong with a definition shows now
        return self

    @property
    def columns(self) -> list[str]:
        return [c for c in (self.messages, self.body, self.tools_column) if c is not None]

    @property
    def output_type(self) -> pa.DataType:
        types = {"message": MESSAGE_TYPE, "messages": MESSAGES_TYPE, "response": pa.string()}
        return types[self.returns]

    @cached_property
    def _toolbox(self) -> Toolbox:
        return Toolbox(self.functions, self.tools or [], self.tool_timeout_s)

    def identity(self) -> dict[str, Any]:
        # As text, in which things have an order: the model answers by it.
        told = {"tools": self._toolbox.definitions, "response_format": self.response_format}
        as_text = {key: json.dumps(value, ensure_ascii=False) for key, value in told.items()}
        return {**self.model_dump(), **as_text}

    async def run(self, row: Row, generate: Generate) -> Output:
        if self.body is not None:
            body = check_body(value_of(row, self.body), generate.clean)
            self._can_be_returned(body)
            completion = await generate.send(body)
            return Output(self._result([], completion))
        messages = check_messages(value_of(row, self.messages or ""), generate.clean)
        if self.system and all(message["role"] != "system" for message in messages):
            messages = [{"role": "system", "content": self.system}, *messages]
        options = self._options(row, generate)
        if not self.functions:
            return Output(self._result([], await generate(messages, **options)))
        heard, completion = await converse(
            messages,
            partial(generate.__call__, **options),
            self._toolbox,
            self.max_rounds,
            generate.clean,
        )
        return Output(self._result(heard[:-1], completion))

    def _options(self, row: Row, generate: Generate) -> dict[str, Any]:
        """What each request of this row has beside its messages and the job's sampling."""
        options = {key: getattr(self, key) for key in REQUEST_KEYS}
        options["tools"] = self._toolbox.definitions
        if self.tools_column is not None:
            own = row[self.tools_column]
            if own is not None and not (isinstance(own, str) and own.strip() in ("", "null")):
                options["tools"] = check_tools(value_of(row, self.tools_column), generate.clean)
        if not options["tools"]:
            # Engines refuse an empty list, and a choice where there is none.
            free = options["tool_choice"] in ("auto", "none")
            for key in ("tools", "parallel_tool_calls", *(["tool_choice"] if free else [])):
                del options[key]
        return {key: value for key, value in options.items() if value is not None}

    def _can_be_returned(self, body: Mapping[str, Any]) -> None:
        """Raises RowRejected for a body that asks for what `returns` leaves out."""
        if self.returns != "response" and (body.get("n") not in (None, 1) or body.get("logprobs")):
            raise RowRejected("bad_request: n and logprobs want `returns: response`")

    def _result(self, before: list[Message], completion: Completion) -> Any:
        match self.returns:
            case "message":
                return finished_message(completion)
            case "messages":
                return [*before, finished_message(completion)]
            case "response":
                return json.dumps(completion.body, ensure_ascii=False)
