"""What a job will take, before it does: tokens, room, time and money, from a sample of its rows.

Three kinds of figures, each labelled: counted on a sample (with the interval in which all rows' sum
lies nine times in ten), expected of answers that nobody has seen, and computed of GPUs that nobody
has asked. What the job has measured itself takes the place of the last two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipeline.accounting import Interval
from pipeline.config import JobConfig
from pipeline.counting import load_baseline
from pipeline.errors import JobFileError, ModelError
from pipeline.forecast.done import DoneRows, read_done
from pipeline.forecast.figures import Covers, Estimate, LaneWork, LengthSource, TokenEstimate
from pipeline.forecast.intervals import Scale, product
from pipeline.forecast.outlook import with_cost, with_time
from pipeline.forecast.sampling import (
    RowSample,
    Span,
    all_spans,
    deferring_spans,
    pending_spans,
    take_sample,
)
from pipeline.forecast.sketch import (
    CACHE_BLOCK,
    PromptTokens,
    SketchedRequest,
    SketchedRow,
    Sketcher,
    context_of,
    facts_of,
    load_tokens,
)
from pipeline.lanes import deferred_unit, first_lane, own_context, yarn_lane
from pipeline.plan import Plan
from pipeline.prices import TokenRatios
from pipeline.storage import Folder
from pipeline.task import Task, room

SECOND_TRIES = Interval(1.0, 1.01, 1.05)
"""By how much requests grow that a task makes again, as an answer was not good enough (the demo
model's translations need 2%); an echo always is."""


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
    scale = Scale(covered, rows, sample.share)
    estimate = Estimate(
        rows,
        covers,
        len(scale.rows),
        len({row.place for row in scale.rows}),
        characters=scale.total(lambda row: row.facts.characters),
        decomposed=scale.share_of(lambda row: row.facts.is_decomposed),
        duplicates=_repeated(scale),
    )
    if covers != "all" and done.total.rows:
        share = done.total.not_ok / done.total.rows
        estimate = replace(estimate, done=plan.done_rows, done_not_ok=share * plan.done_rows)
    if covers == "to do" and plan.waiting_rows:
        missing.append(f"{plan.waiting_rows:,} rows that wait for the YaRN engine: left out")
    if sketcher and scale.rows:
        tokens = _tokens(job, sketcher, scale, done, sum(span.units for span in spans))
        estimate = with_time(replace(estimate, tokens=tokens), job, output, missing)
        estimate = with_cost(estimate, job, missing)
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


def _repeated(scale: Scale) -> float:
    """Share of the rows that equal one before them; those without a text are no work anyway."""
    digests = [row.facts.digest for row in scale.rows if row.facts.characters]
    return (len(digests) - len(set(digests))) / max(1, len(scale.rows))


def _without_model(sample: RowSample) -> list[SketchedRow]:
    """What the rows alone say."""
    return [SketchedRow(place, "native", facts=facts_of(row)) for place, row in sample.rows]


def _tokens(
    job: JobConfig, sketcher: Sketcher, scale: Scale, done: DoneRows, units: int
) -> TokenEstimate:
    """`units` are the first lane's."""
    counter, expected = sketcher.tokens, sketcher.task.expected_answer

    def total(value: Callable[[SketchedRequest], float]) -> Interval:
        return scale.total(lambda row: sum(map(value, row.requests)))

    has_tries = job.model.backend != "echo" and not expected.is_unknown
    prompt = total(lambda request: request.prompt)
    if has_tries:
        prompt = product(prompt, SECOND_TRIES)
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
    if has_tries:
        completion = product(completion, SECOND_TRIES)
    requests = [request for row in scale.rows for request in row.requests]
    shared = counter.shared if len(requests) > 1 else 0
    if done.is_enough:
        answers = "measured"
        texts = total(lambda request: request.prompt - shared)  # without the instructions
        if any(expected.per_token) and texts.mid:
            if has_tries:
                texts = product(texts, SECOND_TRIES)
            completion = product(
                texts,
                done.completion_per(
                    lambda counts: counts.usage.prompt_tokens - shared * counts.usage.requests
                ),
            )
        else:
            per_row = done.completion_per(lambda counts: counts.rows)
            completion = Interval(*(scale.of * each for each in per_row))
    overflow = getattr(sketcher.task, "overflow", "cut")
    cut = scale.count(lambda row: row.is_cut)
    native = None
    if job.model.context != "native":
        own = own_context(job.model)
        native = scale.share_of(lambda row: all(_fits(r, own) for r in row.requests))
    prompts = sum(request.prompt for request in requests)
    is_cached = job.model.engine.get("enable_prefix_caching", job.model.backend == "vllm")
    cached = float(shared // CACHE_BLOCK * CACHE_BLOCK) if is_cached else 0.0
    of_done = done.total.usage
    if done.is_enough and of_done.prompt_tokens:
        cached = of_done.cached_tokens / max(1, of_done.requests)
    ratios, output_ratio = _ratios(job, counter, requests, done)
    return TokenEstimate(
        source=counter.source,
        is_exact=counter.is_exact,
        requests=total(lambda request: 1),
        prompt=prompt,
        completion=completion,
        answers=answers,
        lanes=tuple(_lanes(job, sketcher, scale, completion, cached, units)),
        not_ok=_not_ok(scale),
        deferred=scale.count(lambda row: row.is_deferred),
        cut={overflow: cut} if cut else {},
        shared=shared * len(requests) / max(1, prompts),
        fits_native=native,
        limited=sum(request.is_limited for request in requests) / max(1, len(requests)),
        ratios=ratios,
        output_ratio=output_ratio,
        is_stand_in=counter.is_stand_in,
    )


def _fits(request: SketchedRequest, context: int) -> bool:
    return request.prompt <= room(context, request.limit)


def _not_ok(scale: Scale) -> dict[str, int]:
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
    job: JobConfig,
    sketcher: Sketcher,
    scale: Scale,
    completion: Interval,
    cached: float,
    units: int,
) -> list[LaneWork]:
    of_all = sum(r.answers * r.mid for row in scale.rows for r in row.requests) * scale.factor
    lanes = []
    for name in ("native", "yarn"):
        rows = [row for row in scale.rows if row.lane == name]
        requests = [request for row in rows for request in row.requests]
        if not rows:
            continue
        lane, of_lane, in_lane = sketcher.lane, round(len(rows) * scale.factor), units
        if name != lane.name:
            longest = max(row.needs for row in rows)
            lane, in_lane = yarn_lane(job.model, longest), -(-of_lane // deferred_unit(longest))
        count = max(1, len(requests))
        mid = sum(request.answers * request.mid for request in requests) / count
        prompt = sum(request.prompt for request in requests) / count
        lanes.append(
            LaneWork(
                lane=lane,
                rows=of_lane,
                requests=len(requests) * scale.factor,
                work=Interval(*(mid * each / max(1e-9, of_all) for each in completion)),
                prompt=prompt,
                cached=min(cached, max(0.0, prompt - 1)),
                units=max(1, in_lane),
            )
        )
    return lanes
