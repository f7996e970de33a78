"""The figures of an estimate, and how they are written as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from pipeline.accounting import Interval
from pipeline.forecast.capacity import Fit, Work
from pipeline.forecast.gpus import Gpu
from pipeline.forecast.intervals import NOTHING
from pipeline.lanes import Lane
from pipeline.prices import TokenRatios

Covers = Literal["to do", "waiting", "all"]
LengthSource = Literal["measured", "expected", "unknown"]


@dataclass(frozen=True)
class LaneWork:
    """What a lane is to do; of a request, means."""

    lane: Lane
    rows: int
    requests: float
    work: Interval
    """Completion tokens of a request."""
    prompt: float
    cached: float
    """Of the prompt, tokens that all requests begin with: from the prefix cache."""
    units: int
    """That its rows come in, about; each is one replica's."""

    def works(self) -> tuple[Work, Work, Work]:
        """With the fewest completion tokens that are likely, with about as many, with the most."""
        low, mid, high = (Work(self.prompt, tokens, self.cached) for tokens in self.work)
        return low, mid, high


@dataclass(frozen=True)
class TokenEstimate:
    """Of all requests of the rows that an estimate covers."""

    source: str
    """What counted, for people."""
    is_exact: bool
    requests: Interval
    prompt: Interval
    completion: Interval
    answers: LengthSource
    lanes: tuple[LaneWork, ...]
    not_ok: dict[str, int]
    """`status: code` -> rows, scaled up."""
    deferred: int
    cut: dict[str, int]
    """The task's `overflow` -> rows that the model gets in pieces, or not whole."""
    shared: float
    """Share of the prompt tokens that all requests begin with: instructions."""
    fits_native: float | None
    """Share of the rows whose requests fit the model's own context; None if that is not known."""
    limited: float
    """Share of the requests whose answer is likely to be longer than it may be."""
    ratios: TokenRatios | None
    """Baseline tokens for each of the model's."""
    output_ratio: LengthSource = "expected"
    """measured: on the results of done rows. expected: taken to be that of the prompts."""
    is_stand_in: bool = False
    """Whether it was another model's tokenizer that counted."""


@dataclass(frozen=True)
class Room:
    """How an engine fills its GPUs: the first lane's, or that of a later lane that won't start."""

    lane: Lane
    gpu: Gpu
    fit: Fit
    tokens: float
    """Of a request, prompt and answer, at most that is likely."""
    smallest_tensor_parallel: int | None
    """With which every lane's engine starts, and holds enough of its requests at once; where one
    does not start as it is, at least one request."""


@dataclass(frozen=True)
class Duration:
    """Seconds, engines' starts not counted."""

    wall: Interval
    gpu: Interval
    """GPU-seconds of all replicas; 0 where there is no GPU."""
    replicas: int
    source: Literal["measured", "computed"]
    """measured: at the rate of the last run. computed: from the limit of physics, over what good
    engines reach with the likely answers, to the same with the longest."""


class ComparedCost(NamedTuple):
    """The same work by another price list."""

    name: str
    currency: str
    cost: Interval


@dataclass(frozen=True)
class Estimate:
    """What is known of a job, or of what is left of it."""

    rows: int
    covers: Covers
    sampled: int = 0
    places: int = 0
    done: int = 0
    """Rows beside these that are done already."""
    done_not_ok: float = 0.0
    """Of these, about so many came out not ok."""
    characters: Interval = NOTHING
    """Of the columns that the task reads."""
    decomposed: float = 0.0
    """Share of the sampled rows with text that is not NFC."""
    duplicates: float = 0.0
    """Share of the sampled rows that equal one before them in the sample. A lower bound, and for
    rows that are repeated far apart a weak one."""
    tokens: TokenEstimate | None = None
    room: Room | None = None
    duration: Duration | None = None
    cost: Interval | None = None
    currency: str | None = None
    basis: str | None = None
    compared: tuple[ComparedCost, ...] = ()
    cut_answers: float | None = None
    """Share of the answers so far that ended at the limit of tokens; None if there are too few."""
    missing: tuple[str, ...] = ()
    """Which figures are not here and why, a line each."""

    def to_json(self) -> dict[str, Any]:
        tokens, room, duration = self.tokens, self.room, self.duration
        return {
            "rows": self.rows,
            "covers": self.covers,
            "sample": {"rows": self.sampled, "places": self.places},
            "characters": self.characters._asdict(),
            "not_nfc": self.decomposed,
            "duplicates_at_least": self.duplicates,
            "prompt": tokens.prompt._asdict() if tokens else None,
            "completion": tokens.completion._asdict() if tokens else None,
            "seconds": duration.wall._asdict() if duration else None,
            "cost": self.cost._asdict() if self.cost else None,
            "tokens": _tokens_json(tokens) if tokens else None,
            "fit": _room_json(room) if room else None,
            "time": {
                "gpu_seconds": duration.gpu._asdict(),
                "replicas": duration.replicas,
                "source": duration.source,
            } if duration else None,
            "currency": self.currency,
            "basis": self.basis,
            "compared": [
                {"name": name, "currency": currency, "cost": cost._asdict()}
                for name, currency, cost in self.compared
            ],
            "cut_answers": self.cut_answers,
            "missing": list(self.missing),
        }  # fmt: skip


def _tokens_json(tokens: TokenEstimate) -> dict[str, Any]:
    return {
        "counted_by": tokens.source,
        "is_exact": tokens.is_exact,
        "answers": tokens.answers,
        "requests": tokens.requests._asdict(),
        "lanes": [
            {
                "name": lane.lane.name,
                "rows": lane.rows,
                "requests": round(lane.requests),
                "prompt_per_request": round(lane.prompt, 1),
                "cached_per_request": round(lane.cached, 1),
                "completion_per_request": lane.work._asdict(),
            }
            for lane in tokens.lanes
        ],
        "not_ok": tokens.not_ok,
        "deferred": tokens.deferred,
        "cut": tokens.cut,
        "shared_prompt": tokens.shared,
        "fits_native": tokens.fits_native,
        "answers_over_limit": tokens.limited,
        "baseline_per_token": asdict(tokens.ratios) if tokens.ratios else None,
        "baseline_output": tokens.output_ratio,
    }


def _room_json(room: Room) -> dict[str, Any]:
    fit = room.fit
    return {
        "fits": fit.fits,
        "starts": fit.starts,
        "lane": room.lane.name,
        "gpu": room.gpu.name,
        "gpus_per_replica": fit.world,
        "weights_bytes_per_gpu": round(fit.weights),
        "kv_cache_bytes_per_gpu": round(fit.kv_cache),
        "kv_cache_tokens": fit.kv_tokens,
        "tokens_per_request": round(room.tokens, 1),
        "requests_held": fit.rows_held(room.tokens),
        "requests_at_once": fit.rows_at_once(room.tokens),
        "smallest_tensor_parallel": room.smallest_tensor_parallel,
    }
