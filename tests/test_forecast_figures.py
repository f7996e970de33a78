"""Single figures of a plan: each is of what it says, and of the engine that will run."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import load_task
from pipeline.accounting import Interval
from pipeline.config import JobConfig
from pipeline.errors import ModelError
from pipeline.forecast import estimate as estimates
from pipeline.forecast.advice import advise
from pipeline.forecast.estimate import estimate_job
from pipeline.forecast.figures import Estimate
from pipeline.forecast.sketch import load_tokens
from pipeline.lanes import deferred_unit
from pipeline.model import DEMO_MODEL
from pipeline.plan import Plan
from pipeline.records import Output
from pipeline.storage import Folder

MakeJob = Callable[..., JobConfig]
MakePlan = Callable[[JobConfig], Plan]
Write = Callable[..., Path]
Estimates = Callable[[JobConfig], Estimate]


@pytest.fixture
def estimate(plan: MakePlan) -> Estimates:
    def of(job: JobConfig) -> Estimate:
        return estimate_job(job, load_task(job), plan(job), Folder(job.output.path))

    return of


TEXT = "Some text in English."


@pytest.mark.parametrize(
    ("rows", "replicas"),
    [(100, 1), (256, 1), (257, 2), (2_000, 4)],
)
def test_no_more_replicas_compute_than_there_are_units(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates, rows: int,
    replicas: int,
) -> None:  # fmt: skip
    write_parquet(tmp_path / "in/a.parquet", {"text": [TEXT] * rows})
    model = {"id": "demo", "backend": "vllm"}
    alone, many = (
        estimate(job(tmp_path, model=model, cluster={"accelerator": "H100", "replicas": most}))
        for most in (1, 4)
    )
    assert alone.duration and many.duration and many.duration.source == "computed"
    assert many.duration.replicas == replicas
    assert many.duration.wall.mid == pytest.approx(alone.duration.wall.mid / replicas)
    assert many.duration.gpu == alone.duration.gpu


def test_units_are_those_of_each_lane(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    texts = [TEXT] * 380 + ["word " * 3_000] * 20
    write_parquet(tmp_path / "in/a.parquet", {"text": texts})
    model = {"context": "auto", "engine": {"max_model_len": 2_048}}
    config = job(tmp_path, model=model, task={"overflow": "reject"}, input={"rows_per_unit": 100})
    found = estimate(config)
    assert found.tokens
    longest = found.tokens.lanes[1].lane.model.engine["max_model_len"]
    expected = [("native", 4), ("yarn", math.ceil(20 / deferred_unit(longest)))]
    assert [(lane.lane.name, lane.units) for lane in found.tokens.lanes] == expected


def test_the_last_rate_is_not_that_of_replicas_without_a_unit(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["one two"] * 300})
    folder = tmp_path / "out/_axbatch/runs"
    folder.mkdir(parents=True)
    usage = {"requests": 9, "prompt_tokens": 9_000, "cached_tokens": 0, "completion_tokens": 3_000}
    run = {"this_run": {"rows": 9, "usage": usage}, "workers": 8, "replicas": 8, "seconds": 120.0}
    (folder / "1.json").write_text(json.dumps(run))
    found = estimate(job(tmp_path, cluster={"replicas": 8}))
    assert found.tokens and found.duration and found.duration.replicas == 2
    tokens = found.tokens.prompt.mid + found.tokens.completion.mid
    assert found.duration.wall.mid == pytest.approx(8 / 2 * tokens / 100)


def test_second_tries_are_answered_too(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write_parquet(tmp_path / "in/a.parquet", {"text": [TEXT] * 50})
    config = job(tmp_path, model={"id": "demo", "backend": "vllm"})
    tried = estimate(config).tokens
    monkeypatch.setattr(estimates, "SECOND_TRIES", Interval(1.0, 1.0, 1.0))
    once = estimate(config).tokens
    assert tried and once
    for figure in ("prompt", "completion"):
        assert getattr(tried, figure).mid == pytest.approx(1.01 * getattr(once, figure).mid)


@pytest.mark.parametrize("is_bad_now", [True, False])
def test_a_limit_on_all_rows_is_compared_with_all_rows(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Any,
    estimate: Estimates, is_bad_now: bool,
) -> None:  # fmt: skip
    """Of 1,000 rows 900 are done. Either a tenth of the rest can't be, which is 1% of all; or a
    tenth of those that are done could not be."""
    bad = [None if n % 10 == 0 and (n >= 900) == is_bad_now else TEXT for n in range(1_000)]
    write_parquet(tmp_path / "in/a.parquet", {"text": bad})
    config = job(tmp_path, input={"rows_per_unit": 100}, limits={"max_failed_fraction": 0.02})
    made = plan(config)
    shard = made.shards[0]
    for unit in list(shard.units())[:9]:
        outputs = [Output(None, "rejected", "null") if bad[row] is None else Output("x")
                   for row in range(unit.start, unit.stop)]  # fmt: skip
        commit(Folder(config.output.path), unit, made.identity, shard.shard.fingerprint, outputs)
    lines = [line for line in advise(config, estimate(config)) if "max_failed_fraction" in line]
    if is_bad_now:
        assert not lines
    else:
        [line] = lines
        assert line.startswith("about 9% of the rows can't be done")


# --- the engine's own tokenizer ---------------------------------------------------------------

SHOUT = "{% for m in messages %}!!!!{{ m.content }}{% endfor %}"


def with_engine(job: MakeJob, folder: Path, **engine: str) -> JobConfig:
    return job(folder, model={"id": "demo", "backend": "vllm", "engine": engine})


@pytest.mark.parametrize("is_file", [True, False])
def test_prompts_are_counted_with_the_engines_chat_template(
    tmp_path: Path, job: MakeJob, is_file: bool
) -> None:
    template = tmp_path / "shout.jinja"
    template.write_text(SHOUT)
    given = str(template) if is_file else SHOUT
    tokens = load_tokens(with_engine(job, tmp_path, chat_template=given))
    body = {"messages": [{"role": "user", "content": TEXT}]}
    assert tokens.of(body) == tokens.count(f"!!!!{TEXT}")
    assert tokens.of(body) != load_tokens(with_engine(job, tmp_path)).of(body)


def test_a_chat_template_that_is_not_there_is_named(
    tmp_path: Path, job: MakeJob, write_parquet: Write, estimate: Estimates
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": [TEXT]})
    config = with_engine(job, tmp_path, chat_template=str(tmp_path / "nowhere.jinja"))
    with pytest.raises(ModelError, match=r"^model\.engine\.chat_template: .*nowhere\.jinja"):
        load_tokens(config)
    [line] = estimate(config).missing
    assert "model.engine.chat_template" in line


def test_prompts_are_counted_with_the_engines_tokenizer(tmp_path: Path, job: MakeJob) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, other)
    (other / "chat_template.jinja").write_text(SHOUT)
    tokens = load_tokens(with_engine(job, tmp_path, tokenizer=str(other)))
    body = {"messages": [{"role": "user", "content": TEXT}]}
    assert tokens.of(body) == tokens.count(f"!!!!{TEXT}") and str(other) in tokens.source
