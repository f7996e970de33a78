"""One run at a time: who holds an output, and when another may take it.

    <output>/_axbatch/lease.json    the holder: its run, its process, and a beat that counts up

A holder rewrites the file every BEAT_S. Whoever comes later is refused if the holder's process
lives on this machine, and takes over at once if it has died there. The life of a process on another
machine shows in its beats alone: if they move, the later one is refused; if they stand still for
SILENCE_S, by the later one's own clock, it takes over. A holder that finds itself replaced stops.

Workers look at the file too: they begin no unit once their run drains, or has lost the output.

Two may hold it for the moment between a take-over and the next beat. That costs work, never rows:
the output is exact because parts and published files are (parts.py), whoever writes them.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from pipeline.errors import Interrupted, RefusedError, StorageError
from pipeline.storage import Folder

LEASE = "_axbatch/lease.json"
BEAT_S = 5.0
SILENCE_S = 30.0
LOOK_S = 1.0
READS = 5


@dataclass(frozen=True)
class Holder:
    """A run's driver. Two on one machine have the same `machine`; `started` tells a process from
    a later one of the same pid."""

    run: str
    host: str
    machine: str
    """Boot id and pid namespace: a pid means nothing in another container or after a restart."""
    pid: int
    started: str
    """In clock ticks since the boot."""
    beat: int = 0
    draining: bool = False
    """Its workers begin no more units."""

    @classmethod
    def here(cls, run: str) -> Holder:
        """This process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        pid = os.getpid()
        return cls(run, socket.gethostname(), machine, pid, _started(pid) or "")

    def lives_beside(self, other: Holder) -> bool | None:
        """Whether the process lives on `other`'s machine; None if it is on another one."""
        if self.machine != other.machine:
            return None
        return _started(self.pid) == self.started


class Lease:
    """Held inside of its block. Beats come from a thread of their own."""

    def __init__(self, output: Folder, run: str, announce: Callable[[str], None] = print) -> None:
        self._output = output
        self._announce = announce
        self._own = Holder.here(run)
        self._replaced_by: Holder | None = None
        self._released = False
        self._due = threading.Event()
        self._beats = 0
        self._beating = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        """Raises RefusedError if another run lives; waits up to SILENCE_S to see if it does."""
        data = _encoded(self._own)
        # Looked for first: some stores let it be created over another's.
        holder = read_holder(self._output)
        if holder or not self._output.create(LEASE, data):
            holder = holder or read_holder(self._output)
            if holder:
                self._wait_for_end(holder)
            self._output.replace(LEASE, data)
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._released = True
        self._due.set()
        self._beating.join()
        holder = read_holder(self._output)
        if holder and holder.run != self._own.run:
            self._replaced_by = holder
        if self._replaced_by is None:
            self._output.delete(LEASE)
        elif isinstance(error, Interrupted):
            raise _refused(self._output, self._replaced_by, "took over") from error

    def _wait_for_end(self, holder: Holder) -> None:
        lives = holder.lives_beside(self._own)
        if lives:
            raise _refused(self._output, holder, "is running")
        if lives is None:
            self._announce(
                f"a run on {holder.host} holds {self._output.url}; "
                f"waiting up to {SILENCE_S:.0f} s for a sign of life"
            )
            deadline = time.monotonic() + SILENCE_S
            while time.monotonic() < deadline:
                self._due.wait(BEAT_S / 2)
                now = read_holder(self._output)
                if now is None:
                    return
                if now != holder:
                    raise _refused(self._output, now, "is running")

    def drain(self) -> None:
        """Have this run's workers begin no more units. For a signal handler: returns at once."""
        self._own = replace(self._own, draining=True)
        self._due.set()

    def _beat(self) -> None:
        was_draining = False
        while True:
            self._due.wait(BEAT_S)
            if self._released:
                return
            self._due.clear()
            try:
                holder = read_holder(self._output)
                if holder and holder.run != self._own.run:
                    self._replaced_by = holder
                    # As if by Ctrl-C: the main thread may wait for Ray.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                self._beats += 1
                holder = replace(self._own, beat=self._beats)
                self._output.replace(LEASE, _encoded(holder))
                if holder.draining and not was_draining:
                    self._announce("no unit begins any more; those that have begun are finished")
                was_draining = holder.draining
            except StorageError as error:
                # The run itself meets the same storage, and decides what that means.
                print(f"axbatch: lease: {error}", flush=True)


class Watch:
    """Tells a run's workers and readers when to begin no more units. Travels to them."""

    def __init__(self, output: Folder, run: str) -> None:
        self._output = output
        self._run = run
        self._looked = -math.inf
        self._answer = False

    def __reduce__(self) -> tuple[type[Watch], tuple[Folder, str]]:
        """Without when it has looked: another machine's clock says other times."""
        return Watch, (self._output, self._run)

    def says_stop(self) -> bool:
        """Looks at the lease again once LOOK_S have passed."""
        if time.monotonic() - self._looked > LOOK_S and not self._answer:
            self._looked = time.monotonic()
            holder = read_holder(self._output)
            self._answer = bool(holder and (holder.draining or holder.run != self._run))
        return self._answer


def read_holder(output: Folder) -> Holder | None:
    """Who holds the output, or held it when its process died."""
    for reads_left in range(READS, 0, -1):
        try:
            return Holder(**json.loads(output.read(LEASE)))
        except FileNotFoundError:
            return None
        except StorageError as error:
            if reads_left == 1 or getattr(error.__cause__, "errno", None) != errno.ESTALE:
                raise  # on NFS, a file that is replaced between opening and reading it is stale
    raise AssertionError("READS is 1 at least")


def _started(pid: int) -> str | None:
    """When the process started; None if there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # from the third field of proc(5) on
    return None if fields[0] == "Z" else fields[19]


def _encoded(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _refused(output: Folder, holder: Holder, what: str) -> RefusedError:
    return RefusedError(
        f"{output.url}: another run of this job {what} (process {holder.pid} on {holder.host})",
        "Let it finish, or stop it; then the same command goes on where it stopped.",
    )
