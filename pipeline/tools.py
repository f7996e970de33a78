"""Tools that a model may call: Python functions, run with its arguments until it answers.

Whatever goes wrong in a tool goes back to the model as `{"error": …}`: it may try again, or tell
the user. Results are data, as row text is: control tokens in them are neutralised.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

import jsonschema
from pydantic import PydanticUserError, TypeAdapter, validate_call
from pydantic.errors import PydanticUndefinedAnnotation
from pydantic_core import to_jsonable_python
from referencing import Registry

from pipeline.checks import UNFINISHED
from pipeline.conversations import Clean, arguments_of, check_messages, cleaned, said
from pipeline.errors import RowFailed, RowRejected
from pipeline.imports import import_named
from pipeline.records import Completion, Message
from pipeline.schemas import ExactValidator

Ask = Callable[[list[Message]], Awaitable[Completion]]

CALLS = 64
"""Calls of plain functions at once, and most that may hang beside them."""

# Of their own: functions that hang must not take the threads that commits wait for.
_threads = ThreadPoolExecutor(2 * CALLS, thread_name_prefix="tool")


def import_function(path: str) -> Callable[..., Any]:
    """What `module:function` names, see `import_named`. Raises ValueError."""
    function = import_named(path)
    if not callable(function):
        raise ValueError(f"`{path}` is no function")
    called: Callable[..., Any] = function
    return called


def define(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """OpenAI's definition of a tool, from the function's signature and docstring. Raises
    ValueError if it can't be called with named arguments that JSON can hold."""
    try:
        parameters = TypeAdapter[Any](function).json_schema()  # type: ignore[arg-type]
    except (PydanticUserError, PydanticUndefinedAnnotation):
        parameters = {}
    if parameters.get("type") != "object":
        raise ValueError(f"`{name}`: its signature can't be described; define it in `tools`")
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": inspect.getdoc(function) or "",
            "parameters": parameters,
        },
    }


def name_of(definition: Mapping[str, Any]) -> str:
    """The name in OpenAI's definition of a tool. Raises ValueError if it is none."""
    function = definition.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if definition.get("type") != "function" or not isinstance(name, str):
        raise ValueError("a tool must be {type: function, function: {name: …, …}}")
    return name


class Toolbox:
    """Functions by name, each with its definition: one of `given`, or made from its signature."""

    def __init__(
        self, paths: Mapping[str, str], given: Sequence[dict[str, Any]], timeout_s: float
    ) -> None:
        """`paths`: name -> `module:function`. Raises ValueError."""
        self._timeout_s = timeout_s
        self._free = asyncio.Semaphore(CALLS)
        self._hanging = 0
        """Calls that were given up and have not ended."""
        self._calls: dict[str, Callable[..., Any]] = {}
        self._arguments: dict[str, Any] = {}
        self.definitions = list(given)
        """What the model is told of: all that were given, and the functions that were not."""
        known = {name_of(definition): definition for definition in given}
        for name, path in paths.items():
            function = import_function(path)
            self._calls[name] = function
            if name not in known:
                known[name] = define(name, function)
                self.definitions.append(known[name])
                self._calls[name] = _validated(name, function)
            self._arguments[name] = _validator(name, known[name])

    async def answer(self, call: Mapping[str, Any], clean: Clean) -> Message:
        """Run one tool call of the model's; a message of role `tool`."""
        text = await self._outcome(call["function"])
        return {"role": "tool", "tool_call_id": call.get("id"), "content": clean(text)}

    async def _outcome(self, function: Mapping[str, Any]) -> str:
        """JSON: what the function returned, or `{"error": …}`."""
        name = function.get("name")
        if name not in self._calls:
            return _error("unknown function")
        try:
            arguments = arguments_of(function)
        except ValueError as error:
            return _error(str(error))
        try:
            wrong = jsonschema.exceptions.best_match(self._arguments[name].iter_errors(arguments))
            if wrong:
                return _error(f"bad arguments: {wrong.json_path}: {wrong.message[:300]}")
            result = await self._run(self._calls[name], arguments)
            text = json.dumps(to_jsonable_python(result), ensure_ascii=False)
            text.encode()
        except RowFailed:
            raise
        except TimeoutError:
            return _error(f"no result within {self._timeout_s:g} s")
        except (SystemExit, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task and task.cancelling():  # it is we who are to end
                raise
            return _error(type(error).__name__)
        except Exception as error:
            # The user's code may raise anything. The type alone: the message may hold secrets.
            return _error(type(error).__name__)
        return text

    async def _run(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """What it returns. The time begins once it is its turn. Raises TimeoutError, RowFailed if
        so many hang that there may be no thread for another one, and what the function raises."""
        if inspect.iscoroutinefunction(function):
            return await asyncio.wait_for(_contained(function, arguments), self._timeout_s)
        async with self._free:
            if self._hanging >= CALLS:
                raise RowFailed(f"tool_hangs: {CALLS} calls have not ended")
            call = asyncio.get_running_loop().run_in_executor(
                _threads, partial(function, **arguments)
            )
            done, _ = await asyncio.wait([call], timeout=self._timeout_s)
            if not done:
                self._hanging += 1
                call.add_done_callback(self._has_ended)
                raise TimeoutError
            return call.result()

    def _has_ended(self, call: asyncio.Future[Any]) -> None:
        self._hanging -= 1
        if not call.cancelled():
            call.exception()  # else asyncio says that nobody asked for it


class Exited(Exception):
    """A user's coroutine wanted to end the process."""


async def _contained(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What it returns. Raises what it raises; but SystemExit would end the event loop."""
    try:
        return await function(**arguments)
    except SystemExit as error:
        raise Exited from error


def _validated(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes dates and the like of JSON's text. Raises ValueError."""
    try:
        return validate_call(function)
    except PydanticUserError:
        raise ValueError(f"`{name}`: is no plain function") from None


async def converse(
    messages: list[Message], ask: Ask, toolbox: Toolbox, max_rounds: int, clean: Clean
) -> tuple[list[Message], Completion]:
    """Ask, run what the model calls, and ask again, until it answers or is cut off. All that was
    said after `messages`, and the last completion.

    Raises RowRejected (`too_many_rounds`) if it goes on calling after `max_rounds` rounds.
    """
    heard: list[Message] = []
    history = list(messages)
    for done in count():
        completion = await ask(history)
        answer = said(completion.message)
        heard.append(answer)
        calls = answer.get("tool_calls")
        if not calls or completion.finish_reason in UNFINISHED:
            return heard, completion
        if done == max_rounds:
            raise RowRejected(f"too_many_rounds: {max_rounds}")
        results = await asyncio.gather(*(toolbox.answer(call, clean) for call in calls))
        heard += results
        history = [*history, _safe(answer, clean), *cleaned(results, clean)]
    raise AssertionError("count() has no end")


def _safe(answer: Message, clean: Clean) -> Message:
    """The model's own turn, to be sent back; arguments that are no object are none."""
    calls = []
    for call in answer["tool_calls"]:
        function = dict(call["function"])
        try:
            arguments_of(function)
        except ValueError:
            function["arguments"] = "{}"
        calls.append({**call, "function": function})
    [message] = check_messages([{**answer, "tool_calls": calls}], clean)
    return message


def _validator(name: str, definition: Mapping[str, Any]) -> Any:
    """Of a call's arguments. Raises ValueError if the definition's `parameters` are no schema."""
    schema = definition["function"].get("parameters", {})
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"`{name}`: parameters are no JSON Schema: {error.message}") from None
    # A registry of its own, as the default one fetches whatever address a `$ref` names.
    return ExactValidator(schema, registry=Registry())


def _error(what: str) -> str:
    return json.dumps({"error": what}, ensure_ascii=False)
