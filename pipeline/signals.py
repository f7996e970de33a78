"""SIGINT and SIGTERM end a command in order: cleared up, exit code 130. SIGTERM, which comes before
a machine goes, first leaves time for what is nearly done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from pipeline.errors import Interrupted

HANDLED = (signal.SIGINT, signal.SIGTERM)

interrupted = threading.Event()
"""Whether Interrupted has been raised: nothing is to be waited for any more."""


def catch_signals() -> None:
    """From now on, the first of these signals raises Interrupted in the main thread. Later ones
    are ignored, so that engines and temporary files are always cleared away."""
    for number in HANDLED:
        signal.signal(number, _interrupt)


@contextmanager
def draining_first(drain: Callable[[], None], grace_s: float) -> Iterator[None]:
    """In this block, the first SIGTERM only calls `drain`; Interrupted is raised if the block still
    runs `grace_s` later, or by one more signal."""

    def on_terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, max(grace_s, 0.001))  # 0 would be never
        drain()

    signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if signal.getsignal(signal.SIGTERM) is on_terminate:
            signal.signal(signal.SIGTERM, _interrupt)


def interrupt() -> NoReturn:
    """End the command, as a signal does."""
    interrupted.set()
    raise Interrupted


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for handled in (*HANDLED, signal.SIGALRM):
        signal.signal(handled, signal.SIG_IGN)
    interrupt()
