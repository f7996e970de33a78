"""Requests that were made before: the answer is the same, so it is not computed again."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pipeline.counting import texts_in
from pipeline.records import Completion

KEPT_BYTES = 128 << 20
"""Of answers; those go first that were last asked for longest ago."""

ANSWER_BYTES, CHARACTER_BYTES = 4096, 4
"""Of an answer's objects in memory, and of its text."""

# A message may have a date beside its content, and what else Arrow knows and JSON doesn't.
_encode = json.JSONEncoder(ensure_ascii=False, default=repr).encode


class Repeats:
    """Of one worker. Used from its event loop."""

    def __init__(self, compute: Callable[[Mapping[str, Any]], Awaitable[Completion]]) -> None:
        self._compute = compute
        self._asked: dict[bytes, asyncio.Event] = {}
        """Requests that are being computed."""
        self._answers: OrderedDict[bytes, Completion] = OrderedDict()
        self._bytes = 0

    async def ask(self, body: Mapping[str, Any]) -> tuple[Completion, bool]:
        """The answer, and whether it is a copy of an earlier one. Raises what `compute` does; a
        failure is not kept, and those who wait for the same answer then ask for themselves."""
        if not has_one_answer(body):
            return await self._compute(body), False
        encoded = _encode(body).encode("utf-8", "surrogatepass")
        key = hashlib.blake2b(encoded, digest_size=16).digest()
        others = self._asked.get(key)
        if others:
            await others.wait()
        if key in self._answers:
            self._answers.move_to_end(key)
            return self._answers[key], True
        if others:
            return await self._compute(body), False
        computed = self._asked[key] = asyncio.Event()
        try:
            answer = await self._compute(body)
            self._keep(key, answer)
        finally:
            del self._asked[key]
            computed.set()
        return answer, False

    def _keep(self, key: bytes, answer: Completion) -> None:
        self._answers[key] = answer
        self._bytes += _bytes_of(answer)
        while self._bytes > KEPT_BYTES:
            self._bytes -= _bytes_of(self._answers.popitem(last=False)[1])


def has_one_answer(body: Mapping[str, Any]) -> bool:
    """Whether nothing is left to chance, so that the engine would say the same again; and not so
    much is asked for that keeping it is dear."""
    is_fixed = body.get("temperature") == 0 or body.get("seed") is not None
    is_large = body.get("logprobs") or body.get("prompt_logprobs") or body.get("n") not in (None, 1)
    return is_fixed and not is_large


def _bytes_of(answer: Completion) -> int:
    return ANSWER_BYTES + CHARACTER_BYTES * sum(map(len, texts_in(answer.message)))
