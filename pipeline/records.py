"""The records that flow: units in, completions from an engine, outputs, receipts out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Status = Literal["ok", "rejected", "failed"]
STATUSES: tuple[Status, ...] = ("ok", "rejected", "failed")

DEFERRED = "deferred"
"""In the place of a status, in parts alone: the row waits for the next lane."""

Row = Mapping[str, Any]
"""One input row: the columns that the task names, as plain Python values."""

Message = dict[str, Any]
"""One OpenAI chat message."""


@dataclass(frozen=True, order=True)
class Unit:
    """Rows [start, stop) of one shard: the atom of scheduling, commit and retry."""

    shard: str
    """Its key, see `parts.key_of`."""
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def id(self) -> str:
        """Follows from the range alone, so that every run names the same unit alike."""
        return f"{self.start:012d}-{self.stop:012d}"

    @classmethod
    def from_id(cls, shard: str, unit_id: str) -> Unit:
        """Raises ValueError if `unit_id` is not `START-STOP`."""
        start, stop = unit_id.split("-")
        return cls(shard, int(start), int(stop))


@dataclass(frozen=True)
class Usage:
    """What the engine counted. Tokens; `requests` counts calls that reached the engine."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Completion:
    """An engine's answer to one chat body: OpenAI's `choices[0]`, the tokens, and the whole."""

    message: Message
    finish_reason: str
    usage: Usage
    body: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The whole `chat.completion` object, as the API's server would send it."""

    @property
    def text(self) -> str:
        return self.message.get("content") or ""


@dataclass(frozen=True)
class Output:
    """What a task makes of one row. `value` is None unless `status` is ok."""

    value: Any
    status: Status | Literal["deferred"] = "ok"
    reason: str | None = None
    usage: Usage = Usage()
    needs: int = 0
    """Tokens of context, of a deferred row."""

    def with_usage(self, usage: Usage) -> Output:
        return replace(self, usage=usage)


def counted_as(status: str, reason: str) -> str:
    """`status: code`, without the reason's detail."""
    return f"{status}: {reason.partition(':')[0]}"


@dataclass
class Counts:
    """Rows by status, not-ok rows by reason code, and tokens; of a unit, a shard or a job."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    usage: Usage = Usage()
    deferred: int = 0
    """Rows that wait for the next lane; they have no status yet."""
    longest: int = 0
    """Tokens of context that the longest of all rows ever deferred needs."""

    @property
    def rows(self) -> int:
        return sum(self.statuses.values())

    @property
    def not_ok(self) -> int:
        return self.rows - self.statuses["ok"]

    def count(self, output: Output) -> None:
        self.usage += output.usage
        if output.status == DEFERRED:
            self.deferred += 1
            self.longest = max(self.longest, output.needs)
            return
        self.statuses[output.status] += 1
        if output.reason is not None:
            self.reasons[counted_as(output.status, output.reason)] += 1

    def add(self, other: Counts) -> None:
        self.statuses.update(other.statuses)
        self.reasons.update(other.reasons)
        self.usage += other.usage
        self.deferred += other.deferred
        self.longest = max(self.longest, other.longest)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "statuses": {status: self.statuses[status] for status in STATUSES},
            "reasons": dict(sorted(self.reasons.items())),
            "usage": asdict(self.usage),
            "deferred": self.deferred,
            "longest": self.longest,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Counts:
        statuses = Counter({k: v for k, v in data["statuses"].items() if v})
        usage, deferred, longest = data["usage"], data.get("deferred", 0), data.get("longest", 0)
        return cls(statuses, Counter(data["reasons"]), Usage(**usage), deferred, longest)


@dataclass(frozen=True)
class Receipt:
    """The proof of a committed part, a few hundred bytes: all that flows back through Ray."""

    unit: Unit
    counts: Counts
    worker: str
    seconds: float
    """From the unit's arrival at the worker until its part was committed."""
