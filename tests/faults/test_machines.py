"""Machines that die, drivers that do not know of each other, and clocks that are wrong."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.asking import AskingJob
from tests.faults.ceph import CREDENTIALS, Ceph
from tests.s3_store import Store, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ON_S3 = {"path": "s3://axbatch/out", "column": "ko"}


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Address of a cluster, and the raylet of its second node."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.two_nodes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) and line.count(" ") != 1:
        pass  # what Ray says
    address, raylet = line.split()
    yield address, int(raylet)
    process.communicate("", timeout=60)


def test_node_dies(asking_job: Callable[..., AskingJob], two_nodes: tuple[str, int]) -> None:
    address, raylet = two_nodes
    # They fill both nodes, so that those of the dead one find no room until the end.
    job = asking_job(cluster={"address": address, "replicas": 4})
    run = job.start_and_do(200)
    node = [*psutil.Process(raylet).children(recursive=True), psutil.Process(raylet)]
    for process in node:
        process.kill()
    job.see_end(
        run,
        "kill -9 of one of two nodes: its raylet and replicas",
        "the other node does its units",
    )


TWICE = "the same job started twice at once"
ONE_HOLDS = "one is refused; rows are there once"


@pytest.mark.s3
def test_twice_at_once(asking_job: Callable[..., AskingJob], ceph: Ceph) -> None:
    job = asking_job(output=ON_S3)
    runs = [job.start("run"), job.start("run")]
    assert sorted(run.wait() for run in runs) == [0, 4]
    job.see_output(f"{TWICE}, on Ceph", ONE_HOLDS, runs)


def test_twice_at_once_and_blind_on_a_store_whose_writes_race(
    asking_job: Callable[..., AskingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither run ever sees the other's lease, and both are told that they created each part."""
    job = asking_job(output=ON_S3)
    with serving(Store()) as store:
        store.races, store.page = True, 1000
        store.hidden = {"out/_axbatch/lease.json"}
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": store.url}.items():
            monkeypatch.setenv(name, value)
        runs = [job.start("run"), job.start("run")]
        assert {run.wait() for run in runs} <= {0, 1}
        runs.append(job.start("run"))
        assert runs[-1].wait() == 0, runs[-1].errors
        assert store.overwritten > 0
        job.see_output(
            f"{TWICE}, each blind to the other, on a store whose conditional writes race",
            "work is doubled, no row is",
            runs,
        )


FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Set the clock of all runs that are started from now on, for instance by `+2h`."""
    if not FAKETIME.exists():
        pytest.skip("no wrong clocks: Debian's faketime is not installed")

    def set_clock(offset: str | None) -> None:
        if offset is None:
            monkeypatch.delenv("LD_PRELOAD")
        else:
            monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))
            monkeypatch.setenv("FAKETIME", offset)

    return set_clock


@pytest.mark.parametrize("offset", ["+2h", "-2h"], ids=["ahead", "behind"])
def test_wrong_clock(
    asking_job: Callable[..., AskingJob], clock: Callable[[str | None], None], offset: str
) -> None:
    clock(offset)
    job = asking_job()
    run = job.start_and_do(200)
    run.signal(signal.SIGKILL)
    run.wait()
    clock(None)
    job.see_end(
        job.start("run"),
        f"clock {offset} off, kill -9 of the driver, clock right",
        "time decides nothing; the same command goes on",
        before=run,
    )


@pytest.mark.s3
def test_wrong_clock_on_s3(
    asking_job: Callable[..., AskingJob], ceph: Ceph, clock: Callable[[str | None], None]
) -> None:
    clock("+2h")
    job = asking_job(output=ON_S3)
    run = job.start("run")
    assert run.wait() == 1, run.errors
    assert "RequestTimeTooSkewed" in run.errors
    clock(None)
    job.see_end(
        job.start("run"),
        "clock two hours off, on S3, which refuses its signatures",
        "refused before it begins, with the reason",
        before=run,
    )
