"""The records that flow: units in, completions from an engine, outputs, receipts out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from pipeline.accounting import NOTHING_USED, Account, Usage, bucket_of, total_of
from pipeline.meter import NOT_READ, Reading

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


@dataclass(frozen=True, slots=True)
class Completion:
    """An engine's answer to one chat body: OpenAI's `choices[0]`, the tokens, and the whole."""

    message: Message
    finish_reason: str
    usage: Usage
    body: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The whole `chat.completion` object, as the API's server would send it."""
    reasoning_tokens: int = 0
    """Of the completion tokens, those that the answer does not show."""

    @property
    def text(self) -> str:
        return self.message.get("content") or ""


class Output(NamedTuple):
    """What a task makes of one row. `value` is None unless `status` is ok."""

    value: Any
    status: Status | Literal["deferred"] = "ok"
    reason: str | None = None
    usage: Usage = NOTHING_USED
    needs: int = 0
    """Tokens of context, of a deferred row."""
    cut: Usage = NOTHING_USED
    """Of the usage, what went into answers that ended at the limit of tokens."""
    reasoning_tokens: int = 0
    """Of the completion tokens."""


def counted_as(status: str, reason: str) -> str:
    """`status: code`, without the reason's detail."""
    return f"{status}: {reason.partition(':')[0]}"


@dataclass
class Counts:
    """Rows by status, not-ok rows by reason code, and tokens; of a unit, a shard or a job."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    usage: Usage = NOTHING_USED
    deferred: int = 0
    """Rows that wait for the next lane; they have no status yet."""
    longest: int = 0
    """Tokens of context that the longest of all rows ever deferred needs."""
    account: Account = field(default_factory=Account)

    @property
    def rows(self) -> int:
        return sum(self.statuses.values())

    @property
    def not_ok(self) -> int:
        return self.rows - self.statuses["ok"]

    def count(self, *outputs: Output) -> None:
        account = self.account
        self.usage += total_of(output.usage for output in outputs)
        account.cut += total_of(o.cut for o in outputs if o.cut is not NOTHING_USED)
        account.reasoning_tokens += sum(output.reasoning_tokens for output in outputs)
        self.longest = max(self.longest, *(output.needs for output in outputs), 0)
        done = [output for output in outputs if output.status != DEFERRED]
        self.deferred += len(outputs) - len(done)
        account.wasted += total_of(output.usage for output in done if output.status != "ok")
        account.prompts.update(bucket_of(output.usage.prompt_tokens) for output in done)
        account.completions.update(bucket_of(output.usage.completion_tokens) for output in done)
        self.statuses.update(output.status for output in done)
        self.reasons.update(counted_as(o.status, o.reason) for o in done if o.reason is not None)

    def add(self, other: Counts) -> None:
        self.statuses.update(other.statuses)
        self.reasons.update(other.reasons)
        self.usage += other.usage
        self.deferred += other.deferred
        self.longest = max(self.longest, other.longest)
        self.account.add(other.account)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "statuses": {status: self.statuses[status] for status in STATUSES},
            "reasons": dict(sorted(self.reasons.items())),
            "usage": asdict(self.usage),
            "deferred": self.deferred,
            "longest": self.longest,
            "account": self.account.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Counts:
        statuses = Counter({k: v for k, v in data["statuses"].items() if v})
        return cls(
            statuses,
            Counter(data["reasons"]),
            Usage(**data["usage"]),
            data.get("deferred", 0),
            data.get("longest", 0),
            Account.from_json(data["account"]) if "account" in data else Account(),
        )


@dataclass(frozen=True)
class Receipt:
    """The proof of a committed part, a kilobyte or two: all that flows back through Ray."""

    unit: Unit
    counts: Counts
    worker: str
    seconds: float
    """From the unit's arrival at the worker until its part was committed."""
    engine: Reading = NOT_READ
    """The worker's, once the unit was committed."""
