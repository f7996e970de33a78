"""Where Ray's and vLLM's own chatter goes: one log file per run, which the summary names."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from pipeline.storage import Folder

ERROR_LINE = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Za-z_]*(?:Error|Exception)): (.+)")
# What vLLM says last, about an error that it has logged before.
AFTERMATH = ("See root cause above", "See stack trace", "Engine core initialization failed",
             "WorkerProc initialization failed")  # fmt: skip


def run_log(output: Folder, run: str) -> Path:
    """The run's log: in the output's `_axbatch/logs` on disk, in the temporary folder of each
    machine where the output is an object store."""
    if output.is_local:
        return Path(output.full(f"_axbatch/logs/{run}.log"))
    return machine_folder() / f"{run}.log"


def engines_lock(run: str) -> Path:
    """Held, on each machine, while a process of one of the run's engines lives there."""
    return machine_folder() / f"{run}.engines"


def machine_folder() -> Path:
    """What processes of one user on one machine share."""
    return Path(tempfile.gettempdir()) / f"axbatch-{os.getuid()}"


def redirect_output(log: Path) -> None:
    """Point this process's stdout and stderr, and those of its children, at the end of `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def root_cause(log: Path, offset: int) -> str | None:
    """The error that vLLM's own processes logged after `offset` bytes; None if there is none."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = file.read().decode("utf-8", "replace").splitlines()
    causes = [
        match.group(0).strip()
        for line in lines
        if (match := ERROR_LINE.search(line)) and not any(mark in line for mark in AFTERMATH)
    ]
    return causes[-1][:400] if causes else None
