"""Machines that die, drivers that do not know of each other, and clocks that are wrong."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.faults.asking import AskingJob

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
