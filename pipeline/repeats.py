"""Requests that were made before: the answer is the same, so it is not computed again."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pipeline.records import Completion

KEPT_BYTES = 128 << 20
"""Of answers; those go first that were last asked for longest ago."""

ANSWER_BYTES = 4096
"""Of an answer's objects in memory, beside its text; measured with vLLM's."""


class Repeats:
    """Of one worker. Used from its event loop."""

    def __init__(self, compute: Callable[[Mapping[str, Any]], Awaitable[Completion]]) -> None:
        self._compute = compute
        self._asked: dict[bytes, asyncio.Event] = {}
        """Requests that are being computed."""
        self._answers: OrderedDict[bytes, Completion] = OrderedDict()
        self._bytes = 0

    async def ask(self, body: Mapping[str, Any]) -> tuple[Completion, bool]:
        """The answer, and whether it is a copy of an earlier one. Raises what `compute` does, in
        which case the next one who asks computes it again."""
        if not has_one_answer(body):
            return await self._compute(body), False
        key = hashlib.blake2b(_encoded(body), digest_size=16).digest()
        while key in self._asked:
            await self._asked[key].wait()
        if key in self._answers:
            self._answers.move_to_end(key)
            return self._answers[key], True
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
    """Whether nothing is left to chance: asked again, the engine would say the same."""
    return body.get("temperature") == 0 or body.get("seed") is not None


def _encoded(body: Mapping[str, Any]) -> bytes:
    # A message may have a date beside its content, and what else Arrow knows and JSON doesn't.
    return json.dumps(body, ensure_ascii=False, default=repr).encode("utf-8", "surrogatepass")


def _bytes_of(answer: Completion) -> int:
    return ANSWER_BYTES + 4 * len(answer.text)
