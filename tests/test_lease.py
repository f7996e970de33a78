"""One run at a time: refused while the holder lives, taken over once it is dead, never for ever."""

from __future__ import annotations

import errno
import json
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import lease
from pipeline.errors import Interrupted, RefusedError, StorageError
from pipeline.lease import LEASE, READS, Holder, Lease, Watch, read_holder
from pipeline.storage import Folder

HOLD = """
import sys
from pipeline.lease import Lease
from pipeline.storage import Folder
with Lease(Folder(sys.argv[1]), "first"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "SILENCE_S", 0.5)


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease of tmp_path until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def elsewhere(run: str, beat: int = 0) -> Holder:
    """A holder on another machine."""
    return replace(Holder.here(run), host="far", machine="other boot, other namespace", beat=beat)


def write(output: Folder, holder: Holder) -> None:
    output.replace(LEASE, json.dumps(asdict(holder)).encode())


def test_second_run_is_refused_while_the_first_lives(tmp_path: Path, holding: Any) -> None:
    with pytest.raises(RefusedError, match=f"process {holding.pid} on"), Lease(tmp(tmp_path), "b"):
        pass
    holder = read_holder(tmp(tmp_path))
    assert holder is not None and holder.run == "first", "the refusal must not touch the lease"


def test_killed_run_is_taken_over_at_once(
    tmp_path: Path, holding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SILENCE_S", 1e9)  # must not matter on the same machine
    holding.kill()
    holding.wait()
    with Lease(tmp(tmp_path), "second"):
        holder = read_holder(tmp(tmp_path))
        assert holder is not None and holder.run == "second"
    assert read_holder(tmp(tmp_path)) is None


def test_lease_is_gone_after_its_block(tmp_path: Path, holding: Any) -> None:
    holding.communicate("")
    assert holding.returncode == 0
    with Lease(tmp(tmp_path), "second"):
        pass
    assert not tmp(tmp_path).list()


def test_second_run_is_refused_where_creates_overwrite(
    tmp_path: Path, holding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a store that does not know `If-None-Match`."""

    def create(self: Folder, path: str, data: bytes) -> bool:
        self.replace(path, data)
        return True

    monkeypatch.setattr(Folder, "create", create)
    with pytest.raises(RefusedError, match="is running"), Lease(tmp(tmp_path), "second"):
        pass
    holder = read_holder(tmp(tmp_path))
    assert holder is not None and holder.run == "first"


def test_silent_run_on_another_machine_is_taken_over(tmp_path: Path) -> None:
    write(tmp(tmp_path), elsewhere("dead"))
    said: list[str] = []
    with Lease(tmp(tmp_path), "next", said.append):
        holder = read_holder(tmp(tmp_path))
        assert holder is not None and holder.run == "next"
    assert len(said) == 1 and "a run on far holds" in said[0]


def test_beating_run_on_another_machine_is_not(tmp_path: Path) -> None:
    write(tmp(tmp_path), elsewhere("alive"))

    def beat(_: str) -> None:
        write(tmp(tmp_path), elsewhere("alive", beat=1))

    with pytest.raises(RefusedError, match="on far"), Lease(tmp(tmp_path), "next", beat):
        pass
    assert read_holder(tmp(tmp_path)) == elsewhere("alive", beat=1)


def test_same_pid_after_a_restart_is_another_process(tmp_path: Path) -> None:
    write(tmp(tmp_path), replace(Holder.here("before"), started="1"))
    with Lease(tmp(tmp_path), "next"):
        pass


def test_replaced_holder_stops_and_leaves_the_lease_to_its_successor(tmp_path: Path) -> None:
    stopped = threading.Event()

    def interrupt(*_: object) -> None:
        stopped.set()
        raise Interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(RefusedError, match="took over"), Lease(tmp(tmp_path), "first"):
            write(tmp(tmp_path), elsewhere("second"))
            stopped.wait(30)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.is_set()
    assert read_holder(tmp(tmp_path)) == elsewhere("second")


def test_holder_beats(tmp_path: Path) -> None:
    with Lease(tmp(tmp_path), "first"):
        deadline = threading.Event()
        while (holder := read_holder(tmp(tmp_path))) and holder.beat < 3:
            deadline.wait(0.01)
    assert holder == replace(Holder.here("first"), beat=holder.beat if holder else 0)


def test_workers_are_told_to_stop_once_their_run_drains_or_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LOOK_S", -1.0)
    output = tmp(tmp_path)
    mine, before = Watch(output, "first"), Watch(output, "before")
    assert not mine.says_stop(), "no lease is no reason"
    with Lease(output, "first") as held:
        assert not mine.says_stop()
        assert before.says_stop()
        held.drain()
        waiting = threading.Event()
        while not mine.says_stop():
            waiting.wait(0.01)


def test_watch_looks_anew_on_each_machine(tmp_path: Path) -> None:
    """Their clocks begin when they are booted: when one looked says nothing to another."""
    output = tmp(tmp_path)
    watch = Watch(output, "first")
    with Lease(output, "first"):
        assert not watch.says_stop()
    with Lease(output, "second"):
        assert not watch.says_stop(), "it has just looked"
        again = pickle.loads(pickle.dumps(watch))  # noqa: S301 (our own bytes)
        assert again.says_stop()


@pytest.mark.parametrize(("errors", "is_read"), [(READS - 1, True), (READS, False)])
def test_lease_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: int, is_read: bool
) -> None:
    """As NFS says then: the file that was opened is no more."""
    output, left = tmp(tmp_path), [errors]
    read = output.filesystem.cat_file

    def read_late(path: str) -> bytes:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return bytes(read(path))

    output.replace(LEASE, json.dumps(asdict(Holder.here("first"))).encode())
    monkeypatch.setattr(output.filesystem, "cat_file", read_late)
    if is_read:
        assert read_holder(output)
    else:
        with pytest.raises(StorageError):
            read_holder(output)


def tmp(path: Path) -> Folder:
    return Folder(str(path))
