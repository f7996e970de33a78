"""The ledger's tokens are vLLM's own: for a run with a crash, cached prefixes and a retry."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from infra.demo_model.exam import held_out_sentences
from tests.runs import Job, engines_among

pytestmark = [
    pytest.mark.engine,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

ROWS = 192
NAMES = {
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:prompt_tokens_cached": "cached_tokens",
    "vllm:generation_tokens": "completion_tokens",
}
INSTRUCTIONS = "Keep every number, placeholder and tag as it is. " * 8
"""So much that requests share whole blocks of their prompts."""


def counted_by_vllm(folder: Path) -> Counter[str]:
    """Sums over all processes that ever had an engine: their files outlive them."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    sums: Counter[str] = Counter()
    for metric in registry.collect():
        if metric.name in NAMES:
            sums[NAMES[metric.name]] += sum(
                int(sample.value) for sample in metric.samples if sample.name.endswith("_total")
            )
    return sums


def test_tokens_of_a_run_with_a_crash_and_a_retry_are_those_that_vllm_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = tmp_path / "counters"
    counters.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(counters))
    task = {"kind": "translate", "text": "en", "source": "en", "target": "ko"}
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16}
    job = Job(
        tmp_path,
        task={**task, "instructions": INSTRUCTIONS},
        input={"path": str(tmp_path / "in"), "rows_per_unit": 16},
        model={"id": "demo", "engine": {**options, "disable_log_stats": False}},
        sampling={"temperature": 0.0, "max_tokens": 48},
        limits={"max_failed_fraction": 1.0},
    )
    texts = [sentence.en for sentence in held_out_sentences(ROWS)]
    job.write_input("a.parquet", pa.table({"en": texts}))
    run = job.start("run", "--json")
    run.wait_until(lambda: len(job.parts()) >= 2)
    (core,) = [engine for engine in engines_among(run.family()) if "EngineCore" in engine.name()]
    core.send_signal(signal.SIGKILL)
    assert run.wait() == 0, run.errors
    retried = job.start("retry", "--status", "rejected", "--json")
    assert retried.wait() == 0, retried.errors

    assert job.start("report").wait() == 0
    report = json.loads((job.output / "_axbatch/report.json").read_text())
    tokens, engine = report["tokens"], report["tokens"]["engine"]
    counted = counted_by_vllm(counters)
    assert {name: engine[name] for name in counted} == dict(counted)
    assert engine["cached_tokens"] > 0

    usage = pq.read_table(job.output / "a.parquet")["_usage"].to_pylist()
    for kind, name in (("prompt", "prompt_tokens"), ("completion", "completion_tokens")):
        of_rows = sum(row[name] for row in usage)
        assert tokens[kind] == of_rows
        assert engine[name] == of_rows + tokens["wasted"]["lost"][name]
    assert tokens["wasted"]["lost"]["prompt_tokens"] > 0, "the crash came too late"
    assert tokens["requests"] > ROWS, "no row was tried again"
