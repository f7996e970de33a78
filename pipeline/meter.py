"""What an engine has done, by its own counters: the figures that rows' usage must add up to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        self._usage = NOTHING_USED
        self._completion_tokens = 0
        """On top of `_usage`."""
        self._busy_s = 0.0
        self._busy_since = 0.0
        self.in_flight = 0
        """Requests that the engine has now."""

    @contextmanager
    def request(self) -> Iterator[None]:
        """The block in which the engine has a request."""
        if not self.in_flight:
            self._busy_since = self._clock()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._busy_s += self._clock() - self._busy_since

    def count(self, usage: Usage) -> None:
        self._usage += usage

    def count_completion(self, tokens: int) -> None:
        """Without a new object for every token of every request."""
        self._completion_tokens += tokens

    def read(self) -> Reading:
        now = self._clock()
        busy = self._busy_s + (now - self._busy_since if self.in_flight else 0.0)
        usage = self._usage + Usage(completion_tokens=self._completion_tokens)
        return Reading(usage, busy, now - self._began)
