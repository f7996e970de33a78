"""Everything but the model: `echo` without cost, against what else copies rows.

    axbatch   `axbatch run` with the echo engine, two replicas, parts and publishing
    Ray Data  read_parquet, a Python function per row, write_parquet
    pyarrow   one process reads and writes

And memory and time to the first committed part, by the number of rows that the job has.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.runs import Job, Run

ROWS_PER_FILE = 10_000
REPEATS = 3
TIMEOUT_S = 600
LARGE_FILE = 100_000
MILLION = 1_000_000
WATCHED_ROWS = 100_000
"""Memory is read while so many rows are done, whatever the job's size."""
WATCH_INTERVAL_S = 0.2

RAY_DATA = """
import sys, time, ray
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
inputs, output = sys.argv[1:]
for turn in ("first", "second"):  # its processes start in the first
    began = time.monotonic()
    rows = ray.data.read_parquet(inputs).map(lambda row: {**row, "ko": row["en"]})
    rows.write_parquet(f"{output}/{turn}")
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
    """Of two runs, the difference, as the start is in both."""
    few, many = 4, 16

    def seconds_of(files: int) -> float:
        at = folder / f"{files}"
        write_files(at / "in", files, ROWS_PER_FILE)
        began = time.monotonic()
        echo_job(at).run()
        return time.monotonic() - began

    start = seconds_of(few)
    return (many - few) * ROWS_PER_FILE / (seconds_of(many) - start)


def by_ray_data(folder: Path) -> float:
    """Of two in one process, the second."""
    files = 40
    write_files(folder / "in", files, ROWS_PER_FILE)
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", RAY_DATA, folder / "in", folder / "out"],
        capture_output=True, check=True, timeout=TIMEOUT_S, env=env,
    )  # fmt: skip
    return files * ROWS_PER_FILE / float(done.stdout.split()[-1])


def by_pyarrow(folder: Path) -> float:
    files = 80
    write_files(folder / "in", files, ROWS_PER_FILE)
    (folder / "out").mkdir()
    began = time.monotonic()
    for path in sorted((folder / "in").iterdir()):
        table = pq.read_table(path)
        pq.write_table(table.append_column("ko", table["en"]), folder / "out" / path.name)
    return files * ROWS_PER_FILE / (time.monotonic() - began)


COPIERS: dict[str, Callable[[Path], float]] = {
    "axbatch": by_axbatch,
    "Ray Data": by_ray_data,
    "pyarrow": by_pyarrow,
}
"""Each copies files from a folder's `in` to its `out`; rows/s, without any start."""


def rates() -> dict[str, Any]:
    """Rows/s by copier, each of REPEATS in turn, and the bytes of a row."""
    measured: dict[str, list[float]] = {name: [] for name in COPIERS}
    for _ in range(REPEATS):
        for name, copier in COPIERS.items():
            with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as root:
                measured[name].append(copier(Path(root)))
    with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as root:
        size = write_files(Path(root) / "in", 1, ROWS_PER_FILE)
    return {"rows_per_s": measured, "bytes_per_row": size / ROWS_PER_FILE}


def growth(rows: int) -> dict[str, float]:
    """Of a job of so many rows: seconds to its first part, and the largest resident size (MB) of
    driver and worker until WATCHED_ROWS are done, or all."""
    with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as root:
        folder = Path(root)
        per_file = min(rows, LARGE_FILE)
        write_files(folder / "in", rows // per_file, per_file)
        job = echo_job(folder)
        began = time.monotonic()
        run = job.start("run")
        try:
            with watched(run) as peaks:
                run.wait_until(lambda: job.rows_done() > 0)
                first = time.monotonic() - began
                run.wait_until(lambda: job.rows_done() >= min(rows, WATCHED_ROWS))
            run.signal(signal.SIGINT)
            run.wait()
        finally:
            run.end()
    return {"rows": rows, "first_part_s": first, **peaks}


@contextmanager
def watched(run: Run) -> Iterator[dict[str, float]]:
    """The largest resident size (MB) of its driver, and of any worker."""
    done, peaks = threading.Event(), {"driver": 0.0, "worker": 0.0}
    watcher = threading.Thread(target=watch_memory, args=(run, done, peaks))
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


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
