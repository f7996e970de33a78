"""Metrics of a worker, for the Prometheus endpoint that Ray has on every node.

Ray puts `ray_` before these names; infra/grafana.json draws them. They are set once per unit.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.accounting import Usage
from pipeline.meter import NOT_READ, Reading
from pipeline.records import STATUSES, Counts

UNIT_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
"""Bounds of the histogram: a unit is to stay far under ten minutes."""


class Metrics:
    """Of one worker. The label `job_name` is the job's name, `lane` the lane's."""

    def __init__(self, job: str, lane: str, max_num_seqs: int) -> None:
        self._slots = max_num_seqs
        self._read = NOT_READ
        labels = {"job_name": job, "lane": lane}
        keys = tuple(labels)
        self._rows = Counter(
            "axbatch_rows_total", "Rows in committed parts, by status.", (*keys, "status")
        )
        self._tokens = Counter(
            "axbatch_tokens_total",
            "Tokens by the engine's own counters: prompt (cached ones too), cached, completion.",
            (*keys, "kind"),
        )
        self._busy = Counter(
            "axbatch_engine_busy_seconds_total", "Seconds in which the engine had a request.", keys
        )
        self._up = Counter(
            "axbatch_engine_up_seconds_total",
            "Seconds since the worker began, its start too.",
            keys,
        )
        self._queue = Gauge(
            "axbatch_queue_depth", "Requests beyond those that the engine computes at once.", keys
        )
        self._unit = Histogram(
            "axbatch_unit_seconds",
            "Seconds from a unit's arrival to its commit.",
            UNIT_SECONDS,
            keys,
        )
        for metric in (self._rows, self._tokens, self._busy, self._up, self._queue, self._unit):
            metric.set_default_tags(labels)

    def committed(self, counts: Counts, seconds: float, reading: Reading, in_flight: int) -> None:
        """A unit is committed; it took so long, and the engine has so many requests now."""
        for status in STATUSES:
            if counts.statuses[status]:
                self._rows.inc(counts.statuses[status], {"status": status})
        self._unit.observe(seconds)
        # Units may be told of in another order than they were read in. What is older than the last
        # reading is in that already; to go back to it would count the difference twice.
        if reading.up_s > self._read.up_s:
            self._advance(reading)
            self._queue.set(max(0, in_flight - self._slots))

    def _advance(self, reading: Reading) -> None:
        """Count what the engine has done since the last reading, and remember this one."""
        before = _by_kind(self._read.usage)
        for kind, tokens in _by_kind(reading.usage).items():
            if tokens > before[kind]:
                self._tokens.inc(tokens - before[kind], {"kind": kind})
        if reading.busy_s > self._read.busy_s:
            self._busy.inc(reading.busy_s - self._read.busy_s)
        self._up.inc(reading.up_s - self._read.up_s)
        self._read = reading


def _by_kind(usage: Usage) -> dict[str, int]:
    return {
        "prompt": usage.prompt_tokens,
        "cached": usage.cached_tokens,
        "completion": usage.completion_tokens,
    }
