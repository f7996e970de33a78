"""Everything but the model: `echo` without cost, against what else copies rows.

    axbatch            `axbatch run` with the echo engine, two replicas, parts and publishing
    Ray Data           read_parquet, a Python function per row, write_parquet
    pyarrow            one process reads and writes

And memory and time to the first committed part, by the number of rows that the job has.
"""

from __future__ import annotations

import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.runs import Job, Run

FILES, ROWS_PER_FILE = 20, 10_000
REPEATS = 5
LARGE_FILE = 100_000
MILLION = 1_000_000
WATCHED_ROWS = 300_000
"""Memory is read while so many rows are done, whatever the job's size."""
WATCH_INTERVAL_S = 0.2

RAY_DATA = """
import sys, time, ray
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
began = time.monotonic()
rows = ray.data.read_parquet(sys.argv[1]).map(lambda row: {**row, "ko": row["en"]})
rows.write_parquet(sys.argv[2])
print(time.monotonic() - began)
"""


def echo_job(folder: Path) -> Job:
    return Job(
        folder,
        model={"id": "echo", "backend": "echo"},
        cluster={"replicas": 2, "cpus_per_replica": 1},
    )


def texts(dice: random.Random, rows: int) -> list[str]:
    return [f"row {row} " + "word " * dice.randint(5, 40) for row in range(rows)]


def write_files(folder: Path, files: int, rows: int) -> int:
    """Files of one table under many names; its bytes in memory, all together."""
    table = pa.table({"id": range(rows), "en": texts(random.Random(1), rows)})
    folder.mkdir(parents=True)
    first = folder / "00000.parquet"
    pq.write_table(table, first)
    for number in range(1, files):
        (folder / f"{number:05}.parquet").hardlink_to(first)
    return table.nbytes * files


def by_axbatch(folder: Path) -> float:
    summary = echo_job(folder).run()
    seconds: float = summary["seconds"]
    return seconds


def by_ray_data(folder: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", RAY_DATA, folder / "in", folder / "out"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def by_pyarrow(folder: Path) -> float:
    (folder / "out").mkdir()
    began = time.monotonic()
    for path in sorted((folder / "in").iterdir()):
        table = pq.read_table(path)
        pq.write_table(table.append_column("ko", table["en"]), folder / "out" / path.name)
    return time.monotonic() - began


COPIERS = {"axbatch": by_axbatch, "Ray Data": by_ray_data, "pyarrow": by_pyarrow}


def rates() -> dict[str, Any]:
    """Rows/s by copier, each of REPEATS in turn, and the bytes of a row."""
    measured: dict[str, list[float]] = {name: [] for name in COPIERS}
    for _ in range(REPEATS):
        for name, copy in COPIERS.items():
            with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as root:
                size = write_files(Path(root) / "in", FILES, ROWS_PER_FILE)
                measured[name].append(FILES * ROWS_PER_FILE / copy(Path(root)))
    return {"rows_per_s": measured, "bytes_per_row": size / (FILES * ROWS_PER_FILE)}


def growth(rows: int) -> dict[str, float]:
    """Of a job of so many rows: seconds to its first part, and the largest resident size (MB) of
    driver and worker until WATCHED_ROWS are done."""
    with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as root:
        folder = Path(root)
        per_file = min(rows, LARGE_FILE)
        write_files(folder / "in", rows // per_file, per_file)
        job = echo_job(folder)
        began = time.monotonic()
        run = job.start("run")
        run.wait_until(lambda: any(job.parts()))
        first = time.monotonic() - began
        done, peaks = threading.Event(), {"driver": 0.0, "worker": 0.0}
        watcher = threading.Thread(target=watch_memory, args=(run, done, peaks))
        watcher.start()
        try:
            run.wait_until(lambda: job.rows_done() >= min(rows, WATCHED_ROWS))
        finally:
            done.set()
            watcher.join()
            run.signal(signal.SIGINT)
            run.wait()
    return {"rows": rows, "first_part_s": first, **peaks}


def watch_memory(run: Run, done: threading.Event, peaks: dict[str, float]) -> None:
    while not done.wait(WATCH_INTERVAL_S):
        for index, process in enumerate(run.family()):
            try:
                role = "worker" if "MapWorker" in process.name() else "driver"
                if index and role == "driver":
                    continue
                peaks[role] = max(peaks[role], process.memory_info().rss / 2**20)
            except psutil.NoSuchProcess:
                continue


def medians(measured: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in measured.items()}
