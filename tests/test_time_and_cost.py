"""Whether the model of a plan fits, how long its run takes, and what that costs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.forecast.advice import advise
from pipeline.model import DEMO_MODEL
from pipeline.report.tables import estimate_lines
from tests.conftest import PreparedJob
from tests.forecasts import estimate

Prepare = Callable[..., PreparedJob]

AX = {
    "architectures": ["LlamaForCausalLM"], "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 8192, "intermediate_size": 21824, "max_position_embeddings": 32768,
    "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 48,
    "num_key_value_heads": 8, "vocab_size": 102400,
}  # fmt: skip
"""The shape of A.X 3.1."""


@pytest.fixture
def large_model(tmp_path: Path) -> str:
    """A folder with the sizes of A.X 3.1 and the embedded model's tokenizer; no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(AX))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, folder)
    return str(folder)


def test_fit_time_and_cost_by_the_gpu_hour(prepared: Prepare, large_model: str) -> None:
    model = {"id": large_model, "backend": "vllm", "engine": {"tensor_parallel_size": 2}}
    prices = {"prices": {"gpu_hour": 2.0}, "compare": [{"name": "x", "input": 1.0, "output": 2.0}]}
    job = prepared(["Some text in English."] * 400, model=model, accounting=prices,
                   input={"rows_per_unit": 100},
                   cluster={"accelerator": "H100", "replicas": 4})  # fmt: skip
    found = estimate(job)
    assert not found.missing and found.room and found.duration and found.cost and found.tokens
    assert found.room.fit.starts and found.room.smallest_tensor_parallel == 2
    low, mid, high = found.duration.wall
    assert 0 < low < mid < high and found.duration.source == "computed"
    assert found.duration.gpu.mid == pytest.approx(mid * 8)
    assert found.cost.mid == pytest.approx(2.0 * mid * 8 / 3600)
    [compared], ratios = found.compared, found.tokens.ratios
    assert ratios and ratios.input > 0
    expected = (
        found.tokens.prompt.mid * ratios.input + 2 * found.tokens.completion.mid * ratios.output
    )
    assert compared.cost.mid == pytest.approx(expected / 1e6, rel=1e-3)
    assert found.tokens.lanes[0].cached % 16 == 0 < found.tokens.lanes[0].cached
    alone = estimate(job.changed(model={**model, "engine": {}}, cluster={"accelerator": "H100"}))
    assert alone.room and not alone.room.fit.starts
    json.dumps(found.to_json(), allow_nan=False)


def test_a_later_lane_that_will_not_start_is_told_of(prepared: Prepare, large_model: str) -> None:
    texts = ["Some text in English."] * 40 + ["word " * 24_000]
    model = {"id": large_model, "context": "auto", "engine": {"max_model_len": 8_000}}
    job = prepared(texts, model={**model, "backend": "vllm"}, task={"overflow": "reject"},
                   cluster={"accelerator": "H100"})  # fmt: skip
    found = estimate(job)
    assert found.tokens and [lane.lane.name for lane in found.tokens.lanes] == ["native", "yarn"]
    assert found.room and found.room.lane.name == "yarn" and not found.room.fit.starts
    assert "no: on 1 H100 for lane yarn" in dict(estimate_lines(found))["model fits"]
    [line] = [line for line in advise(job.config, found) if "parallel" in line]
    assert line.startswith("`model.yarn.engine.tensor_parallel_size: 2`")


def test_cost_by_the_token(prepared: Prepare) -> None:
    prices = {"prices": {"input": 10.0, "output": 40.0, "currency": "KRW"}}
    found = estimate(prepared(["one two"] * 100, accounting=prices))
    assert found.tokens and found.cost and found.currency == "KRW"
    sums = [
        (10 * round(prompt) + 40 * round(completion)) / 1e6
        for prompt, completion in zip(found.tokens.prompt, found.tokens.completion, strict=True)
    ]
    assert found.cost == pytest.approx(sums)


def leave_run(job: PreparedJob, name: str, **facts: Any) -> None:
    """The record of a run of two GPUs a replica, in which the engines did 12,000 tokens."""
    usage = {"requests": 9, "prompt_tokens": 9_000, "cached_tokens": 0, "completion_tokens": 3_000}
    run = {"this_run": {"rows": 9, "usage": usage}, "gpus_per_replica": 2, **facts}
    path = job.path(f"_axbatch/runs/{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))


def test_rate_of_the_last_long_run(prepared: Prepare) -> None:
    job = prepared(["one two"] * 100, accounting={"prices": {"gpu_hour": 3.0}})
    leave_run(job, "1", workers=1, replicas=1, seconds=120.0)
    leave_run(job, "2", workers=1, replicas=1, seconds=5.0)  # too short to say
    found = estimate(job)
    assert found.tokens and found.duration and found.cost
    assert found.duration.source == "measured"
    tokens = found.tokens.prompt.mid + found.tokens.completion.mid
    assert found.duration.wall.mid == pytest.approx(tokens / 100)
    assert found.cost.mid == pytest.approx(3.0 * 2 * found.duration.wall.mid / 3600)


@pytest.mark.parametrize(
    ("workers", "had", "now", "times", "replicas"),
    [
        (4, 4, 2, 2.0, 2),
        (2, 2, 8, 0.25, 8),
        (7, 4, 4, 1.0, 4),                              # three took others' places
        (3, 8, {"min": 1, "max": 8}, 1.0, 3),           # there was room for no more
    ],
)  # fmt: skip
def test_the_last_rate_is_that_of_its_replicas(
    prepared: Prepare, workers: int, had: int, now: Any, times: float, replicas: int
) -> None:
    job = prepared(["one two"] * 100, input={"rows_per_unit": 10}, cluster={"replicas": now})
    leave_run(job, "1", workers=workers, replicas=had, seconds=120.0)
    found = estimate(job)
    assert found.tokens and found.duration and found.duration.replicas == replicas
    tokens = found.tokens.prompt.mid + found.tokens.completion.mid
    assert found.duration.wall.mid == pytest.approx(times * tokens / 100)
    assert found.duration.gpu.mid == pytest.approx(found.duration.wall.mid * 2 * replicas)


def test_why_there_is_no_comparison_is_said(prepared: Prepare) -> None:
    job = prepared(["one two"] * 9)

    def missing(**accounting: Any) -> str:
        [line] = estimate(job.changed(accounting=accounting)).missing
        return line

    compare = [{"name": "x", "input": 1.0, "output": 2.0}]
    assert "`accounting.baseline`" in missing(baseline=None, compare=compare)
    line = missing(baseline="/none", compare=compare)
    assert line.startswith("the comparison: accounting.baseline: /none")
    line = missing(tokenizer=str(job.folder / "nobody"))
    assert "accounting.tokenizer" in line and "model.id" not in line
