"""Whether the model fits, and what time and money an estimate's tokens come to."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from pipeline.accounting import Interval, Usage
from pipeline.config import JobConfig
from pipeline.errors import ModelError
from pipeline.forecast.capacity import ModelShape, fit_of, floor, smallest_tensor_parallel
from pipeline.forecast.figures import ComparedCost, Duration, Estimate, LaneWork, Room
from pipeline.forecast.gpus import GPUS
from pipeline.forecast.intervals import NOTHING
from pipeline.lanes import Lane
from pipeline.model import read_config
from pipeline.prices import basis_of, compared_cost, cost_of
from pipeline.storage import Folder

ENOUGH_SECONDS = 60.0
"""Of a run, so that its rate says more than arithmetic."""
ENOUGH_RUNS = 8
"""Records that are looked at, from the last on."""
ROWS_ENOUGH = 256
"""Requests at once that keep a GPU busy: below about 295 tokens in a step, an H100 waits for
weights (bf16, data sheet)."""


def with_time(estimate: Estimate, job: JobConfig, output: Folder, missing: list[str]) -> Estimate:
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
    lanes, is_unknown = estimate.tokens.lanes, estimate.tokens.answers == "unknown"

    def tokens_of(work: LaneWork) -> float:
        _, likely, most = work.works()
        return (most if is_unknown else likely).tokens

    def smallest(work: LaneWork, rows: int) -> int | None:
        rows = min(work.lane.model.max_num_seqs, rows)
        return smallest_tensor_parallel(shape, gpu, _engine(work.lane), tokens_of(work), rows)

    def for_all(rows: int) -> int | None:
        found = [tensor for work in lanes if (tensor := smallest(work, rows))]
        return max(found) if len(found) == len(lanes) else None

    enough = for_all(ROWS_ENOUGH)
    fits = [fit_of(shape, gpu, _engine(work.lane)) for work in lanes]
    shown = next((at for at, fit in enumerate(fits) if not fit.starts), 0)
    if not fits[shown].starts:
        enough = enough or for_all(1)
    return Room(lanes[shown].lane, gpu, fits[shown], tokens_of(lanes[shown]), enough)


def _computed(estimate: Estimate, job: JobConfig, shape: ModelShape) -> Duration | None:
    """None if no request fits."""
    assert estimate.tokens is not None and job.cluster.accelerator is not None
    gpu = GPUS[job.cluster.accelerator]
    seconds, of_gpus = [0.0] * 3, [0.0] * 3
    replicas = [min(job.cluster.range.max, lane.units) for lane in estimate.tokens.lanes]
    for lane, of_lane in zip(estimate.tokens.lanes, replicas, strict=True):
        fewest, likely, most = (
            floor(shape, gpu, _engine(lane.lane), work) for work in lane.works()
        )
        for end, each in enumerate((fewest.best, likely.realistic, most.realistic)):
            seconds[end] += lane.requests * each / of_lane
            of_gpus[end] += lane.requests * each * lane.lane.model.world_size
    if not all(map(math.isfinite, seconds)):
        return None
    return Duration(Interval(*seconds), Interval(*of_gpus), max(replicas), "computed")


def _measured(estimate: Estimate, job: JobConfig, output: Folder) -> Duration | None:
    """At each replica's rate, in tokens, in the last run that computed for ENOUGH_SECONDS."""
    assert estimate.tokens is not None
    records = [e.path for e in output.list("_axbatch/runs") if e.path.endswith(".json")]
    for path in records[: -ENOUGH_RUNS - 1 : -1]:
        record = json.loads(output.read(path))
        usage = record["this_run"]["usage"]
        tokens = usage["prompt_tokens"] + usage["completion_tokens"]
        gpus = record.get("gpus_per_replica", 0)
        if job.model.backend == "vllm" and gpus not in (0, job.model.world_size):
            continue  # a replica was another thing then
        if record["seconds"] >= ENOUGH_SECONDS and tokens:
            # Among its workers are those that took others' places.
            had = max(1, min(record["workers"], record["replicas"]))
            replicas = max(job.cluster.range.min, min(had, job.cluster.range.max))
            replicas = min(replicas, max(lane.units for lane in estimate.tokens.lanes))
            pace = record["seconds"] / tokens * had / replicas
            pairs = zip(estimate.tokens.prompt, estimate.tokens.completion, strict=True)
            wall = Interval(*(pace * (prompt + completion) for prompt, completion in pairs))
            gpu = Interval(*(replicas * gpus * each for each in wall))
            return Duration(wall, gpu, replicas, "measured")
    return None


def with_cost(estimate: Estimate, job: JobConfig, missing: list[str]) -> Estimate:
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
        if job.accounting.compare and job.accounting.baseline is None:
            missing.append("the comparison: it needs `accounting.baseline`")
        elif job.accounting.compare and tokens.is_stand_in:
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
