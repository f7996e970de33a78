"""SIGINT and SIGTERM end a command in order: cleared up, exit code 130."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

from pipeline.errors import Interrupted

HANDLED = (signal.SIGINT, signal.SIGTERM)


def catch_signals() -> None:
    """From now on, the first of these signals raises Interrupted in the main thread. Later ones
    are ignored, so that engines and temporary files are always cleared away."""
    for number in HANDLED:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for handled in HANDLED:
        signal.signal(handled, signal.SIG_IGN)
    raise Interrupted
