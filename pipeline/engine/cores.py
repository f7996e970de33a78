"""Which CPU cores an engine without a GPU may bind its threads to."""

from __future__ import annotations

import fcntl
import math
import os
import tempfile
from pathlib import Path

_held: list[int] = []  # open lock files; the kernel lets go of them when this process ends


QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: microseconds of CPU time, `max` for any number, in so many microseconds."""


def usable_cores() -> list[int]:
    """As many cores as this process may compute on at once; in a container, no more than its CPU
    limit: that does not say which, and threads beyond it would wait for each other."""
    cores = sorted(os.sched_getaffinity(0))
    try:
        quota, _, period = QUOTA.read_text(encoding="ascii").partition(" ")
    except OSError:
        return cores
    return cores if quota == "max" else cores[: max(1, math.ceil(int(quota) / int(period)))]


def claim_cores(wanted: int) -> list[int]:
    """Cores that no other engine on this machine holds, `wanted` of them if so many are free,
    else shared ones. Two engines bound to one core are correct but many times slower."""
    cores = usable_cores()
    claimed: list[int] = []
    for core in cores:
        if len(claimed) < wanted and _claim(core):
            claimed.append(core)
    shared = [core for core in cores if core not in claimed]
    return sorted(claimed + shared[: max(0, wanted - len(claimed))])


def _claim(core: int) -> bool:
    folder = Path(tempfile.gettempdir()) / f"axbatch-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(folder / str(core), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    _held.append(lock)
    return True


def omp_binding(cores: list[int], ranks: int) -> str:
    """vLLM's VLLM_CPU_OMP_THREADS_BIND: each rank's cores, ranks divided by `|`."""
    share = max(1, len(cores) // ranks)
    groups = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)
