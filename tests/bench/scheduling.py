"""How much of its time a cluster computes: replicas in virtual time, with the real schedule.

    python -m tests.bench scheduling

Each replica has as many slots as its engine computes requests at once; a request takes as long as
its answer, of which the schedule knows what its text lets expect. Units of rows go to the replicas
as Ray hands them out: each holds as many as `units_to_hold` says, and gets the next when one is
done. A commit takes a little; nothing else takes time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from pipeline.cluster import units_to_hold
from pipeline.schedule import Schedule
from tests.bench.workloads import log_normal_length
from tests.virtual_time import run_virtually

ROWS_PER_UNIT = 256
SECONDS_PER_TOKEN = 0.02
COMMIT_S = 0.05


MISJUDGED = 0.25
"""Standard deviation of the logarithm of an answer's tokens, divided by what its text's characters
let expect: 0.251 for the Korean of 1,997 English news sentences (NTREX, A.X 3.1's tokenizer)."""

Row = tuple[int, int]
"""Tokens of its answer, and how many are expected."""


class Replica:
    def __init__(self, slots: int, longest_first: bool) -> None:
        self.slots = slots
        self._schedule = Schedule(slots, longest_first)
        self._free = asyncio.Semaphore(slots)
        self.ended = 0.0

    async def do(self, unit: Sequence[Row]) -> None:
        async with self._schedule.together(len(unit)):
            await asyncio.gather(*map(self._row, unit))
        await asyncio.sleep(COMMIT_S)

    async def _row(self, row: Row) -> None:
        tokens, expected = row
        await self._schedule.request(expected)
        async with self._free:
            await asyncio.sleep(tokens * SECONDS_PER_TOKEN)  # virtual
        self.ended = asyncio.get_running_loop().time()
        self._schedule.answered()
        self._schedule.finished(1)


def simulate(
    rows: Sequence[Row],
    replicas: int,
    slots: int,
    longest_first: bool = True,
    rows_per_unit: int = ROWS_PER_UNIT,
) -> float:
    """The share of the cluster's time that is not lost: the least that it could take (all slots
    busy all the time, or as long as the longest row), by what it takes."""
    units = [rows[i : i + rows_per_unit] for i in range(0, len(rows), rows_per_unit)]
    lengths = [tokens for tokens, _ in rows]
    held = units_to_hold(len(units), rows_per_unit, slots, replicas)
    left = iter(units)

    async def cluster() -> list[Replica]:
        several = [Replica(slots, longest_first) for _ in range(replicas)]

        async def hold(replica: Replica) -> None:
            for unit in left:
                await replica.do(unit)

        await asyncio.gather(*(hold(replica) for _ in range(held) for replica in several))
        return several

    done = run_virtually(cluster())
    seconds = max(replica.ended for replica in done)
    work = sum(lengths) * SECONDS_PER_TOKEN / (replicas * slots)
    return max(work, max(lengths) * SECONDS_PER_TOKEN) / seconds


ROWS_PER_SLOT = 50
CLUSTERS = ((1, 64, 256), (1, 256, 256), (8, 64, 256), (8, 64, 64), (8, 256, 256))
"""Replicas, their slots, and rows of a unit."""


def shares() -> list[dict[str, float]]:
    """Of each cluster, with answers of 8 to 512 tokens, half of them under 40, the longest first
    or as they come."""
    made = []
    for replicas, slots, unit in CLUSTERS:
        dice = random.Random(31)
        lengths = [log_normal_length(dice) for _ in range(ROWS_PER_SLOT * replicas * slots)]
        rows = [(n, round(n * dice.lognormvariate(0, MISJUDGED))) for n in lengths]
        made.append({
            "replicas": replicas,
            "slots": slots,
            "rows_per_unit": unit,
            "longest_first": simulate(rows, replicas, slots, True, unit),
            "as_they_come": simulate(rows, replicas, slots, False, unit),
        })  # fmt: skip
    return made
