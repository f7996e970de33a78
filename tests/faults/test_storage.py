"""Storage that fails under a running job: nothing counts that is not whole, and it goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.faults.asking import AskingJob
from tests.faults.ceph import Ceph

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FAULT_S = 20.0
"""Longer than one attempt of a request, so that some are given up and tried again."""
ENDS = "the run ends with the reason; the same command goes on once it is mended"
WAITS = "the run waits and goes on, for ten minutes at most"
ON_S3 = {"path": "s3://axbatch/out", "column": "ko"}


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    mount(*arguments, str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk(asking_job: Callable[..., AskingJob]) -> None:
    job = asking_job()
    with mounted(job.output, "-t", "tmpfs", "-o", "size=64k", "none"):
        run = job.start("run")
        assert run.wait() == 1
        assert "No space left on device" in run.errors
        mount("-o", "remount,size=16m", str(job.output))
        job.see_end(job.start("run"), "full disk (tmpfs of 64 KB)", ENDS, before=run)


def test_read_only_disk(asking_job: Callable[..., AskingJob]) -> None:
    job = asking_job()
    run = job.start_and_do(100)
    with mounted(job.output, "--bind", str(job.output)):
        mount("-o", "remount,bind,ro", str(job.output))
        assert run.wait() == 1
    assert "Read-only file system" in run.errors
    job.see_end(job.start("run"), "disk becomes read-only", ENDS, before=run)


WAITED_FOR: dict[str, tuple[str, Callable[[Ceph], AbstractContextManager[None]]]] = {
    "silent": ("S3 does not answer", Ceph.silent),
    "down": ("S3 is down, and back", Ceph.down),
}


@pytest.mark.s3
@pytest.mark.parametrize("fault", WAITED_FOR)
def test_s3_falters(asking_job: Callable[..., AskingJob], ceph: Ceph, fault: str) -> None:
    injected, strike = WAITED_FOR[fault]
    job = asking_job(output=ON_S3)
    run = job.start_and_do(100)
    with strike(ceph):
        run.wait_in_vain(FAULT_S)
    job.see_end(run, f"{injected}, {FAULT_S:.0f} s", WAITS)


@pytest.mark.s3
def test_s3_is_busy(asking_job: Callable[..., AskingJob], ceph: Ceph) -> None:
    job = asking_job(output=ON_S3)
    run = job.start_and_do(100)
    with ceph.one_request_at_a_time():
        job.see_end(run, "S3 answers 503 SlowDown to all requests but one at a time", WAITS)


@pytest.mark.s3
def test_s3_suspends_the_user(asking_job: Callable[..., AskingJob], ceph: Ceph) -> None:
    job = asking_job(output=ON_S3)
    run = job.start_and_do(100)
    with ceph.suspended():
        assert run.wait() == 1
    assert "UserSuspended" in run.errors or "access denied" in run.errors  # HEAD has no text
    job.see_end(job.start("run"), "S3 answers 403: the user is suspended", ENDS, before=run)


@pytest.mark.s3
def test_s3_is_full(asking_job: Callable[..., AskingJob], ceph: Ceph) -> None:
    job = asking_job(output=ON_S3)
    ceph.allow(objects=20)
    run = job.start("run")
    assert run.wait() == 1
    assert "QuotaExceeded" in run.errors
    ceph.allow(objects=None)
    job.see_end(job.start("run"), "S3 answers 403: the quota is used up", ENDS, before=run)
