"""Whose turn it is: which request a worker's engine gets next, and which unit begins next.

An engine is full while it has as many requests as it computes at once, and it should be to the
end. What it can't take yet waits here, not in the engine. Units begin as they come, long before
those before them have ended: one row that takes long holds up its own unit only. And a request
goes the earlier the longer it is likely to take, by just so much that the rows of a unit end
together, and units one after the other: so at the end of a job no long row is left to be computed
alone, and not many rows are done, and not committed, when an engine dies.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from typing import TypeAlias

AT_ENGINE = 1.25
"""Requests that the engine has, for each that it computes: the next is there when one ends."""

BEGUN = 10
"""Rows that are begun and not finished, for each request that the engine computes: with fewer, the
next unit begins. So a row may take so many times as long as the mean and yet end with its unit."""

Turn: TypeAlias = asyncio.Future[None]


class Schedule:
    """Of one worker. Used from its event loop."""

    def __init__(self, max_num_seqs: int, longest_first: bool) -> None:
        self._slots = max_num_seqs
        self._room = math.ceil(AT_ENGINE * max_num_seqs)
        self._longest_first = longest_first
        self._requests_seen = 0
        self._length_seen = 0
        """Of all requests together."""
        self._at_engine = 0
        self._requests: list[tuple[float, int, Turn]] = []
        """A heap of those that wait: when it should go, its number, its turn."""
        self._units = 0
        """Begun and not finished; so are `_rows`, those of all units."""
        self._rows = 0
        self._waiting: deque[tuple[int, Turn]] = deque()
        """Units that are yet to begin: rows and turn."""
        self._alone: list[Turn] = []
        """Units that wait to be alone; the first may be so now. Meanwhile no other begins."""

    async def request(self, length: int) -> None:
        """Wait for a place at the engine. `length` is what is known of the time that it takes, in
        any unit. `answered` gives the place back."""
        self._requests_seen += 1
        self._length_seen += length
        if self._at_engine < self._room:
            self._at_engine += 1
            return
        number, due = self._requests_seen, float(self._requests_seen)
        if self._longest_first:
            # While it takes, the engine can do so many others of mean length.
            due -= self._slots * length * self._requests_seen / max(1, self._length_seen)
        turn = _new_turn()
        heappush(self._requests, (due, number, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.answered()
            raise

    def answered(self) -> None:
        """Give the place to the request that is due first."""
        while self._requests:
            turn = heappop(self._requests)[-1]
            if not turn.done():
                turn.set_result(None)
                return
        self._at_engine -= 1

    def finished(self, rows: int) -> None:
        """So many rows of units that are begun are over."""
        self._rows -= rows
        self._begin_units()

    @asynccontextmanager
    async def together(self, rows: int) -> AsyncIterator[None]:
        """The block in which a unit is begun, beside others. Each of its rows is to be told to
        `finished`."""
        turn = _new_turn()
        self._waiting.append((rows, turn))
        self._begin_units()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._units -= 1
                self.finished(rows)
            raise
        try:
            yield
        finally:
            self._units -= 1
            self._begin_units()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """The block in which a unit is begun, and no other."""
        turn = _new_turn()
        self._alone.append(turn)
        self._begin_units()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():
                self._rows = 0  # whichever of its rows were told to `finished`
            self._alone.remove(turn)
            self._begin_units()

    def _begin_units(self) -> None:
        if self._alone:
            if not (self._units or self._alone[0].done()):
                self._alone[0].set_result(None)
            return
        while self._waiting and self._rows < BEGUN * self._slots:
            rows, turn = self._waiting.popleft()
            if not turn.done():
                self._units += 1
                self._rows += rows
                turn.set_result(None)


def _new_turn() -> Turn:
    turn: Turn = asyncio.get_running_loop().create_future()
    return turn
