"""Half an hour of faults, one every 20 seconds, the job started again whenever it has ended.

    python -m tests.faults.soak [--minutes 30] [--seed 1]

The job echoes rows of random length, and so of random latency, from disk to a real S3 server, on
two replicas. At the end it is left alone, and every row must be there once, in order, as itself.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs

from pipeline.lease import LEASE
from pipeline.storage import Folder
from tests.faults.ceph import CREDENTIALS, Ceph
from tests.runs import Job, Run

EVERY_S = 20.0
FILES, ROWS_PER_FILE = 40, 3_000
OUTPUT = "s3://axbatch/out"
ENDED = {0, 1, 4, 130, -signal.SIGKILL}
"""What a run may end with under these faults."""
NOT_BEGUN = {-signal.SIGINT, -signal.SIGTERM}
"""Python itself had not started yet."""


class Soak:
    """The job, its present run, and what has happened."""

    def __init__(self, folder: Path, ceph: Ceph, seed: int) -> None:
        self._dice = random.Random(seed)
        self._ceph = ceph
        self.job = Job(
            folder,
            model={
                "id": "echo",
                "backend": "echo",
                "engine": {"seconds_per_completion_token": 0.05, "max_num_seqs": 64},
            },
            input={"path": str(folder / "in"), "rows_per_unit": 64},
            output={"path": OUTPUT, "column": "ko"},
            cluster={"replicas": 2, "cpus_per_replica": 1, "grace_s": 5},
            limits={"max_failed_fraction": 0.01},
        )
        for number in range(FILES):
            self.job.write_input(f"{number:02}.parquet", self._texts(number))
        self.run = self.job.start("run")
        self.struck: Counter[str] = Counter()
        self.ends: Counter[int] = Counter()

    def _texts(self, number: int) -> pa.Table:
        ids = range(number * ROWS_PER_FILE, (number + 1) * ROWS_PER_FILE)
        texts = [" ".join([f"row{row}"] * self._dice.randint(1, 40)) for row in ids]
        return pa.table({"id": ids, "en": texts})

    def last(self, minutes: float) -> None:
        """Strike every EVERY_S, for so long."""
        end = time.monotonic() + 60 * minutes
        faults = self.faults()
        while (now := time.monotonic()) < end:
            name, strike = self._dice.choice([*faults.items()])
            strike()
            self.struck[name] += 1
            print(f"{name}: {self.rows_done():,} rows are done", flush=True)
            self.go_on_until(now + EVERY_S)

    def faults(self) -> dict[str, Callable[[], None]]:
        return {
            "kill -9 driver": lambda: self.signal(signal.SIGKILL),
            "SIGTERM": lambda: self.signal(signal.SIGTERM),
            "SIGINT": lambda: self.signal(signal.SIGINT),
            "kill -9 replica": self.kill_replica,
            "kill -9 raylet": self.kill_raylet,
            "second run": self.start_another,
            "lease lost": lambda: Folder(OUTPUT).delete(LEASE),
            "S3 down": lambda: self.for_a_while(self._ceph.down()),
            "S3 silent": lambda: self.for_a_while(self._ceph.silent()),
            "S3 busy": lambda: self.for_a_while(self._ceph.one_request_at_a_time()),
            "S3 user suspended": lambda: self.for_a_while(self._ceph.suspended()),
        }

    def signal(self, number: signal.Signals) -> None:
        self.run.signal(number)

    def kill_replica(self) -> None:
        self.kill("MapWorker")

    def kill_raylet(self) -> None:
        self.kill("raylet")

    def kill(self, name: str) -> None:
        """One of the run's processes of this name, if it has one by now."""
        found = [p for p in self.run.family() if p.is_running() and name in p.name()]
        if found:
            self._dice.choice(found).kill()

    def start_another(self) -> None:
        """It is refused, or takes over from one that has just ended."""
        another = self.job.start("run")
        self.ends[self.ended(another)] += 1

    def for_a_while(self, fault: AbstractContextManager[None]) -> None:
        with fault:
            self.go_on_until(time.monotonic() + self._dice.uniform(1, 8))

    def go_on_until(self, moment: float) -> None:
        """Start the run again when it ends."""
        while (left := moment - time.monotonic()) > 0:
            code = self.run.wait_at_most(left)
            if code is not None:
                self.ends[self.ended(self.run)] += 1
                self.run = self.job.start("run")

    def ended(self, run: Run) -> int:
        code = run.wait(600)
        if code not in NOT_BEGUN and (code not in ENDED or "Traceback" in run.errors):
            raise AssertionError(f"exit code {code}: {run.errors}")
        return code

    def rows_done(self) -> int:
        return self.job.rows_done()

    def finish(self) -> None:
        """Let what runs end, and what is left be done at full speed."""
        self.run.signal(signal.SIGINT)
        self.ends[self.ended(self.run)] += 1
        self.job.run("--set", "model.engine={}")

    def check(self) -> int:
        """The number of rows, each of which is there once, in order, as itself."""
        rows = self.job.verify()["rows"]
        output = Folder(OUTPUT)
        ids: list[int] = []
        for number in range(FILES):
            table = pq.read_table(pa.BufferReader(output.read(f"{number:02}.parquet")))
            assert table["ko"].equals(table["en"])
            ids += table["id"].to_pylist()
        assert ids == [*range(FILES * ROWS_PER_FILE)]
        assert rows == len(ids)
        return rows


@contextmanager
def s3_server(folder: Path) -> Iterator[Ceph]:
    ceph = Ceph(folder)
    try:
        ceph.start()
        os.environ |= {**CREDENTIALS, "AWS_ENDPOINT_URL": ceph.endpoint}
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("axbatch")
        yield ceph
    finally:
        ceph.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, s3_server(Path(name) / "s3") as ceph:
        soak = Soak(Path(name), ceph, options.seed)
        soak.last(options.minutes)
        done = soak.rows_done()
        soak.finish()
        rows = soak.check()
    left = [p for p in psutil.Process().children(recursive=True) if p.is_running()]
    print(f"faults: {dict(soak.struck.most_common())}")
    print(f"runs ended with: {dict(soak.ends.most_common())}")
    print(f"{done:,} of {rows:,} rows done under fire, the rest after it: all rows right")
    assert not left, f"processes left: {left}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
