"""Engines that die, hang or do not start, on real vLLM."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.demo_model.exam import held_out_sentences
from tests.faults.observed import Observer
from tests.faults.processors import COUNTED, POISON
from tests.runs import Job, Run, engines_among

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

ROWS = 400
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8}
"""Few sequences at once make it slow enough to be struck in the middle."""


class VllmJob(Job):
    """Translates held-out sentences in units of 16; each request is counted."""

    def __init__(self, folder: Path, texts: list[str], **engine: object) -> None:
        super().__init__(
            folder,
            model={
                "id": "demo",
                "engine": {
                    **ENGINE, "logits_processors": ["tests.faults.processors:Counter"], **engine,
                },
            },
            input={"path": str(folder / "in"), "rows_per_unit": 16},
            limits={"max_failed_fraction": 0.1, "max_engine_silence_s": 15},
            sampling={"temperature": 0.0, "max_tokens": 256},
        )  # fmt: skip
        self.counted = folder / "requests"
        self.counted.touch()
        self.write_input("a.parquet", pa.table({"id": range(len(texts)), "en": texts}))

    def requests(self) -> int:
        return self.counted.stat().st_size

    def wait_for_request(self, run: Run) -> float:
        """Seconds until an engine begins one more."""
        began, before = time.monotonic(), self.requests()
        while self.requests() == before:
            run.check_lives()
            time.sleep(0.02)  # the file is all that tells
        return time.monotonic() - began

    def rows(self) -> list[dict[str, object]]:
        return list(pq.read_table(self.output / "a.parquet").to_pylist())


@pytest.fixture
def vllm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VllmJob]:
    monkeypatch.setenv(COUNTED, str(tmp_path / "requests"))

    def make(texts: list[str], **engine: object) -> VllmJob:
        return VllmJob(tmp_path, texts, **engine)

    return make


def sentences(count: int) -> list[str]:
    return [sentence.en for sentence in held_out_sentences(count)]


def engine_process(run: Run, name: str) -> psutil.Process:
    """One of vLLM's processes."""
    return next(p for p in engines_among(run.family()) if name in p.name() + "".join(p.cmdline()))


KILLS: dict[str, Callable[[Run], None]] = {
    "kill -9 of EngineCore": lambda run: engine_process(run, "EngineCore").kill(),
    "kill -9 of a vLLM worker": lambda run: engine_process(run, "Worker").kill(),
    "kill -9 of the Ray actor": lambda run: run.worker().kill(),
}


@pytest.mark.parametrize("injected", KILLS)
def test_replica_is_killed(
    vllm_job: Callable[..., VllmJob], observe: Observer, injected: str
) -> None:
    job = vllm_job(sentences(ROWS))
    run = job.start("run")
    run.wait_for_rows(96)
    engines = engines_among(run.family())
    KILLS[injected](run)
    seconds = replaced(job, run)
    assert not psutil.wait_procs(engines, timeout=60)[1], "a process of the dead engine is left"
    assert run.wait() == 0, run.errors
    see(job, observe, injected, "another engine does its units", seconds, [run])


def replaced(job: VllmJob, run: Run) -> float:
    """Seconds until there is another engine, and it begins a request."""
    began, before = time.monotonic(), {p.pid for p in engines_among(run.family())}
    while not {p.pid for p in engines_among(run.family())} - before:
        run.check_lives()
        time.sleep(0.1)  # processes do not announce themselves
    job.wait_for_request(run)
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130)]
)
def test_driver_is_ended(
    vllm_job: Callable[..., VllmJob], observe: Observer, number: signal.Signals, exit_code: int
) -> None:
    job = vllm_job(sentences(ROWS))
    run = job.start("run")
    run.wait_for_rows(96)
    engines = engines_among(run.family())
    run.signal(number)
    assert run.wait() == exit_code
    assert not psutil.wait_procs(engines, timeout=60)[1], "a process of the engine is left"
    again = job.start("run")
    seconds = job.wait_for_request(again)
    assert again.wait() == 0, again.errors
    promised = "the same command goes on" + ", nothing begun is lost" * (number == signal.SIGTERM)
    see(job, observe, f"{number.name} to the driver", promised, seconds, [run, again])


def see(
    job: VllmJob,
    observe: Observer,
    injected: str,
    promised: str,
    recovered_s: float | None,
    runs: list[Run],
    rows: int = ROWS,
) -> None:
    """Prove the output, and note what was seen."""
    assert job.verify()["rows"] == rows
    assert not engines_among(psutil.Process().children(recursive=True))
    said = [run.errors.partition("\n")[0].removeprefix("axbatch: ") for run in runs if run.wait()]
    observe(
        injected,
        promised,
        given=range(rows),
        made=[row["id"] for row in job.rows()],
        redone=job.requests() - rows,
        recovered_s=recovered_s,
        exits=[run.wait() for run in runs],
        said=re.sub(r"/\S*/", "", said[0]) if said else "",
    )


@pytest.mark.parametrize(
    ("fault", "injected"),
    [("Killer", "a row that kills every engine"), ("Hanger", "a row that hangs every engine")],
)
def test_row_that_always_strikes_down_its_engine_fails_alone(
    vllm_job: Callable[..., VllmJob], observe: Observer, fault: str, injected: str
) -> None:
    texts = sentences(96)
    texts[40] = f"Your order {POISON} has been shipped."
    processors = [f"tests.faults.processors:{name}" for name in ("Counter", fault)]
    job = vllm_job(texts, logits_processors=processors, max_num_seqs=64)

    run = job.start("run", "--set", "input.rows_per_unit=32")
    assert run.wait(1100) == 0, run.errors

    rows = job.rows()
    assert (rows[40]["_status"], rows[40]["_reason"]) == ("failed", "engine_crash")
    others = [str(row["_reason"]) for number, row in enumerate(rows) if number != 40]
    assert not [reason for reason in others if "engine" in reason]
    assert job.verify()["statuses"]["failed"] == 1
    [log] = job.output.glob("_axbatch/logs/*.log")
    engines = log.read_text().count("Initializing a V1 LLM engine")
    assert 2 <= engines <= 5
    promised = f"it alone is failed: engine_crash ({engines} engines were started)"
    see(job, observe, injected, promised, None, [run], rows=96)


@pytest.mark.parametrize(
    ("option", "exit_code", "reason"),
    [
        ({"max_model_len": 1_000_000}, 2, "max_model_len (1000000) is greater"),
        ({"kv_cache_memory_bytes": 100_000}, 1, "No available memory for the cache"),
    ],
    ids=["refused option", "no memory"],
)
def test_engine_that_cannot_start_says_why(
    vllm_job: Callable[..., VllmJob],
    observe: Observer,
    option: dict[str, int],
    exit_code: int,
    reason: str,
) -> None:
    job = vllm_job(sentences(32))
    [(name, value)] = option.items()
    run = job.start("run", "--set", f"model.engine.{name}={value}")
    assert run.wait() == exit_code, run.errors
    assert reason in run.errors
    assert "Traceback" not in run.errors
    assert len(run.errors.splitlines()) == 2
    again = job.start("run")
    assert again.wait() == 0, again.errors
    promised = "the run ends with the engine's own reason"
    see(job, observe, f"engine option {name}: {value}", promised, None, [run, again], rows=32)


def test_tiny_kv_cache(vllm_job: Callable[..., VllmJob], observe: Observer) -> None:
    """Room for some of the eight rows that are computed at once: vLLM puts some back."""
    job = vllm_job(sentences(96), max_model_len=512, kv_cache_memory_bytes=5_000_000)
    run = job.start("run")
    assert run.wait() == 0, run.errors
    see(job, observe, "a KV cache for few rows", "it is slower, no more", None, [run], rows=96)
