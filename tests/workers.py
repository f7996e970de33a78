"""Workers in this process, without Ray and without its precautions for processes that die."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import worker
from pipeline.config import JobConfig
from pipeline.config.model import ModelConfig
from pipeline.engine import Engine
from pipeline.engine.echo import EchoEngine
from pipeline.lanes import first_lane
from pipeline.lease import Watch
from pipeline.receipt import decode_receipt
from pipeline.records import Receipt, Unit
from pipeline.source import encode_unit
from pipeline.storage import Folder
from pipeline.worker import Worker, WorkerSpec
from tests.faults.without_ray import ONE


def spec_here(
    job: JobConfig,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: Callable[[ModelConfig], Engine] = EchoEngine,
) -> WorkerSpec:
    """For a `Worker` with such an engine."""
    monkeypatch.setattr(worker, "machine_folder", lambda: folder / "machine")
    monkeypatch.setattr(worker, "guard_children", lambda lock: None)
    monkeypatch.setattr(worker, "redirect_output", lambda log: None)
    monkeypatch.setattr(worker, "start_engine", lambda model, cpus, silence: engine(model))
    log = folder / "log"
    log.touch()
    output = Folder(job.output.path)
    lane, watch = first_lane(job.model), Watch(output, "run")
    return WorkerSpec(job, lane, "identity", "run", log, ONE, output, watch, is_retry=False)


async def do_unit(alive: Worker, unit: Unit, rows: dict[str, Any]) -> Receipt | None:
    """The unit's rows as columns. None if the run drains."""
    block = encode_unit(unit, "1:x", pa.table(rows))
    return decode_receipt((await alive(block))["receipt"][0])
