"""Leave no orphan: when a worker dies, however it dies, its engine's processes die with it.

vLLM's EngineCore and its workers outlive a parent that was killed with SIGKILL, and keep the GPU.
So a worker leads a process group of its own, and a tiny process outside of that group waits for
the worker's end (pidfd: an event, no polling, no race with pid reuse) and kills the group.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def guard_children(lock: Path) -> None:
    """Make all future children of this process die with it. The guard holds `lock` as long as
    they live. Linux 5.3 or newer."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    lock.parent.mkdir(parents=True, exist_ok=True)
    # -I -S: nothing but the standard library, so that it starts in milliseconds.
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(lock)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert guard.stdout is not None
    guard.stdout.readline()  # it holds the lock now
    guard.wait()


def wait_for_guards(lock: Path) -> None:
    """Return once every guard on this machine that holds `lock` has done its work."""
    with suppress(FileNotFoundError), lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock.unlink()


def _guard(leader: int, lock: Path) -> None:
    if os.fork():
        os._exit(0)  # Ray kills the children of a worker that ends; init's child stays
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        print("guarding", flush=True)
        _wait_for_end(leader)
        while members := _living_members(leader):
            with suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
            for member in members:
                _wait_for_end(member)


def _wait_for_end(process: int) -> None:
    """Return once the process has ended; it may be a zombie still."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process)
        select.select([descriptor], [], [])
        os.close(descriptor)


def _living_members(group: int) -> list[int]:
    """Process ids of the group, without zombies, which hold no memory."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # Fields after the name, which is in parentheses: state, parent, process group.
            fields = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
            state, _, process_group = fields[:3]
            if int(process_group) == group and state != "Z":
                members.append(int(stat.parent.name))
    return members


if __name__ == "__main__":
    _guard(int(sys.argv[1]), Path(sys.argv[2]))
