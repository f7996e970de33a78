"""What the death of a replica costs: rows of its open units, and no other row."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable

import psutil
import pytest

from pipeline.logs import machine_folder
from tests.faults.asking import AskingJob
from tests.runs import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 20
ROWS = 12_000
SEED = 4


def open_rows(worker: psutil.Process) -> set[str]:
    """The texts of all rows of the units that the worker has begun and not committed."""
    [journal] = machine_folder().glob(f"*.{worker.pid}.journal")
    units: list[tuple[str, int, int]] = []
    for line in journal.read_text().splitlines():
        what, key, start, stop, _ = json.loads(line)
        units.append((key, start, stop)) if what == "in" else units.remove((key, start, stop))
    first = {"a.parquet": 0, "b.parquet": ROWS // 3}
    return {
        f"text {first[key.partition('/')[0]] + row}"
        for key, start, stop in units
        for row in range(start, stop)
    }


def busy_worker(run: Run, dice: random.Random) -> psutil.Process:
    """A replica with units open."""
    while True:
        run.check_lives()
        workers = [p for p in run.family() if p.is_running() and "MapWorker" in p.name()]
        for worker in dice.sample(workers, len(workers)):
            if list(machine_folder().glob(f"*.{worker.pid}.journal")) and open_rows(worker):
                return worker
        time.sleep(0.05)  # it says so in a file


def test_killed_replica_costs_no_more_than_its_open_units(
    asking_job: Callable[..., AskingJob],
) -> None:
    dice = random.Random(SEED)
    job = asking_job(rows=ROWS, cluster={"replicas": 2, "cpus_per_replica": 1})
    run = job.start_and_do(200)
    server = job.server
    kills: list[tuple[set[str], set[str], int]] = []
    for _ in range(KILLS):
        job.wait_until_asked(len(server.bodies) + dice.randint(100, 400), run)
        worker = busy_worker(run, dice)
        worker.suspend()  # so that what is open and what was asked for belong together
        held, asked = open_rows(worker), server.asked
        worker.kill()
        kills.append((held, held & set(asked), len(asked)))
    job.see_end(
        run, f"kill -9 of a replica, {KILLS} times", "no more is redone than its open units"
    )
    asked = server.asked
    for number, (held, begun, moment) in enumerate(kills, 1):
        redone = begun & set(asked[moment:])
        print(f"kill {number}: {len(held)} rows in open units, {len(redone)} of them redone")
    counts = Counter(asked)
    again = {text for text, times in counts.items() if times > 1}
    assert again <= set().union(*(held for held, _, _ in kills)), "rows of healthy units"
