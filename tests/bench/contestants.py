"""Who is measured: each answers all requests of a folder (see workloads.write), in a process of
its own, with the same model, engine options and cores.

Their seconds are from the first request's arrival at the engine to the last answer on disk (of the
bare engine: in memory; of axbatch: in a part), so that no start is in them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow.parquet as pq

from pipeline.engine.cores import usable_cores
from pipeline.model import DEMO_MODEL
from tests.bench.workloads import Body, requests, write
from tests.runs import Job

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 4096,
    "block_size": 32,  # the smallest on a CPU; 16 on a GPU
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TQDM_DISABLE": "1",
    # All cores, as axbatch has it; left alone, vLLM keeps one of them for its scheduler.
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, usable_cores())),
}
BEST_RAY_DATA: dict[str, Any] = {
    "batch_size": 64,
    "max_concurrent_batches": 16,
    "tokenize_stage": False,
    "detokenize_stage": False,
}
"""The fastest of those that `python -m tests.bench.sweep` tries."""
ROWS = 400
"""Of a whole command."""
TIMEOUT_S = 600
LOG = Path("out/bench/contestants.log")


def bodies_in(folder: Path) -> list[Body]:
    return [json.loads(text) for text in pq.read_table(folder / "in")["body"].to_pylist()]


def bare_engine(folder: Path) -> float:
    """All prompts in memory, nothing written."""
    from vllm import LLM, SamplingParams

    bodies = bodies_in(folder)
    llm = LLM(model=str(DEMO_MODEL), **ENGINE)
    params = [
        SamplingParams(temperature=0.0, max_tokens=each["max_tokens"], ignore_eos=True)
        for each in bodies
    ]
    began = time.monotonic()
    answers = llm.chat([each["messages"] for each in bodies], params, use_tqdm=False)
    seconds = time.monotonic() - began
    assert len(answers) == len(bodies)
    return seconds


def ray_data(folder: Path, **settings: Any) -> float:
    """ray.data.llm, reading Parquet and writing it."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    # Its four stages each hold a CPU and its engine a GPU, which on a CPU is but a number.
    ray.init(num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False)
    config = vLLMEngineProcessorConfig(
        model_source=str(DEMO_MODEL),
        engine_kwargs=ENGINE,
        concurrency=1,
        log_engine_metrics=False,  # else it needs the extras of Ray Serve
        **settings,
    )

    def asked(row: dict[str, Any]) -> dict[str, Any]:
        given = json.loads(row["body"])
        params = {key: given[key] for key in ("temperature", "max_tokens", "ignore_eos")}
        return {"messages": given["messages"], "sampling_params": params}

    def answered(row: dict[str, Any]) -> dict[str, Any]:
        return {"answer": row["generated_text"], "asked": row["metrics"]["arrival_time"]}

    processor = build_processor(config, preprocess=asked, postprocess=answered)
    rows = ray.data.read_parquet(str(folder / "in"))
    processor(rows).write_parquet(str(folder / "answers"))
    answers = pq.read_table(folder / "answers")
    assert len(answers) == len(bodies_in(folder))
    written = max(file.stat().st_mtime for file in (folder / "answers").iterdir())
    return written - min(answers["asked"].to_pylist())


def axbatch(folder: Path) -> float:
    job = Job(
        folder,
        task={"kind": "chat", "body": "body", "returns": "response"},
        output={"path": str(folder / "out"), "column": "answer"},
        model={"id": "demo", "engine": ENGINE},
    )
    job.not_passed = ("RAY_ADDRESS",)  # it has ENVIRONMENT, as all have
    summary = job.run()
    assert summary["job"]["statuses"]["ok"] == summary["job"]["rows"], summary["job"]
    return float(summary["seconds"])


class Contestant(NamedTuple):
    answer: Callable[..., float]
    """Answers what is in a folder; the seconds."""
    settings: dict[str, Any]


CONTESTANTS = {
    "bare engine": Contestant(bare_engine, {}),
    "ray.data.llm": Contestant(ray_data, {}),
    "ray.data.llm, best": Contestant(ray_data, BEST_RAY_DATA),
    "axbatch": Contestant(axbatch, {}),
}


class Took(NamedTuple):
    """Seconds of a whole command."""

    running: float
    rest: float
    """Start and end."""


def took(contestant: Contestant) -> Took:
    """For ROWS log-normal answers. Its output goes to LOG. Raises CalledProcessError or
    TimeoutExpired."""
    answer, settings = contestant
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as folder, LOG.open("a") as log:
        write(Path(folder), requests("log-normal", ROWS))
        command = [
            sys.executable, "-m", "tests.bench.contestants",
            answer.__name__, folder, json.dumps(settings),
        ]  # fmt: skip
        began = time.monotonic()
        with subprocess.Popen(command, stdout=log, stderr=log, env=env | ENVIRONMENT) as process:
            try:
                status = process.wait(TIMEOUT_S)
            finally:
                if process.poll() is None:
                    family = psutil.Process(process.pid)
                    for each in [*family.children(recursive=True), family]:
                        each.kill()
        whole = time.monotonic() - began
        if status:
            raise subprocess.CalledProcessError(status, command)
        running = float((Path(folder) / "seconds").read_text())
    return Took(running, whole - running)


if __name__ == "__main__":
    name, given, settings = sys.argv[1:]
    answers = {each.answer.__name__: each.answer for each in CONTESTANTS.values()}
    seconds = answers[name](Path(given), **json.loads(settings))
    Path(given, "seconds").write_text(str(seconds))
