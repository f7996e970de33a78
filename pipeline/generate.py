"""One row's `generate` (see task.Generate): asks the engine, and counts what it takes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from pipeline.accounting import NOTHING_USED
from pipeline.chunking import surely_fits
from pipeline.engine import Engine
from pipeline.errors import RowDeferred
from pipeline.records import Completion, Message
from pipeline.task import TEMPLATE_TOKENS, room
from pipeline.tokens import RowText

Ask = Callable[[Mapping[str, Any]], Awaitable[tuple[Completion, bool]]]
"""The answer to a chat body, and whether it is a copy of an earlier one, for which the engine has
done nothing."""

MESSAGE_TOKENS = 4
"""That a chat template puts around a message: A.X's has three."""

CHARACTERS_PER_TOKEN = 4
"""As English has."""


class EngineGenerate:
    """One row's `generate` (see task.Generate), and what it has cost."""

    def __init__(
        self,
        engine: Engine,
        ask: Ask,
        sampling: Mapping[str, Any],
        clean: RowText,
        longest: int = 0,
        defers: bool = False,
    ) -> None:
        """`defers`: requests that are too long defer the row, as the task doesn't see to it."""
        self._ask = ask
        self._defers = defers and longest > 0
        self.clean = clean
        self.longest_model_len = longest
        self.usage = NOTHING_USED
        self.cut = NOTHING_USED
        """Of the usage, what went into answers that ended at the limit of tokens."""
        self.reasoning_tokens = 0
        self._has_begun = False
        self.count_tokens = engine.count_tokens
        self.max_model_len = engine.max_model_len
        self.max_tokens = int(sampling["max_tokens"])
        # vLLM refuses to try for more than there can be.
        self._sampling = {**sampling, "max_tokens": min(self.max_tokens, engine.max_model_len)}

    async def __call__(self, messages: list[Message], **body: Any) -> Completion:
        return await self.send({"messages": messages, **self._sampling, **body})

    async def send(self, body: Mapping[str, Any]) -> Completion:
        if self._defers:
            await self._defer_if_too_long(body)
        completion, is_copy = await self._ask(body)
        self._has_begun = True
        if is_copy:
            return completion
        self.usage += completion.usage
        self.reasoning_tokens += completion.reasoning_tokens
        if completion.finish_reason == "length":
            self.cut += completion.usage
        return completion

    async def _defer_if_too_long(self, body: Mapping[str, Any]) -> None:
        """Raises RowDeferred if prompt and answer need a longer context, and there is one."""
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        answer = asked or self.max_tokens
        if not isinstance(answer, int):
            return  # the engine will say what is wrong with it
        # vLLM refuses to try for more than there can be, however short the prompt.
        is_refused = asked is not None and answer > self.max_model_len
        here, later = (room(own, answer) for own in (self.max_model_len, self.longest_model_len))
        texts = list(texts_of(body))
        fits = all(surely_fits(text, here // (2 * len(texts))) for text in texts)
        if fits and not is_refused:
            return
        prompt = await asyncio.to_thread(lambda: sum(map(self.count_tokens, texts)))
        prompt += TEMPLATE_TOKENS + MESSAGE_TOKENS * len(texts)
        if (is_refused or here < prompt) and prompt <= later and answer <= self.longest_model_len:
            # A conversation that has begun goes on growing.
            needs = self.longest_model_len if self._has_begun else prompt + answer
            raise RowDeferred(min(needs, self.longest_model_len))


def expected_length(body: Mapping[str, Any]) -> int:
    """Characters of the last turn, or of what `max_tokens` allows: a long text gets a long answer,
    most of the time."""
    messages = body.get("messages")
    length = sum(map(len, _texts_in(messages[-1]))) if messages else 0
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    if isinstance(limit, int):  # else, or if it is negative, the engine will say what is wrong
        return min(length, CHARACTERS_PER_TOKEN * max(0, limit))
    return length


def texts_of(body: Mapping[str, Any]) -> Iterator[str]:
    """All text of a chat body that becomes part of the prompt."""
    for message in body.get("messages") or ():
        yield from _texts_in(message)
    if body.get("tools"):
        yield json.dumps(body["tools"], ensure_ascii=False)


def _texts_in(message: Any) -> Iterator[str]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        yield content
    elif content:
        yield from (part["text"] for part in content if isinstance(part.get("text"), str))
    if isinstance(message, dict) and message.get("tool_calls"):
        yield json.dumps(message["tool_calls"], ensure_ascii=False)
