"""Advice: each line only where it saves something, with the key to change."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import load_task
from pipeline.accounting import Interval
from pipeline.config import JobConfig
from pipeline.forecast.advice import advise
from pipeline.forecast.capacity import ModelShape, fit_of, smallest_tensor_parallel
from pipeline.forecast.estimate import estimate_job
from pipeline.forecast.figures import Estimate, LaneWork, Room, TokenEstimate
from pipeline.forecast.gpus import GPUS
from pipeline.lanes import Lane
from pipeline.plan import Plan
from pipeline.storage import Folder

MakeJob = Callable[..., JobConfig]
MakePlan = Callable[[JobConfig], Plan]
Write = Callable[..., Path]

AX = ModelShape(48, 8192, 64, 8, 128, 21824, 102_400, 32_768)
GOOD = {"tensor_parallel_size": 2, "max_num_seqs": 1_024, "max_num_batched_tokens": 16_384}
"""Options with which A.X 3.1 on H100 leaves nothing to say for short rows."""


def on_gpus(job: JobConfig, accelerator: str = "H100", tokens: float = 420.0) -> Estimate:
    """An estimate of many rows of so many tokens, with the job's engine."""
    engine = {**job.model.engine, "max_num_seqs": job.model.max_num_seqs}
    gpu = GPUS[accelerator]
    smallest = smallest_tensor_parallel(AX, gpu, engine, tokens, 256)
    room = Room(Lane("native", job.model), gpu, fit_of(AX, gpu, engine), tokens, smallest)
    work = Interval(100.0, 120.0, 140.0)
    lane = LaneWork(Lane("native", job.model), 1_000_000, 1e6, work, tokens - 120, 16, 4_000)
    figures = TokenEstimate(
        source="a tokenizer", is_exact=True, requests=Interval(1e6, 1e6, 1e6),
        prompt=Interval(3e8, 3e8, 3e8), completion=Interval(1e8, 1.2e8, 1.4e8),
        answers="expected", lanes=(lane,), not_ok={}, deferred=0, cut={}, shared=0.1,
        fits_native=None, limited=0.0, ratios=None,
    )  # fmt: skip
    return Estimate(1_000_000, "to do", 512, 64, tokens=figures, room=room)


def with_engine(job: MakeJob, tmp_path: Path, **options: Any) -> JobConfig:
    model = {"id": "m", "backend": "vllm", "engine": {**GOOD, **options}}
    return job(tmp_path, model=model, cluster={"accelerator": "H100"})


def test_good_settings_need_no_advice(tmp_path: Path, job: MakeJob) -> None:
    config = with_engine(job, tmp_path)
    assert advise(config, on_gpus(config)) == []
    assert advise(config, Estimate(0, "to do")) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tensor_parallel_size": 4}, ["tensor_parallel_size: 2"]),
        ({"tensor_parallel_size": 1}, ["tensor_parallel_size: 2"]),
        ({"max_num_seqs": 64}, ["max_num_seqs: 896", "allows 64:"]),
        ({"max_num_batched_tokens": 2_048}, ["max_num_batched_tokens: 2048", "8,192 or more"]),
    ],
)
def test_engine_options(
    tmp_path: Path, job: MakeJob, options: dict[str, int], says: Sequence[str]
) -> None:
    config = with_engine(job, tmp_path, **options)
    [line] = advise(config, on_gpus(config))
    assert all(each in line for each in says)


def test_options_left_out_are_named_as_defaults(tmp_path: Path, job: MakeJob) -> None:
    model = {"id": "m", "backend": "vllm", "engine": {"tensor_parallel_size": 2}}
    config = job(tmp_path, model=model)
    [line] = advise(config, on_gpus(config))
    assert "`max_num_seqs` allows 256, by default" in line


def test_a_context_that_the_cache_does_not_hold(tmp_path: Path, job: MakeJob) -> None:
    config = with_engine(job, tmp_path, tensor_parallel_size=8, max_model_len=10_000_000)
    [line] = advise(config, on_gpus(config))
    assert "will not start" in line and "max_model_len" in line


def test_a_yarn_context_that_the_cache_does_not_hold(tmp_path: Path, job: MakeJob) -> None:
    config = with_engine(job, tmp_path, max_model_len=1_310_720)
    found = on_gpus(config)
    assert found.room
    room = replace(found.room, lane=Lane("yarn", config.model, factor=40.0))
    [line] = advise(config, replace(found, room=replace(room, smallest_tensor_parallel=None)))
    assert "will not start" in line and "`model.yarn.factor` may be 12.28 at most" in line
    [line] = advise(config, replace(found, room=replace(room, smallest_tensor_parallel=8)))
    assert "`model.yarn.engine.tensor_parallel_size: 8`" in line


@pytest.mark.parametrize(
    ("changes", "sampling", "says"),
    [
        ({"limited": 0.2}, {}, "20% of the answers are likely to be longer"),
        ({"limited": 0.001}, {}, None),
        ({"not_ok": {"rejected: null": 30_000}}, {}, "3% of the rows can't be done"),
        ({"not_ok": {"rejected: null": 3_000}}, {}, None),
    ],
)
def test_answers_and_limits(
    tmp_path: Path, job: MakeJob, changes: dict[str, Any], sampling: Any, says: str | None
) -> None:
    config = with_engine(job, tmp_path)
    estimate = on_gpus(config)
    assert estimate.tokens
    lines = advise(config, replace(estimate, tokens=replace(estimate.tokens, **changes)))
    assert [says in line for line in lines] == [True] if says else lines == []


def test_answers_that_were_cut_count_more_than_what_was_likely(
    tmp_path: Path, job: MakeJob
) -> None:
    config = with_engine(job, tmp_path)
    estimate = on_gpus(config)
    assert estimate.tokens
    likely = replace(estimate.tokens, limited=0.5)
    assert advise(config, replace(estimate, tokens=likely, cut_answers=0.0)) == []
    [line] = advise(config, replace(estimate, tokens=likely, cut_answers=0.04))
    assert line.startswith("4% of the answers so far ended at `sampling.max_tokens: 1024`")


@pytest.mark.parametrize("is_on", [True, False])
def test_instructions_that_are_most_of_the_work(tmp_path: Path, job: MakeJob, is_on: bool) -> None:
    config = with_engine(job, tmp_path, enable_prefix_caching=is_on)
    estimate = on_gpus(config)
    assert estimate.tokens
    lines = advise(config, replace(estimate, tokens=replace(estimate.tokens, shared=0.8)))
    assert ["enable_prefix_caching" in line for line in lines] == ([] if is_on else [True])


def test_short_rows_on_a_yarn_engine_and_repeated_ones(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["some words"] * 100})
    model = {"context": "yarn", "engine": {"max_model_len": 40_000}}

    def lines_of(config: JobConfig) -> list[str]:
        task, output = load_task(config), Folder(config.output.path)
        return advise(config, estimate_job(config, task, plan(config), output))

    repeated, yarn = lines_of(job(tmp_path, model=model))
    assert repeated.startswith("at least 99% of the rows are repeated")
    assert "`model.context: yarn`" in yarn and "100%" in yarn
    assert len(lines_of(job(tmp_path))) == 1
