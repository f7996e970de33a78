"""Everything but the model: `echo` without cost, against what else copies rows.

    axbatch   `axbatch run` with the echo engine, two replicas, parts and publishing
    Ray Data  read_parquet, a Python function per row, write_parquet
    pyarrow   one process reads and writes

And memory and time to the first committed part, by the number of rows that the job has.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.runs import Job, Run

ROWS_PER_FILE = 10_000
REPEATS = 3
LARGE_FILE = 100_000
MILLION = 1_000_000
WATCHED_ROWS = 100_000
"""Memory is read while so many rows are done, whatever the job's size."""
WATCH_INTERVAL_S = 0.2

RAY_DATA = """
import sys, ray
ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
rows = ray.data.read_parquet(sys.argv[1]).map(lambda row: {**row, "ko": row["en"]})
rows.write_parquet(sys.argv[2])
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


def by_axbatch(folder: Path) -> None:
    echo_job(folder).run()


def by_ray_data(folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", RAY_DATA, folder / "in", folder / "out"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip


def by_pyarrow(folder: Path) -> None:
    (folder / "out").mkdir()
    for path in sorted((folder / "in").iterdir()):
        table = pq.read_table(path)
        pq.write_table(table.append_column("ko", table["en"]), folder / "out" / path.name)


class Copier(NamedTuple):
    copy: Callable[[Path], None]
    files: tuple[int, int]
    """Of the two runs whose difference is the time of so many rows without any start."""


COPIERS = {
    "axbatch": Copier(by_axbatch, (4, 16)),
    "Ray Data": Copier(by_ray_data, (4, 80)),
    "pyarrow": Copier(by_pyarrow, (4, 80)),
}


def rates() -> dict[str, Any]:
    """Rows/s by copier, each of REPEATS in turn, and the bytes of a row."""
    measured: dict[str, list[float]] = {name: [] for name in COPIERS}
    for _ in range(REPEATS):
        for name, copier in COPIERS.items():
            few, many = (seconds_of(copier.copy, files) for files in copier.files)
            rows = (copier.files[1] - copier.files[0]) * ROWS_PER_FILE
            measured[name].append(rows / (many - few))
    with tempfile.TemporaryDirectory() as root:
        size = write_files(Path(root) / "in", 1, ROWS_PER_FILE)
    return {"rows_per_s": measured, "bytes_per_row": size / ROWS_PER_FILE}


def seconds_of(copy: Callable[[Path], None], files: int) -> float:
    with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as root:
        write_files(Path(root) / "in", files, ROWS_PER_FILE)
        began = time.monotonic()
        copy(Path(root))
        return time.monotonic() - began


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
