"""Killed at any storage call, a job is completed by the same commands, with the same rows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def crash_and_resume(folder: Path, *options: str) -> int:
    """The number of crashes, each of them survived."""
    command = [sys.executable, "-m", "tests.faults.crash_points", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    found = re.match(r"(\d+) crashes at (\d+) moments, .*: all rows right", done.stdout)
    assert found, done.stdout
    print(done.stdout)
    return int(found[1])


EVERY = {"disk": 47, "s3": 97}
"""Of all moments; with AXBATCH_FAULTS=all, as `make faults` has it, each one."""


def every(store: str) -> str:
    return "1" if os.environ.get("AXBATCH_FAULTS") == "all" else str(EVERY[store])


@pytest.mark.timeout(3600)
def test_no_crash_at_a_system_call_on_disk_loses_or_doubles_a_row(tmp_path: Path) -> None:
    assert crash_and_resume(tmp_path / "crash", "--every", every("disk")) > 9


@pytest.mark.s3
@pytest.mark.timeout(3600)
def test_no_crash_at_a_request_to_s3_loses_or_doubles_a_row(tmp_path: Path, s3_url: str) -> None:
    options = ["--s3", f"{s3_url}/crash", "--every", every("s3")]
    assert crash_and_resume(tmp_path / "crash", *options) > 4
