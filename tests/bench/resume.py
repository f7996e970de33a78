"""What resuming costs: the same number of finished files, with few rows and with many.

    python -m tests.bench.resume [--files 1000] [--rows 10 10000]

For each number of rows per file: seconds and peak memory of `axbatch run` once all is done, the
median of five. Input and output are made here, not computed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from pipeline.accounting import Usage
from pipeline.merging import publish
from pipeline.parts import Stamp, commit_part, result_fields, result_table
from pipeline.plan import Plan
from pipeline.records import Counts, Output
from pipeline.storage import Folder
from tests.conftest import make_job, make_plan_of, write_table
from tests.runs import Job

TIMES = 5


def make_done(folder: Path, files: int, rows: int) -> Job:
    """A job whose files are all published."""
    job = Job(folder, model={"id": "echo", "backend": "echo"})
    texts = [f"row {row}" for row in range(rows)]
    first = write_table(folder / "in/00000.parquet", {"en": texts})
    for number in range(1, files):
        (folder / f"in/{number:05}.parquet").hardlink_to(first)
    config = make_job(folder, task={"text": "en"}, input={"path": str(folder / "in")})
    plan: Plan = make_plan_of(config)
    output = Folder(config.output.path)
    outputs = [Output(text, usage=Usage(1, 2, 0, 2)) for text in texts]
    results, counts = result_table(outputs, "ko", pa.string()), Counts()
    counts.count(*outputs)
    for planned in plan.shards:
        shard = planned.shard
        stamp = Stamp(plan.identity, shard.name, shard.fingerprint, 0, rows, Counts(), "made")
        commit_part(output, replace(stamp, shard=planned.key, counts=counts), results)
        publish(
            shard.source, shard.path, output, stamp, planned.key,
            result_fields("ko", pa.string()), shard.check_unchanged,
        )  # fmt: skip
    return job


def measure(job: Job) -> tuple[float, float]:
    """Seconds and peak MB of one run that has nothing to do."""
    command = [sys.executable, "-m", "pipeline.cli", "run", str(job.file)]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return time.monotonic() - began, usage.ru_maxrss / 1024


def measure_all(files: int, rows_per_file: list[int]) -> dict[int, tuple[float, float]]:
    """By rows per file the median seconds and MB, measured in turn on the same machine."""
    with tempfile.TemporaryDirectory() as name:
        jobs = {}
        for rows in rows_per_file:
            folder = Path(name) / str(rows)
            folder.mkdir()
            jobs[rows] = make_done(folder, files, rows)
        measured: dict[int, list[tuple[float, float]]] = {rows: [] for rows in jobs}
        for _ in range(TIMES):
            for rows, job in jobs.items():
                measured[rows].append(measure(job))
    return {
        rows: (statistics.median(s for s, _ in figures), statistics.median(mb for _, mb in figures))
        for rows, figures in measured.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 10_000])
    options = parser.parse_args()
    for rows, (seconds, mb) in measure_all(options.files, options.rows).items():
        print(f"{options.files * rows:>12,} rows: {seconds:.2f} s, {mb:.0f} MB")


if __name__ == "__main__":
    main()
