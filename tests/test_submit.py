"""submit, against a real Ray cluster: followed to the end, refused while it runs, resumed after."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.job_file import load_job
from pipeline.submit import submission_id
from tests.runs import TIMEOUT_S, Job

pytestmark = pytest.mark.ray

SLOW = {"id": "echo", "backend": "echo", "engine": {"seconds_per_request": 2.0, "max_num_seqs": 8}}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """A cluster of one machine, as `ray start --head` makes it; the dashboard's address."""
    port = free_port()
    ray = Path(sys.executable).with_name("ray")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=3", f"--port={free_port()}",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--disable-usage-stats"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while not takes_jobs(address):
        assert head.poll() is None and time.monotonic() < deadline, "the cluster is not up"
        time.sleep(0.2)  # the cluster can only be asked
    yield address
    os.killpg(head.pid, signal.SIGTERM)
    head.wait(60)


def client_of(dashboard: str) -> Any:
    from pipeline.ray_settings import apply_ray_settings

    apply_ray_settings(remote=True)
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(dashboard)


def takes_jobs(dashboard: str) -> bool:
    """Whether the cluster has come so far that it runs a job that does nothing."""
    try:
        client_of(dashboard).submit_job(entrypoint="true")
    except (ConnectionError, RuntimeError):
        return False
    return True


def ended(dashboard: str, identifier: str) -> str:
    """The submission's last status, once it has one."""
    client = client_of(dashboard)
    deadline = time.monotonic() + TIMEOUT_S
    while not (status := client.get_job_status(identifier)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(identifier)
        time.sleep(0.2)  # the cluster can only be asked
    return str(status.value)


def test_submitted_job_runs_once_at_a_time_and_can_be_submitted_again(
    dashboard: str, tmp_path: Path
) -> None:
    job = Job(tmp_path, model=SLOW)
    job.write_input("a.parquet", pa.table({"en": [f"row {i}" for i in range(60)]}))
    identifier = submission_id(load_job(job.file))

    first = job.start("submit", "--address", dashboard)
    assert (first.wait(), first.errors) == (0, "")
    assert identifier in first.printed

    second = job.start("submit", "--address", dashboard)
    assert second.wait() == 4
    assert f"{identifier} is queued or running" in second.errors
    assert len(second.errors.splitlines()) == 2

    assert ended(dashboard, identifier) == "SUCCEEDED"
    assert job.verify()["rows"] == 60

    job.write_input("b.parquet", pa.table({"en": ["one more file"]}))
    assert job.start("submit", "--address", dashboard).wait() == 0
    assert ended(dashboard, f"{identifier}-2") == "SUCCEEDED"
    assert job.verify()["rows"] == 61
