"""Batch API files: requests, lines that are none, and jobs on a file of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import load_task
from pipeline.batch_file import files_beside
from pipeline.config import JobConfig
from pipeline.config.model import ModelConfig
from pipeline.engine.echo import EchoEngine
from pipeline.errors import RowError
from pipeline.generate import EngineGenerate
from pipeline.parts import Stamp, commit_part, result_table
from pipeline.plan import Plan, make_plan
from pipeline.publishing import Publisher
from pipeline.records import Counts, Output, Receipt
from pipeline.source import read_units
from pipeline.storage import Folder
from pipeline.tokens import RowText
from tests.conftest import asking
from tests.runs import Job

COLUMN = "response"
URL = "/v1/chat/completions"
NAME = "requests.parquet"
ANSWERS, ERRORS = files_beside(NAME)
SECRET = "p4ssw0rd"  # in lines that are none: must not be in what is said of them


def request(number: int, **changes: Any) -> dict[str, Any]:
    body = {"model": "any", "messages": [{"role": "user", "content": f"text {number}"}]}
    return {"custom_id": f"r{number}", "method": "POST", "url": URL, "body": body, **changes}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in request(0).items() if name != key}


def as_line(value: Any) -> bytes:
    return json.dumps(value).encode()


BAD_LINES = {
    b"{": "is not valid JSON: EOF while parsing an object at byte ",
    b'{"a": "%b' % SECRET.encode(): "is not valid JSON: EOF while parsing a string at byte ",
    as_line(request(0)) + as_line(request(1)): "is not valid JSON: trailing characters at byte ",
    b'{"a": "\xff"}': "is not valid JSON: invalid unicode code point at byte ",
    b'{"a": NaN}': "is not valid JSON: expected value at byte ",
    rb'{"a": "\ud800"}': "is not valid JSON: unexpected end of hex escape at byte ",
    b'{"a":' + b"[" * 300: "is not valid JSON: recursion limit exceeded at byte ",
    b'["%b"]' % SECRET.encode(): "is not a JSON object",
    b"null": "is not a JSON object",
    as_line(without("custom_id")): "has no `custom_id`",
    as_line(without("method")): "has no `method`",
    as_line(without("url")): "has no `url`",
    as_line(without("body")): "has no `body`",
    as_line(request(0, custom_id=None)): "`custom_id` is not a string",
    as_line(request(0, custom_id=7)): "`custom_id` is not a string",
    as_line(request(0, url=[SECRET])): "`url` is not a string",
    as_line(request(0, body=SECRET)): "`body` is not an object",
    as_line(request(0, body={"a": 1})).replace(b"1}", b"1e999}"): "a number in its `body` that is",
}


class Batch:
    """A job on one file of requests, done by the echo engine in this process."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.source = folder / "in"
        self.source.mkdir(exist_ok=True)
        self.job = JobConfig.model_validate({
            "name": "batch",
            "task": {"kind": "openai-batch"},
            "input": {"path": str(self.source), "format": "openai-batch", "rows_per_unit": 2},
            "output": {"path": str(folder / "out"), "column": COLUMN},
            "model": {"id": "echo", "backend": "echo"},
            **sections,
        })  # fmt: skip
        self.task, self.output = load_task(self.job), Folder(self.job.output.path)
        self.out = folder / "out"

    def write(self, *lines: bytes, name: str = "requests.jsonl") -> None:
        (self.source / name).write_bytes(b"\n".join(lines))

    def plan(self) -> Plan:
        return make_plan(self.job, self.task, "identity")

    def staged(self) -> pa.Table:
        [planned] = self.plan().shards
        with planned.shard.source.open(planned.shard.path) as file:
            return pq.read_table(file)

    def run(self, plan: Plan | None = None, run: str = "first") -> Counts:
        plan = plan or self.plan()
        with Publisher(plan, self.output, self.task, COLUMN, run) as publisher:
            for planned in plan.shards:
                shard = planned.shard
                for unit, rows in read_units(
                    shard.source,
                    shard.path,
                    self.task.columns,
                    list(planned.units()),
                    shard.selected,
                ):
                    outputs = [asyncio.run(self.do(row)) for row in rows.to_pylist()]
                    stamp = Stamp("identity", unit.shard, shard.fingerprint, unit.start,
                                  unit.stop, Counts(), run)  # fmt: skip
                    table = result_table(outputs, COLUMN, pa.string())
                    commit_part(self.output, stamp, table)
                    publisher.received(Receipt(unit, Counts(), "here:1", 0.0))
        return publisher.counts

    async def do(self, row: dict[str, Any]) -> Output:
        engine = EchoEngine(ModelConfig(id="echo", backend="echo"))
        generate = EngineGenerate(engine, asking(engine), {"max_tokens": 1}, RowText())
        try:
            return await self.task.run(row, generate)
        except RowError as error:
            return Output(None, "rejected", error.reason)

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (self.out / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def mixed(batch: Batch) -> None:
    """Two requests with one id, a url that is none, a stream, and a line that is none."""
    streamed = request(4)
    streamed["body"]["stream"] = True
    batch.write(
        as_line(request(1)), as_line(request(2, url="/v1/embeddings")), b"{", b"",
        as_line(request(1)), as_line(streamed), as_line(without("body")),
    )  # fmt: skip


def batch_job(folder: Path, lines: list[bytes], model: dict[str, Any]) -> Job:
    (folder / "in").mkdir(parents=True)
    (folder / "in/requests.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return Job(
        folder,
        task={"kind": "openai-batch"},
        input={"path": str(folder / "in"), "format": "openai-batch", "rows_per_unit": 32},
        output={"path": str(folder / "out"), "column": COLUMN},
        model=model,
        limits={"max_failed_fraction": 1.0},
    )


def lines_in_order(folder: Path) -> list[dict[str, Any]]:
    """Both files' lines, in the input's order: an id ends with the line's number."""
    texts = [(folder / "out" / name).read_text(encoding="utf-8") for name in (ANSWERS, ERRORS)]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    return sorted(lines, key=lambda line: line["id"])
