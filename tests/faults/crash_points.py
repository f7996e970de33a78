"""Kill a job before and after each of its storage calls, resume it, and compare the rows.

    python -m tests.faults.crash_points FOLDER [--every N] [--s3 s3://BUCKET/PREFIX]

The job has two files, in each a row that waits for the second lane, some rows that fail, and then
a retry of these. It is a real run in all but
Ray: the worker is called in the driver's process, so that one process makes all storage calls and
can be killed at each of them, by `os._exit`. Calls are counted where they leave Python: system
calls that change the disk, or requests to S3. Each trial is a fork of one process that has
imported all there is, so that it takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

import pipeline.cluster
import pipeline.run
import pipeline.worker
from jobs.translate import Translate
from pipeline.config import JobConfig
from pipeline.counting import load_baseline
from pipeline.errors import RowFailed
from pipeline.records import Output
from pipeline.retry import Retry
from pipeline.storage import Folder
from tests.faults.without_ray import leave_ray_out

KILLED, WRONG = 77, 78
KEPT = tuple(
    f"_axbatch/{name}" for name in ("runs/", "logs/", "tmp/", "job.json", "plan.json", "report.")
)
STDERR = os.dup(2)  # a run points 2 at its log
LONG = 400
"""Words more than the first lane holds."""
FILES = {"a.parquet": 5, "b.parquet": 7}
SYSTEM_CALLS = ("link", "replace", "rename", "unlink", "mkdir", "rmdir", "fsync")


class Killer:
    """Counts moments, one before and one after each call, and ends the process at one of them."""

    def __init__(self, at: int | None) -> None:
        self._at = at
        self.moments = 0

    def moment(self) -> None:
        self.moments += 1
        if self.moments == self._at:
            os._exit(KILLED)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.moment()
            result = function(*arguments, **options)
            self.moment()
            return result

        return call

    def watch_disk(self) -> None:
        for name in SYSTEM_CALLS:
            setattr(os, name, self.around(getattr(os, name)))
        opened, counted = io.open, self.around(io.open)

        def open_(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            function = counted if set("wxa") & set(mode) else opened
            return function(file, mode, *arguments, **options)

        io.open = open_  # what pathlib calls

    def watch_s3(self) -> None:
        from pipeline.s3 import PatientS3

        ask = PatientS3._ask

        async def counted(*arguments: Any, **options: Any) -> Any:
            self.moment()
            answer = await ask(*arguments, **options)
            self.moment()
            return answer

        PatientS3._ask = counted  # type: ignore[method-assign]


def make_job(source: str, output: str) -> JobConfig:
    return JobConfig.model_validate({
        "name": "crash",
        "task": {
            "kind": "translate", "text": "text", "source": "en", "target": "ko",
            "overflow": "reject",
        },
        "input": {"path": source, "rows_per_unit": 3},
        "output": {"path": output, "column": "ko"},
        "model": {
            "id": "echo", "backend": "echo", "engine": {"max_model_len": 400}, "context": "auto",
        },
        "limits": {"max_failed_fraction": 1.0},
    })  # fmt: skip


def text_of(name: str, row: int) -> str | None:
    """Each file has one row without text, and one that doesn't fit the first lane."""
    if row == 1:
        return None
    return " ".join([name, *["long"] * LONG, str(row)] if row == 2 else [name, str(row)])


def write_input(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, rows in FILES.items():
        texts = [text_of(name, row) for row in range(rows)]
        pq.write_table(pa.table({"text": texts, "id": range(rows)}), folder / name)


def do_job(job: JobConfig) -> None:
    """Run it, with rows that fail, then have these done again; or what is left of both."""
    leave_ray_out()
    translate, silent = Translate.run, Console(file=io.StringIO())

    async def fail_on_some(self: Translate, row: Any, generate: Any) -> Output:
        if str(row["text"]).endswith(("0", "4")):
            raise RowFailed("engine_error")
        return await translate(self, row, generate)

    Translate.run = fail_on_some  # type: ignore[method-assign]
    pipeline.run.run_job(job, silent)
    Translate.run = translate  # type: ignore[method-assign]
    pipeline.run.run_job(job, silent, Retry("failed", None))


def rows_of(job: JobConfig) -> dict[str, list[dict[str, Any]]]:
    output = Folder(job.output.path)
    return {name: pq.read_table(pa.BufferReader(output.read(name))).to_pylist() for name in FILES}


def expected_rows() -> dict[str, list[dict[str, Any]]]:
    """Known without any run: echo answers its text, and failed rows took no request."""

    task = Translate(kind="translate", text="text", source="en", target="ko")
    prompt_words = len(task.system_prompt.split())

    def row(name: str, number: int) -> dict[str, Any]:
        text = text_of(name, number)
        count = len(text.split()) if text else 0
        words = {"requests": 1, "prompt_tokens": prompt_words + count, "completion_tokens": count}
        return {
            "text": text,
            "id": number,
            "ko": text,
            "_status": "ok" if text else "rejected",
            "_reason": None if text else "null",
            "_usage": {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0,
                       "completion_tokens": 0, **(words if text else {})},
        }  # fmt: skip

    return {name: [row(name, number) for number in range(rows)] for name, rows in FILES.items()}


def in_a_fork(act: Callable[[], None]) -> int:
    """Exit code of a process that does `act`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        except AssertionError as error:
            os.write(STDERR, f"{error}\n".encode())
            code = WRONG
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=1, help="the first moment to try")
    parser.add_argument("--every", type=int, default=1, help="try only each Nth moment")
    parser.add_argument("--s3", help="keep input and output below this URL")
    options = parser.parse_args()
    source = options.folder / "in"
    write_input(source)
    load_baseline("o200k_base")  # a second's work that the forks needn't do again
    began, at, resumed = time.monotonic(), options.first, 0
    while True:
        output = f"{options.s3}/{at}" if options.s3 else str(options.folder / "out")
        job = make_job(str(source), output)

        def killed(job: JobConfig = job, at: int = at) -> None:
            killer = Killer(at)
            (killer.watch_s3 if options.s3 else killer.watch_disk)()
            do_job(job)

        def resume(job: JobConfig = job) -> None:
            do_job(job)
            assert rows_of(job) == expected_rows(), "rows are lost, doubled or changed"
            entries = Folder(job.output.path).list("_axbatch")
            left = [e.path for e in entries if not e.path.startswith(KEPT)]
            assert not left, f"left behind: {left}"

        code = in_a_fork(killed)
        assert code in (0, KILLED), f"moment {at}: exit code {code}"
        code_of_resume = in_a_fork(resume)
        assert code_of_resume == 0, f"moment {at}: the resumed run gave {code_of_resume}"
        shutil.rmtree(options.folder / "out", ignore_errors=True)
        if code == 0:
            break
        resumed, at = resumed + 1, at + options.every
    print(
        f"{resumed} crashes at {at - 1} moments, {time.monotonic() - began:.0f} s: all rows right"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
