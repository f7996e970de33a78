"""make bench: how fast axbatch is, against the bare engine and against others.

    python -m tests.bench [engines pairs plumbing growth scheduling resume]

Prints a table and writes out/bench/bench.json and bench.svg. The model is the embedded one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench import plumbing, resume, scheduling
from tests.bench.contestants import CONTESTANTS, ENVIRONMENT, ROWS, Took, took
from tests.bench.plot import bars
from tests.bench.workloads import LENGTHS, WORKLOADS, Body, requests

OUT = Path("out/bench")
REPEATS = 5
PAIR_REPEATS = 6
"""Each of three begins twice."""
PAIR_ROWS, LOG_NORMAL_ROWS = 80, 256
"""More of the workload that the goal is about: the end of a run, when the engine is no longer full,
is the smaller a part."""

console = Console(width=110)
Rows = Iterable[tuple[str, ...]]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    median, low, high = (
        f"{each:,.{digits}f}" for each in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({low} to {high})"


def ratios(one: Sequence[float], other: Sequence[float]) -> str:
    """Of the pairs of two that were measured in turn."""
    return spread([a / b for a, b in zip(one, other, strict=True)], digits=2)


def show(title: str, head: tuple[str, ...], rows: Rows) -> None:
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def engines() -> dict[str, Any]:
    """Whole commands, each in turn; the rate from the first request to the last answer."""
    found: dict[str, list[Took]] = {name: [] for name in CONTESTANTS}
    for repeat in range(REPEATS):
        for name, contestant in CONTESTANTS.items():
            last = took(contestant)
            found[name].append(last)
            seconds = f"{last.rest:.1f} + {last.running:.1f} s"
            console.print(f"[dim]{repeat + 1}/{REPEATS} {name}: {seconds}[/]")
    running = {name: [each.running for each in runs] for name, runs in found.items()}
    rest = {name: [each.rest for each in runs] for name, runs in found.items()}
    rates = {name: [ROWS / seconds for seconds in all_s] for name, all_s in running.items()}
    show(
        f"Whole commands, {ROWS} log-normal answers",
        ("", "rows/s", "of the bare engine", "axbatch's is so many times", "start and end, s"),
        (
            (
                name,
                spread(rates[name]),
                ratios(running["bare engine"], running[name]),
                ratios(running[name], running["axbatch"]),
                spread(rest[name]),
            )
            for name in CONTESTANTS
        ),
    )
    bars(OUT / "bench.svg", f"Whole commands, {ROWS} log-normal answers", rates, "rows/s")
    return {"running_s": running, "rest_s": rest}


def pairs() -> dict[str, Any]:
    """The engine bare, under vLLM's run_batch and under axbatch's worker, by workload."""
    from tests.bench.one_engine import OneEngine

    engine = OneEngine()

    computed: list[int] = []
    """Tokens."""

    async def axbatch(bodies: list[Body]) -> float:
        seconds, usage = await engine.axbatch(bodies)
        computed.append(usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens)
        return seconds

    several: dict[str, Callable[[list[Body]], Awaitable[float]]] = {
        "bare": engine.bare,
        "run_batch": engine.run_batch,
        "axbatch": axbatch,
    }

    async def measure() -> dict[str, Any]:
        found = {}
        for answer in several.values():  # what is slow the first time
            await answer(requests("uniform short", PAIR_ROWS))
        for name in WORKLOADS:
            if name == "real lengths" and not LENGTHS.exists():
                console.print(f"real lengths: left out, there is no {LENGTHS}")
                continue
            bodies = requests(name, LOG_NORMAL_ROWS if name == "log-normal" else PAIR_ROWS)
            seconds: dict[str, list[float]] = {who: [] for who in several}
            computed.clear()
            for first in range(PAIR_REPEATS):
                for turn in range(len(several)):  # each begins in its turn
                    who = [*several][(first + turn) % len(several)]
                    seconds[who].append(await several[who](bodies))
            found[name] = {
                "rows": len(bodies),
                "seconds": seconds,
                "tokens": max(computed) / engine.least_tokens(bodies),
            }
        return found

    try:
        found = asyncio.run(measure())
    finally:
        engine.close()
    show(
        "On one engine; rows/s as a share of the bare engine's, in pairs",
        ("", "rows", "bare, rows/s", "run_batch", "axbatch", "tokens computed / least"),
        (
            (
                name,
                f"{one['rows']}",
                spread([one["rows"] / each for each in one["seconds"]["bare"]]),
                ratios(one["seconds"]["bare"], one["seconds"]["run_batch"]),
                ratios(one["seconds"]["bare"], one["seconds"]["axbatch"]),
                f"{one['tokens']:.3f}",
            )
            for name, one in found.items()
        ),
    )
    return found


def copying() -> dict[str, Any]:
    found = plumbing.rates()
    size = found["bytes_per_row"]
    show(
        f"Plumbing alone (echo, two replicas), rows of {size:.0f} bytes, without starts",
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
        ("replicas", "slots", "rows per unit", "longest first", "as they come"),
        (
            (f"{one['replicas']}", f"{one['slots']}", f"{one['rows_per_unit']}",
             f"{one['longest_first']:.3f}", f"{one['as_they_come']:.3f}")
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


def cpu() -> str:
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return named[1] if named else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    chosen = parser.parse_args().sections or [*SECTIONS]
    if unknown := {*chosen} - {*SECTIONS}:
        parser.error(
            f"no such section: {', '.join(sorted(unknown))} (there are {', '.join(SECTIONS)})"
        )
    os.environ |= ENVIRONMENT
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / "bench.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found["machine"] = {"cores": len(os.sched_getaffinity(0)), "cpu": cpu()}
    began = time.monotonic()
    for name in chosen:
        found[name] = SECTIONS[name]()
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        console.print(f"[dim]{name}: {time.monotonic() - began:.0f} s from the begin[/]")
    console.print(f"Figures in {file}")


if __name__ == "__main__":
    main()
