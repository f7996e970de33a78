"""Real runs of the command line as processes of their own, to be waited for, watched and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.storage import Folder

TIMEOUT_S = 240


class Job:
    """A job file in `folder` that reads folder/in and writes folder/out."""

    module = "pipeline.cli"
    """What is run for a command."""

    not_passed: tuple[str, ...] = ("RAY_ADDRESS", "VLLM_")
    """Environment variables that a run is not to have. An engine in this process has set VLLM's."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        self.folder = folder
        self.output = folder / "out"
        self.file = folder / "job.yaml"
        self.sections: dict[str, Any] = {
            "name": "test",
            "task": {"kind": "translate", "text": "en", "source": "en", "target": "ko"},
            "input": {"path": str(folder / "in")},
            "output": {"path": str(self.output), "column": "ko"},
            **sections,
        }
        self.file.write_text(yaml.safe_dump(self.sections))

    def write_input(self, name: str, table: pa.Table) -> None:
        path = self.folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=97)

    def start(self, *arguments: str) -> Run:
        return Run(self, arguments)

    def run(self, *arguments: str) -> dict[str, Any]:
        """Run to the end; the summary. Fails unless the exit code is 0."""
        run = self.start("run", "--json", *arguments)
        assert run.wait() == 0, run.errors
        summary: dict[str, Any] = json.loads(run.printed)
        return summary

    def verify(self) -> dict[str, Any]:
        """The verified counts. Fails unless every row is accounted for."""
        run = self.start("verify", "--json")
        assert run.wait() == 0, run.errors
        counts: dict[str, Any] = json.loads(run.printed)
        return counts

    def parts(self) -> list[Path]:
        """Parts of shards that are not published yet."""
        found = self.output.glob("_axbatch/parts/**/*.parquet")
        return [path for path in found if path.is_file()]

    def rows_done(self) -> int:
        """Rows that a resumed run must not compute again, counted from the files alone."""
        output = Folder(self.sections["output"]["path"])
        paths = [entry.path for entry in output.list() if entry.path.endswith(".parquet")]
        published = {path for path in paths if not path.startswith("_axbatch/")}
        rows = 0
        for path in paths:
            folder, _, name = path.rpartition("/")
            if path in published:
                with output.open(path) as file:
                    rows += pq.read_metadata(file).num_rows
            # While a shard is being published it has both; its output file counts.
            elif folder.removeprefix("_axbatch/parts/").rpartition("/")[0] not in published:
                start, stop = name.removesuffix(".parquet").split("-")
                rows += int(stop) - int(start)
        return rows


class Run:
    """One process of `axbatch`."""

    started: ClassVar[list[Run]] = []
    """All of this session."""

    def __init__(self, job: Job, arguments: tuple[str, ...]) -> None:
        command, *rest = arguments
        self._job = job
        self._out = (job.folder / f"{time.monotonic_ns()}.out").open("w+")
        self._err = (job.folder / f"{time.monotonic_ns()}.err").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", job.module, command, str(job.file), *rest],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            env={
                name: os.environ[name] for name in os.environ if not name.startswith(job.not_passed)
            },
        )
        self.started.append(self)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        return self._process.wait(timeout_s)

    def wait_in_vain(self, seconds: float) -> None:
        """Let a fault last so long. Fails if the run ends in the meantime."""
        self.wait_at_most(seconds)
        self.check_lives()

    def wait_at_most(self, seconds: float) -> int | None:
        """The exit code; None if it still runs after so many seconds."""
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def wait_for_rows(self, count: int) -> None:
        """Return once so many rows are committed, by this or an earlier run."""
        self.wait_until(lambda: self._job.rows_done() >= count)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once it holds. Fails if the run ends before, or takes too long."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            self.check_lives()
            assert time.monotonic() < deadline, f"in vain: {self.printed}{self.errors}"
            time.sleep(0.02)  # nothing tells us of a file from another process; we must look

    def check_lives(self) -> None:
        """Fails, with what it said, once it has ended."""
        assert self._process.poll() is None, f"ended before: {self.printed}{self.errors}"

    def family(self) -> list[psutil.Process]:
        """The process with all its descendants: Ray, workers, engines."""
        driver = psutil.Process(self._process.pid)
        return [driver, *driver.children(recursive=True)]

    def worker(self) -> psutil.Process:
        """One of its worker actors that is up."""
        return next(p for p in self.family() if p.is_running() and "MapWorker" in p.name())

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """As the machine's end does."""
        self.signal(signal.SIGKILL)
        self.wait()

    def end(self) -> None:
        """It and all that it started, if a test that failed has left it."""
        if self._process.poll() is None:
            for process in reversed(self.family()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.wait()

    @property
    def printed(self) -> str:
        return Path(self._out.name).read_text()

    @property
    def errors(self) -> str:
        return Path(self._err.name).read_text()


def printed(job: Job, *arguments: str) -> str:
    """What a command prints. Fails unless its exit code is 0."""
    run = job.start(*arguments)
    assert run.wait() == 0, run.errors
    return run.printed


def engines_among(family: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that vLLM started: EngineCore and its workers."""
    found = []
    for process in family:
        try:
            if "VLLM" in process.name() or "VLLM" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
