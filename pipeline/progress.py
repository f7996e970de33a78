"""What a person sees while a job runs: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.plan import Plan
from pipeline.records import Counts, Receipt

PLAIN_INTERVAL_S = 10.0
REPLICA_SILENCE_S = 60.0
"""A replica counts as up if it sent a receipt within this time or four units, the longer."""


class Progress:
    """Counts receipts. Thread-safe: the display reads while the driver adds."""

    def __init__(self, plan: Plan, replicas: int) -> None:
        self.rows = plan.rows
        self.units = sum(1 for shard in plan.shards for _ in shard.units())
        self.replicas = replicas
        self.counts = Counts()
        self.units_done = 0
        self._done_before = plan.rows - plan.pending_rows - plan.deferred_rows
        self._started = time.monotonic()
        self._before = 0.0
        """Seconds of computing in lanes that are through."""
        self._first: float | None = None
        self._last = self._started
        self._seen: dict[str, float] = {}
        self._workers_before = 0
        self._longest_unit = 0.0
        self._lock = threading.Lock()

    def begin(self) -> None:
        self._started = time.monotonic()

    def expect(self, deferred: Plan) -> None:
        """More units, of rows that have been counted as deferred; their engine is yet to start."""
        with self._lock:
            self._before, self._first = self.seconds, None
            self._workers_before, self._seen = self.workers, {}
            self._started = time.monotonic()
            self.units += sum(1 for shard in deferred.shards for _ in shard.units())

    def add(self, receipt: Receipt) -> None:
        with self._lock:
            now = time.monotonic()
            if self._first is None:
                # The first unit began this long ago; engine start is not part of the rate.
                self._first = max(self._started, now - receipt.seconds)
            self._last = now
            self._seen[receipt.worker] = now
            self._longest_unit = max(self._longest_unit, receipt.seconds)
            self.units_done += 1
            self.counts.add(receipt.counts)

    @property
    def seconds(self) -> float:
        """From the first unit's arrival at an engine to the last receipt."""
        return self._before + (self._last - self._first if self._first is not None else 0.0)

    @property
    def rows_per_second(self) -> float:
        return self.counts.rows / self.seconds if self.seconds > 0 else 0.0

    @property
    def workers(self) -> int:
        """Workers that have sent a receipt; a replaced one counts again."""
        return self._workers_before + len(self._seen)

    @property
    def replicas_up(self) -> int:
        silence = max(REPLICA_SILENCE_S, 4 * self._longest_unit)
        now = time.monotonic()
        return sum(now - seen < silence for seen in list(self._seen.values()))

    def facts(self) -> list[tuple[str, str]]:
        """Label and value, in the order shown."""
        with self._lock:
            done = self._done_before + self.counts.rows
            rate, seconds = self.rows_per_second, max(self.seconds, 1e-9)
            usage = self.counts.usage
            eta = "-"
            if rate > 0:
                eta = str(timedelta(seconds=round((self.rows - done) / rate)))
            share = 100 * done / max(1, self.rows)
            return [
                ("rows", f"{done:,}/{self.rows:,} ({share:.0f}%)"),
                ("units", f"{self.units_done:,}/{self.units:,}"),
                ("rows/s", f"{rate:,.1f}"),
                ("tokens/s in", f"{usage.prompt_tokens / seconds:,.0f}"),
                ("out", f"{usage.completion_tokens / seconds:,.0f}"),
                ("not ok", f"{self.counts.not_ok:,}"),
                ("replicas", f"{self.replicas_up}/{self.replicas}"),
                ("ETA", eta),
            ]

    def line(self) -> str:
        if self._first is None:
            waited = time.monotonic() - self._started
            return f"starting {self.replicas} replica(s), {waited:.0f} s so far"
        return " · ".join(f"{label} {value}" for label, value in self.facts())

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        if self._first is None:
            table.add_row(f"[dim]{self.line()} …[/]")
            return table
        facts = self.facts()
        table.add_row(*(f"[dim]{label}[/]" for label, _ in facts))
        table.add_row(*(value for _, value in facts))
        return table


@contextmanager
def shown(progress: Progress, console: Console) -> Iterator[None]:
    """Show `progress` while the block runs; waiting for engines counts from here."""
    progress.begin()
    if console.is_terminal:
        with Live(progress, console=console, refresh_per_second=4, transient=True):
            yield
        return
    stop = threading.Event()

    def print_lines() -> None:
        while not stop.wait(PLAIN_INTERVAL_S):
            console.print(progress.line(), highlight=False, soft_wrap=True)

    printer = threading.Thread(target=print_lines, daemon=True)
    printer.start()
    try:
        yield
    finally:
        stop.set()
        printer.join()
