"""What a person sees while a job runs: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.config.costs import AccountingConfig
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.prices import cost_of, saving_of
from pipeline.records import Counts, Receipt

PLAIN_INTERVAL_S = 10.0
REPLICA_SILENCE_S = 60.0
"""A replica counts as up if it sent a receipt within this time or four units, the longer."""


Facts = list[tuple[str, str]]
"""Labels and values."""


class Progress:
    """Counts receipts. Thread-safe: the display reads while the driver adds."""

    def __init__(
        self, plan: Plan, replicas: int, costs: Callable[[Counts], Facts] = lambda _: []
    ) -> None:
        """`costs` tells what rows of these counts have cost, see `running_costs`."""
        self.rows = plan.rows
        self._costs = costs
        self.lane = ""
        """Its title, once there is a second."""
        self.units = plan.pending_units
        self.replicas = replicas
        self.counts = Counts()
        """Of this run; `deferred` counts rows that are still to do in it."""
        self.units_done = 0
        self._done_before = plan.done_rows
        self._lane_rows = plan.pending_rows
        """That the lane is to do, or to leave to the next."""
        self._lane_counts = Counts()
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

    def expect(self, deferred: Plan, lane: str) -> None:
        """All that is left, once the first lane is through: for a lane of this title, whose engine
        is yet to start."""
        with self._lock:
            self.lane = lane
            self._lane_rows, self._lane_counts = deferred.pending_rows, Counts()
            self._done_before = self.rows - self.counts.rows - deferred.pending_rows
            self.counts.deferred = deferred.pending_rows
            self._before, self._first = self.seconds, None
            self._workers_before, self._seen = self.workers, {}
            self._started = time.monotonic()
            self.units += deferred.pending_units

    def add(self, receipt: Receipt) -> None:
        with self._lock:
            now = time.monotonic()
            # The first unit began this long ago; engine start is not part of the rate.
            began = max(self._started, now - receipt.seconds)
            self._first = began if self._first is None else min(self._first, began)
            self._last = now
            self._seen[receipt.worker] = now
            self._longest_unit = max(self._longest_unit, receipt.seconds)
            self.units_done += 1
            if self.lane:
                self.counts.deferred = max(0, self.counts.deferred - receipt.counts.rows)
            self.counts.add(receipt.counts)
            self._lane_counts.add(receipt.counts)

    @property
    def seconds(self) -> float:
        """From the first unit's arrival at an engine to the last receipt, in all lanes."""
        return self._before + self._lane_seconds

    @property
    def _lane_seconds(self) -> float:
        return self._last - self._first if self._first is not None else 0.0

    @property
    def workers(self) -> int:
        """Workers that have sent a receipt; a replaced one counts again."""
        return self._workers_before + len(self._seen)

    @property
    def replicas_up(self) -> int:
        silence = max(REPLICA_SILENCE_S, 4 * self._longest_unit)
        now = time.monotonic()
        heard = sum(now - seen < silence for seen in list(self._seen.values()))
        return min(self.replicas, heard)

    def facts(self) -> Facts:
        """In the order shown. Rates and ETA are the lane's, the rest is of all
        lanes."""
        with self._lock:
            done = self._done_before + self.counts.rows
            lane, seconds = self._lane_counts, max(self._lane_seconds, 1e-9)
            usage = lane.usage
            through = lane.rows + lane.deferred
            eta = "-"
            if through and self._lane_seconds > 0:
                left = max(0, self._lane_rows - through) * seconds / through
                eta = str(timedelta(seconds=round(left)))
            share = 100 * done / max(1, self.rows)
            rate = lane.rows / seconds if self._lane_seconds > 0 else 0.0
            return [
                *([("lane", self.lane)] if self.lane else []),
                ("rows", f"{done:,}/{self.rows:,} ({share:.0f}%)"),
                ("units", f"{self.units_done:,}/{self.units:,}"),
                ("rows/s", f"{rate:,.1f}"),
                ("tokens/s in", f"{usage.prompt_tokens / seconds:,.0f}"),
                ("out", f"{usage.completion_tokens / seconds:,.0f}"),
                ("not ok", f"{self.counts.not_ok:,}"),
                *([("deferred", f"{lane.deferred:,}")] if lane.deferred else []),
                ("replicas", f"{self.replicas_up}/{self.replicas}"),
                *self._costs(self.counts),
                ("ETA", eta),
            ]

    def line(self) -> str:
        if self._first is None:
            waited = time.monotonic() - self._started
            lane = f" of lane {self.lane}" if self.lane else ""
            return f"starting {self.replicas} replica(s){lane}, {waited:.0f} s so far"
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


def running_costs(accounting: AccountingConfig, ledger: Ledger, counts: Counts) -> Facts:
    """What a run has cost so far, and how its texts' tokens compare with the baseline's."""
    prices, facts = accounting.prices, []
    if prices and (prices.input is not None or ledger.gpu_s):
        cost = cost_of(prices, ledger.engine, ledger.gpu_s)
        facts.append(("cost", f"{cost:,.2f} {prices.currency}"))
    saved = saving_of(counts.account.texts)
    if saved is not None:
        facts.append((f"tokens against {accounting.baseline}", f"{-saved:+.0%}"))
    return facts


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
