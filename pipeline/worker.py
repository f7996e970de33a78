"""The worker: one engine and one task, many rows and units at once, one commit per unit."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa

from jobs import load_task
from pipeline.attempts import (
    Crash,
    Journal,
    bury,
    bury_the_dead,
    crashed_alone,
    crashes_of,
    is_suspect,
    may_start_again,
    pieces,
    read_crashes,
)
from pipeline.config import JobConfig
from pipeline.config.costs import AccountingConfig
from pipeline.config.running import ReplicaRange
from pipeline.counting import (
    CountTokens,
    TextCounter,
    load_baseline,
    load_tokenizer,
)
from pipeline.engine import Engine, EngineGone, check_options, start_engine
from pipeline.errors import (
    AxbatchError,
    EngineError,
    RowDeferred,
    RowError,
    RowFailed,
    RowRejected,
    StorageError,
    place_of,
)
from pipeline.generate import EngineGenerate, expected_length
from pipeline.lanes import Lane, yarn_lane
from pipeline.lease import Watch
from pipeline.ledger import RUNS, leave_reading
from pipeline.logs import engines_lock, machine_folder, redirect_output, root_cause
from pipeline.metrics import Metrics
from pipeline.model import resolve_model
from pipeline.parquet import python_rows
from pipeline.parts import (
    Stamp,
    commit_part,
    read_counts_inside,
    read_part_counts,
    result_table,
)
from pipeline.reaper import guard_children
from pipeline.receipt import NOT_BEGUN, encode_receipt
from pipeline.records import DEFERRED, Completion, Counts, Output, Receipt, Row, Unit
from pipeline.repeats import Repeats
from pipeline.schedule import Schedule
from pipeline.source import decode_unit
from pipeline.storage import Folder
from pipeline.task import LongTextTask
from pipeline.tokens import RowText

COLLECT_AFTER = 50_000
"""Objects that are new, before Python looks for cycles among them, in place of 700: thousands of
rows are begun at once, and to go through their objects again and again took a fifth of all time."""


@dataclass(frozen=True)
class Resources:
    """What one replica reserves, and how many there are to be."""

    gpus: int
    cpus: int
    replicas: ReplicaRange
    at_first: int = 1
    """Replicas to begin with: as many as there is room for now."""


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to know; travels to it once."""

    job: JobConfig
    lane: Lane
    identity: str
    run: str
    log: Path
    share: Resources
    output: Folder
    """The driver's, which knows whether the store has answered before."""
    watch: Watch
    is_retry: bool
    """Whether its rows have been counted before."""


class Worker:
    """The callable of Ray Data's map: a block with one unit in, a block with its receipt out."""

    def __init__(self, spec: WorkerSpec) -> None:
        redirect_output(spec.log)
        guard_children(engines_lock(spec.run))
        self._spec = spec
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._task = load_task(spec.job)
        self._output = spec.output
        self._sampling = spec.job.sampling.body()
        self._counting = Lock()
        self._failure: AxbatchError | EngineGone | None = None
        try:
            engines = f"{spec.run}.{spec.lane.name}"
            bury_the_dead(machine_folder(), spec.run, engines, self._output)
            self._journal = Journal(machine_folder(), engines)
            self._engine = _start_engine(spec)
            self._texts = _text_counter(spec.job.accounting, self._engine)
        except AxbatchError as error:
            # Ray would make text of it; as the answer to the first unit it reaches the user whole.
            traceback.print_exception(error)
            self._failure = error
            if isinstance(error, EngineError) and may_start_again(
                machine_folder(), spec.run, _works_elsewhere(spec)
            ):
                self._failure = EngineGone(str(error.args[0]))
            return
        gc.set_threshold(COLLECT_AFTER)
        self._clean = RowText(self._engine.control_tokens)
        wanted = spec.job.schedule
        self._schedule = Schedule(self._engine.max_num_seqs, wanted.longest_first)
        self._ask = Repeats(self._compute).ask if wanted.reuse_answers else self._ask_anew
        self._metrics = Metrics(spec.job.name, spec.lane.name, self._engine.max_num_seqs)

    async def __call__(self, block: pa.Table) -> dict[str, list[str]]:
        try:
            if self._failure:
                raise self._failure
            receipt = await self._do_unit(block)
            return {"receipt": [encode_receipt(receipt) if receipt else NOT_BEGUN]}
        except AxbatchError as error:
            return {"receipt": [error.to_json()]}
        except EngineGone as gone:
            # Ray retries the units elsewhere and replaces this worker only if the process ends.
            # Nothing else may run meanwhile, so this blocks the loop.
            print(f"axbatch: engine of {self._name} is gone: {gone}", flush=True)
            with suppress(StorageError):  # the next worker on this machine tries again
                bury(self._journal.path, self._output)
            if not self._failure:
                with suppress(StorageError):  # then what it did since the last unit is not known
                    leave_reading(
                        self._output, self._spec.run, self._name, self._engine.meter.read()
                    )
            os._exit(1)

    async def _do_unit(self, block: pa.Table) -> Receipt | None:
        """None if it has not begun, as the watch says stop."""
        started = time.monotonic()
        unit, fingerprint, table = decode_unit(block)
        if await asyncio.to_thread(self._spec.watch.says_stop):
            return None  # of thousands of units that are read already, perhaps
        rows = python_rows(table)
        of_shard = await asyncio.to_thread(read_crashes, self._output, unit.shard)
        crashes, counts = crashes_of(unit, of_shard), None
        if of_shard:  # a worker may have died after its commit, and before Ray had the receipt
            counts = await asyncio.to_thread(read_part_counts, self._output, unit)
        if counts is None and is_suspect(crashes):
            counts = await self._do_suspect(unit, fingerprint, rows, crashes)
            if counts is None:
                return None
        elif counts is None:
            async with self._schedule.together(unit.rows):
                started = time.monotonic()
                if await asyncio.to_thread(self._spec.watch.says_stop):
                    self._schedule.finished(unit.rows)
                    return None
                outputs = await self._run_rows(unit, rows, alone=False)
            counts = await asyncio.to_thread(self._commit, unit, fingerprint, rows, outputs)
        seconds, reading = time.monotonic() - started, self._engine.meter.read()
        self._metrics.committed(counts, seconds, reading, self._engine.meter.in_flight)
        return Receipt(unit, counts, self._name, seconds, reading)

    async def _do_suspect(
        self,
        unit: Unit,
        fingerprint: str,
        rows: Sequence[Row | RowError],
        crashes: Sequence[Crash],
    ) -> Counts | None:
        """Piece by piece with nothing else in the engine, each committed at once: the pieces that
        are done stay done when the next one kills the engine. None if the watch says stop."""
        counts = Counts()
        done = await asyncio.to_thread(read_counts_inside, self._output, unit)
        async with self._schedule.alone():
            for piece in pieces(unit, crashes):
                if piece in done:
                    counts.add(done[piece])
                    continue
                if await asyncio.to_thread(self._spec.watch.says_stop):
                    return None
                piece_rows = rows[piece.start - unit.start : piece.stop - unit.start]
                is_killer = piece.rows == 1 and crashed_alone(piece, crashes)
                if is_killer:
                    outputs = [Output(None, "failed", "engine_crash")]
                else:
                    outputs = await self._run_rows(piece, piece_rows, alone=True)
                counts.add(
                    await asyncio.to_thread(self._commit, piece, fingerprint, piece_rows, outputs)
                )
                if is_killer:
                    self._journal.judged(piece)
        return counts

    async def _run_rows(
        self, unit: Unit, rows: Sequence[Row | RowError], alone: bool
    ) -> list[Output]:
        with self._journal.holding(unit, alone):
            return await asyncio.gather(*map(self._run_row, rows))

    async def _run_row(self, row: Row | RowError) -> Output:
        """One row's output, whatever happens to it. What concerns all rows passes: EngineGone,
        and every AxbatchError that is no RowError."""
        generate = EngineGenerate(
            self._engine,
            self._ask,
            self._sampling,
            self._clean,
            longest=self._spec.lane.longest,
            defers=not isinstance(self._task, LongTextTask),
        )
        try:
            if isinstance(row, RowError):
                raise row
            given = row if self._task.wants_raw_rows else self._clean(row)
            output = checked(await self._task.run(given, generate), self._task.output_type)
        except RowRejected as error:
            output = Output(None, "rejected", error.reason)
        except RowDeferred as error:
            output = Output(None, "deferred", error.reason, needs=error.tokens)
        except RowFailed as error:
            output = Output(None, "failed", error.reason)
        except (EngineGone, AxbatchError):
            raise
        except Exception as error:
            # A bug in a task kind is this row's trouble, not the job's.
            output = Output(None, "failed", f"task_error: {bug_of(error)}")
        finally:
            self._schedule.finished(rows=1)
        return output._replace(
            usage=generate.usage,
            cut=generate.cut,
            reasoning_tokens=generate.reasoning_tokens,
        )

    async def _ask_anew(self, body: Mapping[str, Any]) -> tuple[Completion, bool]:
        return await self._compute(body), False

    async def _compute(self, body: Mapping[str, Any]) -> Completion:
        """The engine's answer, once it is this request's turn."""
        await self._schedule.request(expected_length(body))
        try:
            return await self._engine.chat(body)
        finally:
            self._schedule.answered()

    def _commit(
        self,
        unit: Unit,
        fingerprint: str,
        rows: Sequence[Row | RowError],
        outputs: Sequence[Output],
    ) -> Counts:
        counts = Counts()
        results = _encodable(outputs)
        counts.count(*results)
        column, texts = self._spec.job.output.column, None
        columns = self._columns(rows, results)
        with self._counting:
            if self._spec.job.accounting.rows:
                counts.account.texts, texts = self._texts.count_rows(columns, column)
            else:
                counts.account.texts = self._texts.count(columns, unit.start)
        stamp = Stamp(
            identity=self._spec.identity,
            shard=unit.shard,
            fingerprint=fingerprint,
            start=unit.start,
            stop=unit.stop,
            counts=counts,
            run=self._spec.run,
        )
        table = result_table(results, column, self._task.output_type, texts)
        commit_part(self._output, stamp, table)
        return counts

    def _columns(
        self, rows: Sequence[Row | RowError], outputs: Sequence[Output]
    ) -> dict[str, list[Any]]:
        """The texts to count, by column; each row of the input's once, where it gets a status."""
        columns = {self._spec.job.output.column: [output.value for output in outputs]}
        if not self._spec.is_retry:
            given = [
                {} if isinstance(row, RowError) or output.status == DEFERRED else row
                for row, output in zip(rows, outputs, strict=True)
            ]
            columns |= {name: [row.get(name) for row in given] for name in self._task.columns}
        return columns


def _works_elsewhere(spec: WorkerSpec) -> bool:
    """Whether an engine of the run has worked, by its record, which is written now and then."""
    with suppress(FileNotFoundError, StorageError):
        return bool(json.loads(spec.output.read(f"{RUNS}/{spec.run}.json"))["workers"])
    return False


def _start_engine(spec: WorkerSpec) -> Engine:
    log_size = spec.log.stat().st_size
    try:
        silence = spec.job.limits.max_engine_silence_s
        if spec.lane.longest:
            later = resolve_model(yarn_lane(spec.job.model, spec.lane.longest).model)
            check_options(later, "model.yarn.engine")
        cpus = 0 if spec.share.gpus else spec.share.cpus
        return start_engine(resolve_model(spec.lane.model), cpus, silence)
    except EngineError as error:
        # vLLM's own processes have logged the reason; what reaches us only says that there is one.
        cause = root_cause(spec.log, log_size) or str(error.args[0])
        place = spec.log if spec.output.is_local else f"{socket.gethostname()}:{spec.log}"
        hint = error.hint or f"The log says more: {place}"
        raise EngineError(f"the engine did not start: {cause}", hint) from error


def _text_counter(accounting: AccountingConfig, engine: Engine) -> TextCounter:
    model: CountTokens | None = engine.count_tokens if engine.counts_exactly else None
    if accounting.tokenizer:
        model = load_tokenizer(accounting.tokenizer, "accounting.tokenizer")
    return TextCounter(
        model,
        load_baseline(accounting.baseline) if accounting.baseline else None,
        accounting.sample,
    )


def checked(output: Any, value_type: pa.DataType) -> Output:
    """What a task returned. Raises TypeError if that is no Output, or its value not of the type
    of the result column; Arrow would make a list of a string's letters."""
    if not isinstance(output, Output):
        raise TypeError(f"`run` returned {type(output).__name__}, not Output")
    value = output.value
    is_text = pa.types.is_string(value_type) or pa.types.is_large_string(value_type)
    if value is None or (is_text and isinstance(value, str)):
        return output
    if not is_text and not isinstance(value, str):
        with suppress(pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            pa.scalar(value, value_type)
            return output
    raise TypeError(f"the value is {type(value).__name__}, the column {value_type}")


def bug_of(error: Exception) -> str:
    """Its type and place; or its message, if that is our own."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return str(error) if frame.name == checked.__name__ else place_of(error)


def _encodable(outputs: Sequence[Output]) -> list[Output]:
    """Outputs whose text Parquet can hold: a lone surrogate has no UTF-8."""
    return [
        output
        if _is_utf8(output.value) and _is_utf8(output.reason)
        else output._replace(value=None, status="failed", reason="invalid_utf8")
        for output in outputs
    ]


def _is_utf8(value: Any) -> bool:
    """Whether all text in `value` is, at any depth."""
    if value is None:
        return True
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    elif isinstance(value, Mapping):
        return all(_is_utf8(key) and _is_utf8(item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        return all(map(_is_utf8, value))
    return True
