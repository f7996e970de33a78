"""What a job will take, before it does: tokens, room, time and money, from a sample of its rows.

Three kinds of figures, each labelled: counted on a sample (with the interval in which all rows' sum
lies nine times in ten), expected of answers that nobody has seen, and computed of GPUs that nobody
has asked. What the job has measured itself takes the place of the last two.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from pipeline.accounting import Z90, Interval, Usage
from pipeline.capacity import (
    GPUS,
    Fit,
    Gpu,
    ModelShape,
    Work,
    fit_of,
    floor,
    smallest_tensor_parallel,
)
from pipeline.config import JobConfig
from pipeline.counting import load_baseline
from pipeline.errors import JobFileError, ModelError, NoSuchFileError
from pipeline.lanes import Lane, first_lane, own_context, yarn_lane
from pipeline.model import read_config
from pipeline.parts import PARTS, part_path, parts_among, read_stamp
from pipeline.plan import Plan
from pipeline.prices import TokenRatios, basis_of, compared_cost, cost_of
from pipeline.records import Counts
from pipeline.sampling import (
    PLACES,
    THREADS,
    RowSample,
    Span,
    all_spans,
    deferring_spans,
    pending_spans,
    take_sample,
)
from pipeline.sketch import (
    CACHE_BLOCK,
    PromptTokens,
    SketchedRequest,
    SketchedRow,
    Sketcher,
    context_of,
    facts_of,
    load_tokens,
)
from pipeline.storage import Folder
from pipeline.task import Task, room

ENOUGH_ROWS = 200
"""Done ones that say more of answers than any expectation."""
ENOUGH_SECONDS = 60.0
"""Of a run, so that its rate says more than arithmetic."""
ENOUGH_RUNS = 8
"""Records that are looked at, from the last on."""
ROWS_ENOUGH = 256
"""Requests at once that keep a GPU busy: below about 295 tokens in a step, an H100 waits for
weights (bf16, data sheet)."""

SECOND_TRIES = Interval(1.0, 1.01, 1.05)
"""By how much requests grow that a task makes again, as an answer was not good enough (the demo
model's translations need 2%); an echo always is."""

NOTHING = Interval(0.0, 0.0, 0.0)

Covers = Literal["to do", "waiting", "all"]
LengthSource = Literal["measured", "expected", "unknown"]


@dataclass(frozen=True)
class DoneRows:
    """What is known of a few of the job's committed units and files, or of all."""

    counts: Sequence[Counts]

    @property
    def total(self) -> Counts:
        total = Counts()
        for each in self.counts:
            total.add(each)
        return total

    @property
    def is_enough(self) -> bool:
        return self.total.statuses["ok"] >= ENOUGH_ROWS

    def completion_per(self, size: Callable[[Counts], float]) -> Interval:
        """Completion tokens for each of what `size` counts. The interval is that of a sample of
        units: of rows like these, that is, and not of others that are still to come."""
        pairs = [(size(each), each.usage.completion_tokens) for each in self.counts]
        whole = sum(pair[0] for pair in pairs)
        ratio = sum(pair[1] for pair in pairs) / max(1.0, whole)
        return Interval.around(ratio, _deviation(pairs, ratio) / max(1.0, whole))


def read_done(plan: Plan, output: Folder) -> DoneRows:
    """From published files' stamps, which the plan has, and from the footers of PLACES parts."""
    counts = [plan.untouched] if plan.untouched.rows else []
    counts += [s.published.counts for s in plan.shards if s.published]
    committed = parts_among(output.list(PARTS))
    units = [unit for s in plan.unpublished for unit in committed.get(s.key, [])]
    some = units[:: max(1, len(units) // PLACES)][:PLACES]

    def counts_of(path: str) -> Counts:
        try:
            stamp = read_stamp(output, path)
        except NoSuchFileError:
            return Counts()  # published, and dropped, while we looked
        return stamp.counts if stamp else Counts()

    with ThreadPoolExecutor(THREADS) as pool:
        counts += pool.map(counts_of, map(part_path, some))
    return DoneRows([each for each in counts if each.rows])


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


@dataclass(frozen=True)
class Room:
    """How the first lane's engine fills its GPUs."""

    gpu: Gpu
    fit: Fit
    tokens: float
    """Of a request, prompt and answer, at most that is likely."""
    smallest_tensor_parallel: int | None
    """With which every lane's engine starts, and holds enough of its requests at once."""


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


def estimate_job(job: JobConfig, task: Task, plan: Plan, output: Folder) -> Estimate:
    """From a sample of the rows that are to do; of all, if none is. What can't be had is named in
    `missing`. Reads about PLACES small pieces of the input, and writes nothing.

    Raises InputError, StorageError.
    """
    spans, rows, covers = _frame(plan)
    if not rows:
        return Estimate(0, covers)
    done = read_done(plan, output)
    sample = take_sample(spans, task.columns)
    missing: list[str] = []
    sketched = sketcher = None
    try:
        sketcher = _sketcher(job, task, missing)
        sketched = sketcher.rows(sample)
    except (ModelError, JobFileError) as error:
        missing.append(f"tokens, time and cost: {error.args[0]}")
    facts = _without_model(sample) if sketched is None else sketched
    covered = facts
    if covers == "waiting" and sketched is not None:
        covered = [row for row in facts if row.is_deferred]
    scale = _Scale(covered, rows, sample.share)
    estimate = Estimate(
        rows,
        covers,
        len(scale.rows),
        len({row.place for row in scale.rows}),
        scale.total(lambda row: row.facts.characters),
        scale.share_of(lambda row: row.facts.is_decomposed),
        1 - len({row.facts.digest for row in scale.rows}) / max(1, len(scale.rows)),
    )
    if covers == "to do" and plan.waiting_rows:
        missing.append(f"{plan.waiting_rows:,} rows that wait for the YaRN engine: left out")
    if sketcher and scale.rows:
        tokens = _tokens(job, sketcher, scale, done)
        estimate = _with_time(replace(estimate, tokens=tokens), job, output, missing)
        estimate = _with_cost(estimate, job, missing)
    if done.is_enough:
        total = done.total
        share = total.account.cut.requests / max(1, total.usage.requests)
        estimate = replace(estimate, cut_answers=share)
    return replace(estimate, missing=tuple(missing))


def _frame(plan: Plan) -> tuple[Sequence[Span], int, Covers]:
    """Of which rows the sample is taken, for how many it stands, and which these are."""
    if plan.pending_rows:
        return pending_spans(plan), plan.pending_rows, "to do"
    if plan.waiting_rows:
        return deferring_spans(plan), plan.waiting_rows, "waiting"
    return all_spans(plan), plan.rows, "all"


def _sketcher(job: JobConfig, task: Task, missing: list[str]) -> Sketcher:
    lane = first_lane(job.model)
    baseline = None
    if job.accounting.baseline is not None:
        try:
            baseline = load_baseline(job.accounting.baseline)
        except JobFileError as error:
            missing.append(f"the comparison: {error.args[0]}")
    context = context_of(lane.model)
    return Sketcher(task, job.sampling.body(), load_tokens(job), baseline, lane, context)


def _without_model(sample: RowSample) -> list[SketchedRow]:
    """What the rows alone say."""
    return [SketchedRow(place, "native", facts=facts_of(row)) for place, row in sample.rows]


@dataclass(frozen=True)
class _Scale:
    """From the sample to all rows."""

    rows: Sequence[SketchedRow]
    of: int
    share: float
    """Of all rows, in the sample."""

    @property
    def factor(self) -> float:
        return self.of / max(1, len(self.rows))

    def total(self, value: Callable[[SketchedRow], float]) -> Interval:
        """Of all rows: the mean of those in the sample, times their number. Its variance is that
        between neighbouring places: rows beside each other are alike, and what files differ in
        is no matter, as each has its share of the places (Wolter, Introduction to Variance
        Estimation, ch. 8: systematic samples, successive differences)."""
        rows, values = Counter[int](), Counter[int]()
        total = 0.0
        for row in self.rows:
            rows[row.place] += 1
            values[row.place] += value(row)  # type: ignore[assignment]
            total += value(row)
        mean = total / max(1, len(self.rows))
        pairs = [(rows[place], values[place]) for place in rows]
        deviation = _deviation_between(pairs, mean) * math.sqrt(max(0.0, 1 - self.share))
        return Interval.around(mean * self.of, self.factor * deviation)

    def share_of(self, is_so: Callable[[SketchedRow], bool]) -> float:
        return sum(map(is_so, self.rows)) / max(1, len(self.rows))

    def count(self, is_so: Callable[[SketchedRow], bool]) -> int:
        """Rows; one at least where any is so."""
        return math.ceil(self.share_of(is_so) * self.of - 1e-6)


def _deviation(pairs: Sequence[tuple[float, float]], ratio: float) -> float:
    """Standard deviation of the sum of a sample's values: pairs of a member's size and value, whose
    sums have this ratio."""
    free = len(pairs) - 1
    if free < 1:
        return 0.0
    rest = sum((value - ratio * size) ** 2 for size, value in pairs)
    return math.sqrt(rest * (free + 1) / free) * _student(free)


def _deviation_between(pairs: Sequence[tuple[float, float]], ratio: float) -> float:
    """The same from what each differs in from the one before it."""
    free = len(pairs) - 1
    if free < 1:
        return 0.0
    rests = [value - ratio * size for size, value in pairs]
    rest = sum((after - before) ** 2 for before, after in pairwise(rests)) / 2
    # Differences that share a member are not independent: two for three, about.
    return math.sqrt(rest * (free + 1) / free) * _student(2 * free / 3)


def _student(free: float) -> float:
    """By how much Student's 90% are wider than Z90, with so many degrees of freedom (the first
    term of Cornish and Fisher's expansion)."""
    return 1 + (Z90**2 + 1) / (4 * free)


def _product(one: Interval, other: Interval) -> Interval:
    """Of two estimates that err independently."""
    if not one.mid or not other.mid:
        return NOTHING
    mid = one.mid * other.mid
    down, up = (math.hypot(one[end] / one.mid - 1, other[end] / other.mid - 1) for end in (0, 2))
    return Interval(max(0.0, mid * (1 - down)), mid, mid * (1 + up))


def _tokens(job: JobConfig, sketcher: Sketcher, scale: _Scale, done: DoneRows) -> TokenEstimate:
    counter, expected = sketcher.tokens, sketcher.task.expected_answer

    def total(value: Callable[[SketchedRequest], float]) -> Interval:
        return scale.total(lambda row: sum(map(value, row.requests)))

    prompt = total(lambda request: request.prompt)
    if job.model.backend != "echo" and not expected.is_unknown:
        prompt = _product(prompt, SECOND_TRIES)
    low, mid, high = (
        total(lambda request, end=end: request.answers * getattr(request, end))  # type: ignore[misc]
        for end in ("low", "mid", "high")
    )
    answers: LengthSource = "unknown" if expected.is_unknown else "expected"
    completion = Interval(
        max(0.0, mid.mid - math.hypot(mid.mid - low.mid, mid.mid - mid.low)),
        mid.mid,
        mid.mid + math.hypot(high.mid - mid.mid, mid.high - mid.mid),
    )
    if done.is_enough:
        answers = "measured"
        if any(expected.per_token):
            completion = _product(
                prompt, done.completion_per(lambda counts: counts.usage.prompt_tokens)
            )
        else:
            per_row = done.completion_per(lambda counts: counts.rows)
            completion = Interval(*(scale.of * each for each in per_row))
    requests = [request for row in scale.rows for request in row.requests]
    overflow = getattr(sketcher.task, "overflow", "cut")
    cut = scale.count(lambda row: row.is_cut)
    native = None
    if job.model.context != "native":
        own = own_context(job.model)
        native = scale.share_of(lambda row: all(_fits(r, own) for r in row.requests))
    prompts = sum(request.prompt for request in requests)
    is_cached = job.model.engine.get("enable_prefix_caching", job.model.backend == "vllm")
    shared = counter.shared if len(requests) > 1 else 0
    cached = float(shared // CACHE_BLOCK * CACHE_BLOCK) if is_cached else 0.0
    of_done = done.total.usage
    if done.is_enough and of_done.prompt_tokens:
        cached = of_done.cached_tokens / of_done.prompt_tokens * prompts / max(1, len(requests))
    ratios, output_ratio = _ratios(job, counter, requests, done)
    return TokenEstimate(
        source=counter.source,
        is_exact=counter.is_exact,
        requests=total(lambda request: 1),
        prompt=prompt,
        completion=completion,
        answers=answers,
        lanes=tuple(_lanes(job, sketcher, scale, completion, cached)),
        not_ok=_not_ok(scale),
        deferred=scale.count(lambda row: row.is_deferred),
        cut={overflow: cut} if cut else {},
        shared=shared * len(requests) / max(1, prompts),
        fits_native=native,
        limited=sum(request.is_limited for request in requests) / max(1, len(requests)),
        ratios=ratios,
        output_ratio=output_ratio,
    )


def _fits(request: SketchedRequest, context: int) -> bool:
    return request.prompt <= room(context, request.limit)


def _not_ok(scale: _Scale) -> dict[str, int]:
    seen = Counter(row.not_ok for row in scale.rows if row.not_ok)
    return {
        reason: scale.count(lambda row, reason=reason: row.not_ok == reason)  # type: ignore[misc]
        for reason, _ in seen.most_common()
    }


def _ratios(
    job: JobConfig, counter: PromptTokens, requests: Sequence[SketchedRequest], done: DoneRows
) -> tuple[TokenRatios | None, LengthSource]:
    model = sum(request.model for request in requests)
    baseline = sum(request.baseline for request in requests)
    if not model or not baseline or counter.is_stand_in:
        return None, "unknown"
    of_prompts = baseline / model
    measured = TokenRatios.of(done.total.account.texts, job.output.column)
    if measured:
        return TokenRatios(of_prompts, measured.output), "measured"
    return TokenRatios(of_prompts, of_prompts), "expected"


def _lanes(
    job: JobConfig, sketcher: Sketcher, scale: _Scale, completion: Interval, cached: float
) -> list[LaneWork]:
    of_all = sum(r.answers * r.mid for row in scale.rows for r in row.requests) * scale.factor
    lanes = []
    for name in ("native", "yarn"):
        rows = [row for row in scale.rows if row.lane == name]
        requests = [request for row in rows for request in row.requests]
        if not rows:
            continue
        lane = sketcher.lane
        if name != lane.name:
            lane = yarn_lane(job.model, max(row.needs for row in rows))
        count = max(1, len(requests))
        mid = sum(request.answers * request.mid for request in requests) / count
        prompt = sum(request.prompt for request in requests) / count
        lanes.append(
            LaneWork(
                lane=lane,
                rows=round(len(rows) * scale.factor),
                requests=len(requests) * scale.factor,
                work=Interval(*(mid * each / max(1e-9, of_all) for each in completion)),
                prompt=prompt,
                cached=min(cached, max(0.0, prompt - 1)),
            )
        )
    return lanes


def _with_time(estimate: Estimate, job: JobConfig, output: Folder, missing: list[str]) -> Estimate:
    """With room and duration, as far as they can be known."""
    measured = _measured(estimate, job, output)
    estimate = replace(estimate, duration=measured)
    if job.model.backend != "vllm":
        return estimate
    if job.cluster.accelerator is None:
        if measured is None:
            known = ", ".join(GPUS)
            missing.append(f"fit and time: set `cluster.accelerator` to the GPUs' type ({known})")
        return estimate
    try:
        shape = ModelShape.from_config(read_config(job.model))
        room_of = _room(estimate, job, shape)
        computed = None if measured else _computed(estimate, job, shape)
    except ModelError as error:
        missing.append(f"fit and time: {error.args[0]}")
        return estimate
    return replace(estimate, room=room_of, duration=measured or computed)


def _engine(lane: Lane) -> dict[str, Any]:
    return {**lane.model.engine, "max_num_seqs": lane.model.max_num_seqs}


def _room(estimate: Estimate, job: JobConfig, shape: ModelShape) -> Room:
    assert estimate.tokens is not None and job.cluster.accelerator is not None
    gpu = GPUS[job.cluster.accelerator]
    is_unknown = estimate.tokens.answers == "unknown"

    def tokens_of(work: LaneWork) -> float:
        _, likely, most = work.works()
        return (most if is_unknown else likely).tokens

    def smallest(work: LaneWork) -> int | None:
        rows = min(work.lane.model.max_num_seqs, ROWS_ENOUGH)
        return smallest_tensor_parallel(shape, gpu, _engine(work.lane), tokens_of(work), rows)

    lanes = estimate.tokens.lanes
    found = [tensor for tensor in map(smallest, lanes) if tensor]
    enough = max(found) if len(found) == len(lanes) else None
    first = lanes[0]
    return Room(gpu, fit_of(shape, gpu, _engine(first.lane)), tokens_of(first), enough)


def _computed(estimate: Estimate, job: JobConfig, shape: ModelShape) -> Duration | None:
    """None if no request fits."""
    assert estimate.tokens is not None and job.cluster.accelerator is not None
    gpu = GPUS[job.cluster.accelerator]
    seconds, of_gpus = [0.0] * 3, [0.0] * 3
    for lane in estimate.tokens.lanes:
        fewest, likely, most = (
            floor(shape, gpu, _engine(lane.lane), work) for work in lane.works()
        )
        for end, each in enumerate((fewest.best, likely.realistic, most.realistic)):
            seconds[end] += lane.requests * each
            of_gpus[end] += lane.requests * each * lane.lane.model.world_size
    if not all(map(math.isfinite, seconds)):
        return None
    replicas = job.cluster.range.max
    wall = Interval(*(each / replicas for each in seconds))
    return Duration(wall, Interval(*of_gpus), replicas, "computed")


def _measured(estimate: Estimate, job: JobConfig, output: Folder) -> Duration | None:
    """At the rate, in tokens, of the last run that computed for ENOUGH_SECONDS."""
    assert estimate.tokens is not None
    records = [e.path for e in output.list("_axbatch/runs") if e.path.endswith(".json")]
    for path in records[: -ENOUGH_RUNS - 1 : -1]:
        record = json.loads(output.read(path))
        usage = record["this_run"]["usage"]
        tokens = usage["prompt_tokens"] + usage["completion_tokens"]
        if record["seconds"] >= ENOUGH_SECONDS and tokens:
            pace = record["seconds"] / tokens
            pairs = zip(estimate.tokens.prompt, estimate.tokens.completion, strict=True)
            wall = Interval(*(pace * (prompt + completion) for prompt, completion in pairs))
            replicas = max(1, min(record["workers"], job.cluster.range.max))
            gpus = replicas * record.get("gpus_per_replica", 0)
            return Duration(wall, Interval(*(gpus * each for each in wall)), replicas, "measured")
    return None


def _with_cost(estimate: Estimate, job: JobConfig, missing: list[str]) -> Estimate:
    tokens, prices = estimate.tokens, job.accounting.prices
    assert tokens is not None
    usages = [
        Usage(prompt_tokens=round(prompt), completion_tokens=round(completion))
        for prompt, completion in zip(tokens.prompt, tokens.completion, strict=True)
    ]
    gpu = estimate.duration.gpu if estimate.duration else NOTHING
    if prices is not None and (prices.gpu_hour is None or gpu.high):
        costs = [cost_of(prices, usage, gpu_s) for usage, gpu_s in zip(usages, gpu, strict=True)]
        estimate = replace(estimate, cost=Interval(*costs))
    elif prices is not None:
        missing.append("cost: its price is by the GPU-hour, and these are not known")
    if prices is not None:
        estimate = replace(estimate, currency=prices.currency, basis=basis_of(prices))
    ratios = tokens.ratios
    if ratios is None:
        if job.accounting.compare and job.accounting.baseline is not None:
            missing.append("the comparison: it needs the model's tokenizer, `accounting.tokenizer`")
        return estimate
    compared = [
        ComparedCost(
            each.name,
            each.currency,
            Interval(*(compared_cost(each, usage, ratios) for usage in usages)),
        )
        for each in job.accounting.compare
    ]
    return replace(estimate, compared=tuple(compared))


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
