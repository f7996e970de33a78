"""make bench: the plumbing alone (echo, no cost), rows/s and peak memory of driver and worker.

A job of 200,000 rows in 40 files, three times; prints a line per run and the median.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pyarrow as pa

from tests.runs import Job, Run

FILES, ROWS_PER_FILE, REPEATS = 40, 5_000, 3
WATCH_INTERVAL_S = 0.2


def make_job(folder: Path) -> Job:
    """Rows of 5 to 40 words each, in files of equal size."""
    folder.mkdir()
    job = Job(folder, model={"id": "echo", "backend": "echo"})
    random.seed(1)
    for file in range(FILES):
        texts = [f"row {row} " + "word " * random.randint(5, 40) for row in range(ROWS_PER_FILE)]
        job.write_input(f"{file:02d}.parquet", pa.table({"id": range(ROWS_PER_FILE), "en": texts}))
    return job


def peak_memory(run: Run, done: threading.Event) -> dict[str, int]:
    """Largest resident size, in MB, of the driver and of any worker, until `done`."""
    peaks = {"driver": 0, "worker": 0}
    while not done.wait(WATCH_INTERVAL_S):
        for index, process in enumerate(run.family()):
            try:
                role = "driver" if index == 0 else "worker"
                if index and "MapWorker" not in " ".join(process.cmdline()):
                    continue
                peaks[role] = max(peaks[role], process.memory_info().rss >> 20)
            except psutil.NoSuchProcess:
                continue
    return peaks


def measure(folder: Path) -> float:
    job, done, peaks = make_job(folder), threading.Event(), {}
    run = job.start("run", "--json")
    watcher = threading.Thread(target=lambda: peaks.update(peak_memory(run, done)))
    watcher.start()
    code = run.wait()
    done.set()
    watcher.join()
    if code:
        sys.exit(f"exit {code}: {run.errors}")
    summary = json.loads(run.printed)
    rate = summary["this_run"]["rows"] / summary["seconds"]
    print(
        f"{rate:,.0f} rows/s, {summary['wall_seconds']:.1f} s with starting; "
        f"peak memory: driver {peaks['driver']} MB, worker {peaks['worker']} MB",
        flush=True,
    )
    return rate


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as root:
        rates = [measure(Path(root) / str(repeat)) for repeat in range(REPEATS)]
    print(f"median {statistics.median(rates):,.0f} rows/s")
