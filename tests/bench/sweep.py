"""Settings of ray.data.llm, each three times in turn, fastest last; `contestants.BEST_RAY_DATA` is
one of them.

    python -m tests.bench.sweep
"""

from __future__ import annotations

import statistics
from typing import Any

from tests.bench.contestants import Contestant, ray_data, took

TIMES = 3
NO_STAGES = {"tokenize_stage": False, "detokenize_stage": False}
"""The engine does this itself, in one process less for each."""
SETTINGS: list[dict[str, Any]] = [
    {},
    {"batch_size": 16, "max_concurrent_batches": 16},
    {"batch_size": 64, "max_concurrent_batches": 16},
    {"batch_size": 256, "max_concurrent_batches": 8},
    {"batch_size": 16, "max_concurrent_batches": 16, **NO_STAGES},
    {"batch_size": 64, "max_concurrent_batches": 16, **NO_STAGES},
    {"batch_size": 256, "max_concurrent_batches": 8, **NO_STAGES},
]


def main() -> None:
    running: list[list[float]] = [[] for _ in SETTINGS]
    for _ in range(TIMES):
        for settings, seconds in zip(SETTINGS, running, strict=True):
            seconds.append(took(Contestant(ray_data, settings)).running)
    medians = map(statistics.median, running)
    for median, number in sorted(zip(medians, range(len(SETTINGS)), strict=True), reverse=True):
        print(f"{median:6.1f} s ({min(running[number]):.1f} to {max(running[number]):.1f}) "
              f"{SETTINGS[number]}")  # fmt: skip


if __name__ == "__main__":
    main()
