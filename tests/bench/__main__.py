"""make bench: how fast axbatch is, against the bare engine and against others.

    python -m tests.bench [engines pairs plumbing growth scheduling resume]

Prints a table and writes out/bench/bench.json and bench.svg. The model is the embedded one.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tests.bench import plumbing, resume, scheduling
from tests.bench.contestants import CONTESTANTS, ENVIRONMENT
from tests.bench.plot import bars
from tests.bench.workloads import LENGTHS, WORKLOADS, requests, write

OUT = Path("out/bench")
REPEATS = 5
ROWS = 512
"""Of a whole command."""
PAIR_ROWS, LOG_NORMAL_ROWS = 112, 256
"""More of the workload that the goal is about: the end of a run, when the engine is no longer full,
is the smaller a part."""
TIMEOUT_S = 600

console = Console(width=110)
Rows = Iterable[tuple[str, ...]]


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def show(title: str, head: tuple[str, ...], rows: Rows) -> None:
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


class Took(NamedTuple):
    """Seconds of a whole command."""

    running: float
    """From the first request to the last answer."""
    starting: float


def took(name: str, rows: int) -> Took:
    with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as folder:
        write(Path(folder), requests("log-normal", rows))
        with (OUT / "engines.log").open("a") as log:
            began = time.monotonic()
            subprocess.run(
                [sys.executable, "-m", "tests.bench.contestants", name, folder],
                stdout=log, stderr=log, check=True, timeout=TIMEOUT_S,
            )  # fmt: skip
            whole = time.monotonic() - began
        running = float((Path(folder) / "seconds").read_text())
    return Took(running, whole - running)


def engines() -> dict[str, Any]:
    """Whole commands, each in turn; the rate from the first request to the last answer."""
    found: dict[str, list[Took]] = {name: [] for name in CONTESTANTS}
    for repeat in range(REPEATS):
        for name in CONTESTANTS:
            found[name].append(took(name, ROWS))
            last = found[name][-1]
            seconds = f"{last.starting:.1f} + {last.running:.1f} s"
            console.print(f"[dim]{repeat + 1}/{REPEATS} {name}: {seconds}[/]")
    running = {name: [each.running for each in runs] for name, runs in found.items()}
    starting = {name: [each.starting for each in runs] for name, runs in found.items()}
    rates = {name: [ROWS / seconds for seconds in all_s] for name, all_s in running.items()}
    show(
        f"Whole commands, {ROWS} log-normal answers",
        ("", "rows/s", "of the bare engine", "axbatch's is so many times", "start, s"),
        (
            (
                name,
                spread(rates[name]),
                f"{ratio_of(running['bare engine'], running[name]):.2f}",
                f"{ratio_of(running[name], running['axbatch']):.2f}",
                spread(starting[name]),
            )
            for name in CONTESTANTS
        ),
    )
    bars(OUT / "bench.svg", f"Whole commands, {ROWS} log-normal answers", rates, "rows/s")
    return {"running_s": running, "starting_s": starting}


def pairs() -> dict[str, Any]:
    """The engine bare, under vLLM's run_batch and under axbatch's worker, by workload."""
    from tests.bench.one_engine import OneEngine

    engine = OneEngine()

    async def measure() -> dict[str, Any]:
        found = {}
        for name in WORKLOADS:
            if name == "real lengths" and not LENGTHS.exists():
                continue
            bodies = requests(name, LOG_NORMAL_ROWS if name == "log-normal" else PAIR_ROWS)
            seconds: dict[str, list[float]] = {"bare": [], "run_batch": [], "axbatch": []}
            for _ in range(REPEATS):
                seconds["bare"].append(await engine.bare(bodies))
                seconds["run_batch"].append(await engine.run_batch(bodies))
                took, usage = await engine.axbatch(bodies)
                seconds["axbatch"].append(took)
            computed = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens
            found[name] = {
                "rows": len(bodies),
                "seconds": seconds,
                "tokens": computed / engine.least_tokens(bodies),
            }
        return found

    try:
        found = asyncio.run(measure())
    finally:
        engine.close()

    def ratio(seconds: dict[str, list[float]], name: str) -> str:
        return f"{ratio_of(seconds['bare'], seconds[name]):.2f}"

    show(
        "On one engine; rows/s as a share of the bare engine's, in pairs",
        ("", "rows", "bare, rows/s", "run_batch", "axbatch", "tokens computed / least"),
        (
            (
                name,
                f"{one['rows']}",
                spread([one["rows"] / each for each in one["seconds"]["bare"]]),
                ratio(one["seconds"], "run_batch"),
                ratio(one["seconds"], "axbatch"),
                f"{one['tokens']:.3f}",
            )
            for name, one in found.items()
        ),
    )
    return found


def ratio_of(bare: list[float], other: list[float]) -> float:
    """Median of the pairs' ratios."""
    return statistics.median(a / b for a, b in zip(bare, other, strict=True))


def copying() -> dict[str, Any]:
    found = plumbing.rates()
    size = found["bytes_per_row"]
    show(
        f"Plumbing alone (echo, two replicas), rows of {size:.0f} bytes, slope",
        ("", "rows/s", "MB/s"),
        (
            (name, spread(values), f"{statistics.median(values) * size / 1e6:,.1f}")
            for name, values in found["rows_per_s"].items()
        ),
    )
    return found


def growth() -> list[dict[str, float]]:
    sizes = (1_000, *(n * plumbing.MILLION for n in (1, 3, 10)))
    found = [plumbing.growth(rows) for rows in sizes]
    show(
        f"By the size of the job, until {plumbing.WATCHED_ROWS:,} rows are done",
        ("rows", "first part after, s", "driver, MB", "worker, MB"),
        (
            (f"{one['rows']:,}", f"{one['first_part_s']:.1f}", f"{one['driver']:.0f}",
             f"{one['worker']:.0f}")
            for one in found
        ),
    )  # fmt: skip
    return found


def shares() -> list[dict[str, float]]:
    found = scheduling.shares()
    show(
        f"Share of the time that a cluster computes, {scheduling.ROWS_PER_SLOT} rows per slot",
        ("replicas", "slots", "rows per unit", "lengths known", "unknown"),
        (
            (f"{one['replicas']}", f"{one['slots']}", f"{one['rows_per_unit']}",
             f"{one['known']:.3f}", f"{one['unknown']:.3f}")
            for one in found
        ),
    )  # fmt: skip
    return found


def resuming() -> dict[int, tuple[float, float]]:
    found = resume.measure_all(files=1000, rows_per_file=[10, 10_000])
    show(
        "A run that finds all done, 1,000 files",
        ("rows", "s", "MB"),
        ((f"{1000 * rows:,}", f"{s:.2f}", f"{mb:.0f}") for rows, (s, mb) in found.items()),
    )
    return found


SECTIONS: dict[str, Callable[[], Any]] = {
    "scheduling": shares,
    "plumbing": copying,
    "growth": growth,
    "resume": resuming,
    "pairs": pairs,
    "engines": engines,
}


def main() -> None:
    os.environ |= ENVIRONMENT
    OUT.mkdir(parents=True, exist_ok=True)
    chosen = sys.argv[1:] or [*SECTIONS]
    machine = {"cores": len(os.sched_getaffinity(0)), "cpu": platform.processor()}
    found: dict[str, Any] = {"machine": machine}
    began = time.monotonic()
    for name in chosen:
        found[name] = SECTIONS[name]()
        (OUT / "bench.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        console.print(f"[dim]{name}: {time.monotonic() - began:.0f} s from the begin[/]")
    console.print(f"Figures in {OUT}/bench.json")


if __name__ == "__main__":
    main()
