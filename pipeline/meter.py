"""What an engine has done, by its own counters: the figures that rows' usage must add up to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.accounting import NOTHING_USED, Usage


@dataclass(frozen=True)
class Reading:
    """Of one engine, from its worker's start on."""

    usage: Usage = NOTHING_USED
    """Of all requests, also of those whose rows were never committed; `requests` counts prompts
    that were computed."""
    busy_s: float = 0.0
    """With at least one request."""
    up_s: float = 0.0
    """Since the worker began, the engine's start included: so long its GPUs are taken."""

    def to_json(self) -> dict[str, Any]:
        return {"usage": asdict(self.usage), "busy_s": self.busy_s, "up_s": self.up_s}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reading:
        return cls(Usage(**data["usage"]), data["busy_s"], data["up_s"])


NOT_READ = Reading()


class Meter:
    """Counts for one engine. From its event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        # Plain numbers: no new object for every row, or token.
        self._requests = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0
        self._busy_s = 0.0
        self._busy_since = 0.0
        self.in_flight = 0
        """Requests that the engine has now."""

    def request(self) -> AbstractContextManager[None]:
        """The block in which the engine has a request."""
        return self

    def __enter__(self) -> None:
        if not self.in_flight:
            self._busy_since = self._clock()
        self.in_flight += 1

    def __exit__(self, *error: object) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._busy_s += self._clock() - self._busy_since

    def count(self, usage: Usage) -> None:
        self._requests += usage.requests
        self._prompt_tokens += usage.prompt_tokens
        self._cached_tokens += usage.cached_tokens
        self._completion_tokens += usage.completion_tokens

    def count_completion(self, tokens: int) -> None:
        self._completion_tokens += tokens

    def read(self) -> Reading:
        now = self._clock()
        busy = self._busy_s + (now - self._busy_since if self.in_flight else 0.0)
        usage = Usage(
            self._requests, self._prompt_tokens, self._cached_tokens, self._completion_tokens
        )
        return Reading(usage, busy, now - self._began)
