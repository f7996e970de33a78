"""Batch API files: every line becomes a row, every row a line, as vLLM's `run_batch` has them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import make_batch_data
from jobs import load_task
from pipeline import batch_file
from pipeline.batch_file import files_beside, read_request, split_lines
from pipeline.config import JobConfig, ModelConfig
from pipeline.engine.echo import EchoEngine
from pipeline.errors import (
    InputError,
    JobFileError,
    RefusedError,
    RowError,
    StorageError,
    VerifyError,
)
from pipeline.generate import EngineGenerate
from pipeline.model import DEMO_MODEL
from pipeline.parts import Stamp, commit_part, result_table
from pipeline.plan import Plan, Retry, make_plan, plan_retry
from pipeline.publishing import Publisher
from pipeline.records import Completion, Counts, Output, Receipt
from pipeline.s3 import PatientS3
from pipeline.source import read_units
from pipeline.storage import Folder
from pipeline.tokens import RowText
from pipeline.verify import verify_output
from tests.runs import Job
from tests.s3_store import Store, serving

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
        generate = EngineGenerate(engine, {"max_tokens": 1}, RowText())
        try:
            return await self.task.run(row, generate)
        except RowError as error:
            return Output(None, "rejected", error.reason)

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (self.out / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


# Lines in.


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_is_a_row_that_says_what_is_wrong(batch: Batch, line: bytes) -> None:
    batch.write(as_line(request(1)), b"", line, as_line(request(2)))
    rows = batch.staged().to_pylist()
    assert [row["line"] for row in rows] == [1, 3, 4]
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert BAD_LINES[line] in rows[1]["error"] and SECRET not in rows[1]["error"]
    assert rows[1]["body"] is None


def test_what_is_known_of_a_bad_line_is_kept() -> None:
    assert read_request(as_line(without("body"))).custom_id == "r0"


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf%b\r\n\r\n%b\r\n",
        b"%b\n  \n%b",
        b" %b \n\t\n%b\n\n\n",
    ],
)
def test_line_ends_blanks_and_byte_order_mark_do_no_harm(batch: Batch, text: bytes) -> None:
    batch.write(text % (as_line(request(1)), as_line(request(2))))
    rows = batch.staged().to_pylist()
    assert [(row["line"], row["custom_id"]) for row in rows] == [(1, "r1"), (3, "r2")]
    assert [row["error"] for row in rows] == [None, None]


def test_line_too_long_is_a_bad_line(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 1 << 20)
    long = as_line(request(2, padding="x" * (3 << 20)))
    batch.write(as_line(request(1)), long, as_line(request(3)))
    errors = batch.staged()["error"].to_pylist()
    assert errors == [None, "is longer than 1 MiB", None]


@given(st.lists(st.binary(max_size=9)), st.integers(1, 5))
def test_lines_are_those_between_newlines(parts: list[bytes], piece: int) -> None:
    text = b"\n".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_file, "READ_BYTES", piece)
        lines = list(split_lines(pa.BufferReader(text), limit=5))
    expected = text.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert lines == [line if len(line) <= 5 else None for line in expected]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(), VALUES), st.booleans())
def test_any_body_survives(body: dict[str, Any], is_ascii: bool) -> None:
    line = json.dumps(request(1, body=body), ensure_ascii=is_ascii).encode()
    made = read_request(line)
    assert made.error is None and made.body is not None
    assert json.loads(made.body) == body


def test_staging_needs_no_more_memory_for_more_lines(batch: Batch) -> None:
    line = as_line(request(1, body={"padding": "word " * 200}))
    with (batch.source / "requests.jsonl").open("wb") as file:
        for _ in range(100_000):
            file.write(line + b"\n")
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        assert batch.plan().rows == 100_000
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert python < 3 * batch_file.ROW_GROUP_BYTES
    assert 0 < pool.max_memory() < 4 * batch_file.ROW_GROUP_BYTES
    assert len(line) * 100_000 > 12 * batch_file.ROW_GROUP_BYTES


def test_parquet_among_the_requests_is_refused(
    batch: Batch, write_parquet: Callable[..., Path]
) -> None:
    write_parquet(batch.source / "a.parquet", {"text": ["x"]})
    with pytest.raises(InputError, match=r"a\.parquet: is Parquet"):
        batch.plan()


def test_same_file_staged_as_plain_json_is_not_taken_for_it(tmp_path: Path, batch: Batch) -> None:
    batch.write(as_line(request(1)))
    plain = {"path": str(batch.source)}
    translate = {"kind": "translate", "text": "custom_id", "source": "en", "target": "ko"}
    other = Batch(tmp_path, input=plain, task=translate)
    assert "line" not in other.staged().column_names
    assert "line" in batch.staged().column_names


@pytest.mark.parametrize("text", [b"", b"\n\n"])
def test_file_without_lines_has_no_answers(batch: Batch, text: bytes) -> None:
    batch.write(text)
    assert batch.run().rows == 0
    assert (batch.lines(ANSWERS), batch.lines(ERRORS)) == ([], [])


def test_format_and_kind_go_together(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"input\.format"):
        Batch(tmp_path, input={"path": str(tmp_path)})
    translate = {"kind": "translate", "text": "text", "source": "en", "target": "ko"}
    with pytest.raises(JobFileError, match=r"input\.format"):
        Batch(tmp_path, task=translate)
    with pytest.raises(ValueError, match="goes with `path`"):
        Batch(tmp_path, input={"dataset": "x", "format": "openai-batch"})


# Lines out.


def mixed(batch: Batch) -> None:
    """Two requests with one id, a url that is none, a stream, and a line that is none."""
    streamed = request(4)
    streamed["body"]["stream"] = True
    batch.write(
        as_line(request(1)), as_line(request(2, url="/v1/embeddings")), b"{", b"",
        as_line(request(1)), as_line(streamed), as_line(without("body")),
    )  # fmt: skip


def test_answers_and_errors_are_lines_as_openai_writes_them(batch: Batch) -> None:
    mixed(batch)
    counts = batch.run()
    assert (counts.statuses["ok"], counts.statuses["rejected"]) == (2, 4)
    answers, errors = batch.lines(ANSWERS), batch.lines(ERRORS)
    assert [line["custom_id"] for line in answers] == ["r1", "r1"]
    for line in answers:
        assert list(line) == ["id", "custom_id", "response", "error"] and line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["object"] == "chat.completion"
        assert line["response"]["body"]["choices"][0]["message"]["content"] == "text 1"
    found = [(line["custom_id"], line["error"]["code"], line["error"]["line"]) for line in errors]
    assert found == [("r2", "bad_url", 2), (None, "bad_line", 3), ("r4", "bad_request", 6),
                     ("r0", "bad_line", 7)]  # fmt: skip
    assert [line["response"] and line["response"]["status_code"] for line in errors] == [
        400, None, 400, None,
    ]  # fmt: skip
    assert errors[0]["response"]["body"]["error"]["type"] == "invalid_request_error"
    assert errors[1]["error"]["message"].startswith("line 3: is not valid JSON")
    ids = [line["id"] for line in answers + errors]
    assert len(set(ids)) == 6 and all(name.startswith("batch_req_") for name in ids)


def test_answers_are_one_line_each_by_any_account(batch: Batch) -> None:
    text = "a\u2028b\x85c\u2029d\ne"
    body = {"messages": [{"role": "user", "content": text}]}
    batch.write(as_line(request(1, body=body)))
    batch.run()
    [line] = batch.lines(ANSWERS)
    assert line["response"]["body"]["choices"][0]["message"]["content"] == text


def test_each_file_has_its_own_answers(batch: Batch) -> None:
    batch.write(as_line(request(1)), name="a.jsonl")
    batch.write(as_line(request(2)), as_line(request(3)), name="b.txt")
    batch.run()
    assert [line["custom_id"] for line in batch.lines("a_output.jsonl")] == ["r1"]
    assert [line["custom_id"] for line in batch.lines("b_output.jsonl")] == ["r2", "r3"]
    assert not batch.plan().unpublished  # whose own files do not look like vanished inputs


def test_body_is_sent_as_it_is(batch: Batch) -> None:
    sent: list[Any] = []

    class Recorder(EngineGenerate):
        async def send(self, body: Any) -> Completion:
            sent.append(body)
            return await super().send(body)

    body = {"model": "x", "temperature": 0.5, "messages": [{"role": "user", "content": "a"}]}
    row = {"line": 1, "url": URL, "body": json.dumps(body), "error": None}
    engine = EchoEngine(ModelConfig(id="echo", backend="echo"))
    generate = Recorder(engine, {"max_tokens": 1, "temperature": 0.0}, RowText())
    asyncio.run(batch.task.run(row, generate))
    assert sent == [body]


def failing_first(batch: Batch, row_ids: set[str]) -> Callable[[dict[str, Any]], Any]:
    async def do(row: dict[str, Any]) -> Output:
        messages = json.loads(row["body"])["messages"] if row["body"] else []
        if any(message["content"] in row_ids for message in messages):
            return Output(None, "failed", "engine_error: it fell over")
        return await Batch.do(batch, row)

    return do


def failed_once(batch: Batch) -> Plan:
    """The plan of a retry: of four requests one failed."""
    batch.write(b"{", *(as_line(request(number)) for number in range(4)))
    batch.do = failing_first(batch, {"text 2"})  # type: ignore[method-assign]
    batch.run()
    del batch.do
    [line] = [line for line in batch.lines(ERRORS) if line["error"]["code"] != "bad_line"]
    assert (line["custom_id"], line["response"]["status_code"]) == ("r2", 500)
    assert line["error"]["message"] == "it fell over"
    return plan_retry(batch.plan(), batch.output, Retry("failed", None))


def test_retry_writes_both_files_anew(batch: Batch) -> None:
    plan = failed_once(batch)
    before = batch.lines(ANSWERS)
    batch.run(plan, run="second")
    answers = batch.lines(ANSWERS)
    assert [line["custom_id"] for line in answers] == ["r0", "r1", "r2", "r3"]
    assert [line for line in answers if line["custom_id"] != "r2"] == before
    assert [line["error"]["code"] for line in batch.lines(ERRORS)] == ["bad_line"]
    assert verify_output(batch.plan(), batch.output, COLUMN).rows == 5


# What may go wrong.


@contextmanager
def no_room_for(path: str) -> Iterator[None]:
    """The disk is full when the file is to appear under its name."""
    replacing = Folder.replacing

    @contextmanager
    def failing(folder: Folder, target: str) -> Iterator[IO[bytes]]:
        with replacing(folder, target) as sink:
            yield sink
            if target == path:
                raise StorageError(f"{path}: no space left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "replacing", failing)
        yield


@pytest.mark.parametrize("target", [NAME, ANSWERS, ERRORS])
def test_what_a_crash_left_is_made_whole_by_the_same_command(batch: Batch, target: str) -> None:
    mixed(batch)
    with pytest.raises(StorageError), no_room_for(target):
        batch.run()
    assert not (batch.out / NAME).exists()
    assert (batch.out / ERRORS).exists() == (target != ERRORS)
    assert batch.run(run="second").rows == 6
    assert verify_output(batch.plan(), batch.output, COLUMN).rows == 6


@pytest.mark.parametrize("target", [NAME, ANSWERS, ERRORS])
def test_what_a_crash_of_a_retry_left_is_made_whole_by_a_retry(batch: Batch, target: str) -> None:
    plan = failed_once(batch)
    with pytest.raises(StorageError), no_room_for(target):
        batch.run(plan, run="second")
    if target != ERRORS:
        with pytest.raises(VerifyError, match="repeat the retry"):
            verify_output(batch.plan(), batch.output, COLUMN)
    again = plan_retry(batch.plan(), batch.output, Retry("failed", None))
    assert again.pending_rows == 0
    batch.run(again, run="third")
    assert len(batch.lines(ANSWERS)) == 4
    assert verify_output(batch.plan(), batch.output, COLUMN).rows == 5


@pytest.mark.parametrize("name", [ANSWERS, ERRORS])
def test_file_of_others_is_not_written_over(batch: Batch, name: str) -> None:
    mixed(batch)
    batch.out.mkdir()
    (batch.out / name).write_text('{"id": "batch_req_wnaDys", "custom_id": "request-2"}\n')
    with pytest.raises(RefusedError, match=name):
        batch.plan()


@pytest.mark.parametrize("name", [ANSWERS, ERRORS])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: b"",
        lambda text: text.replace(b'"line": ', b'"line":  ').replace(b"200", b"201"),
        lambda text: text + text.splitlines(keepends=True)[0],
        lambda text: b"".join(reversed(text.splitlines(keepends=True))),
        lambda text: text[: text.rindex(b"\n", 0, -1) + 1],
    ],
    ids=["emptied", "changed", "one more", "other order", "one less"],
)
def test_verify_finds_a_line_that_is_wrong(
    batch: Batch, name: str, spoil: Callable[[bytes], bytes]
) -> None:
    mixed(batch)
    batch.run()
    assert verify_output(batch.plan(), batch.output, COLUMN).rows == 6
    path = batch.out / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(VerifyError, match=name):
        verify_output(batch.plan(), batch.output, COLUMN)
    path.unlink()
    with pytest.raises(VerifyError, match=name):
        verify_output(batch.plan(), batch.output, COLUMN)


def test_files_on_s3_are_the_same_and_may_be_empty(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Store()) as store:
        for name, value in {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "a secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        PatientS3.clear_instance_cache()
        output = {"path": "s3://bucket/out", "column": COLUMN}
        remote = Batch(tmp_path, output=output)
        for lines in ([as_line(request(1))], [b"{"]):
            name = f"{len(lines[0])}.jsonl"
            batch.write(*lines, name=name)
        for each in (batch, remote):
            each.run()
            assert verify_output(each.plan(), each.output, COLUMN).rows == 2
        made = [e.path for e in batch.output.list() if not e.path.startswith("_axbatch")]
        assert [remote.output.read(path) for path in made if path.endswith("jsonl")] == [
            batch.output.read(path) for path in made if path.endswith("jsonl")
        ]
        assert remote.output.read("1_output.jsonl") == b""
    PatientS3.clear_instance_cache()


def test_sweep_knows_all_that_a_shard_writes(batch: Batch) -> None:
    mixed(batch)
    [planned] = batch.plan().shards
    assert planned.shard.files == (NAME, ANSWERS, ERRORS)


def test_sample_is_what_the_script_makes() -> None:
    lines = "".join(f"{line}\n" for line in make_batch_data.make_lines())
    assert make_batch_data.DATA_FILE.read_text(encoding="utf-8") == lines


# Whole runs.


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


@pytest.mark.ray
def test_command_line_answers_a_file_and_resumes(tmp_path: Path) -> None:
    lines = [as_line(request(number)) for number in range(500)]
    lines[100], lines[300] = b"{", b""
    job = batch_job(tmp_path, lines, {"id": "echo", "backend": "echo"})
    summary = job.run()
    assert summary["job"]["statuses"] == {"ok": 498, "rejected": 1, "failed": 0}
    assert job.run()["this_run"]["rows"] == 0
    assert job.verify() == summary["job"]
    expected = [None if n == 100 else f"r{n}" for n in range(500) if n != 300]
    assert [line["custom_id"] for line in lines_in_order(tmp_path)] == expected


ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 4096,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
}


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Of every fifty, forty-six to be answered, one of them twice under one id; one of each that
    the server refuses: a url that is none, a stream, a prompt too long, a wrong parameter."""
    endless = make_batch_data.requests(random.Random(3))
    made = [*islice(endless, count)]
    for number, each in enumerate(made):
        match number % 50:
            case 10:
                each["url"] = "/v1/completions"
            case 20:
                each["body"]["stream"] = True
            case 30:
                each["body"]["messages"][-1]["content"] = "orders and deliveries " * 5_000
            case 35:
                each["body"]["temperature"] = -1.0
            case 40:
                each["custom_id"] = made[number - 1]["custom_id"]
            case 45:
                each["body"]["max_tokens"] = 3
    return made


def vllm_run_batch(folder: Path, lines: list[bytes]) -> list[dict[str, Any]]:
    """The lines of vLLM's own batch runner, in the input's order."""
    given, made = folder / "given.jsonl", folder / "made.jsonl"
    given.write_bytes(b"".join(line + b"\n" for line in lines))
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in ENGINE.items()
    ]
    module = "vllm.entrypoints.launchers.run_batch"
    done = subprocess.run(
        [sys.executable, "-m", module, "-i", given, "-o", made, "--model", DEMO_MODEL,
         "--served-model-name", make_batch_data.MODEL, *options],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()]


def essence(line: dict[str, Any]) -> Any:
    """All of a line but ids, times and what is said of errors."""
    response = line["response"]
    if response["status_code"] != 200:
        assert line["error"]
        return line["custom_id"], response["status_code"]
    body = response["body"]
    choices = [
        (
            choice["message"].get("content"),
            [call["function"] for call in choice["message"].get("tool_calls") or []],
            choice["finish_reason"],
        )
        for choice in body["choices"]
    ]
    usage = [body["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")]
    return line["custom_id"], choices, usage


@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.slow
def test_answers_are_those_of_vllms_own_batch_runner(tmp_path: Path) -> None:
    """But for bad lines, at the first of which that one ends: it gets the file without them."""
    count = 1000
    lines = [make_batch_data.to_line(each).encode() for each in mixed_requests(count)]
    theirs = vllm_run_batch(tmp_path, lines)
    bad = [*BAD_LINES] * 2
    with_bad = [*lines]
    for number, line in enumerate(bad[: count // 50]):
        with_bad.insert(number * 50, line)
    batch_job(tmp_path, with_bad, {"id": "demo", "engine": ENGINE}).run()
    made = lines_in_order(tmp_path)
    ours = [line for line in made if line["response"]]
    assert len(made) - len(ours) == count // 50
    assert len(ours) == len(theirs) == count
    pairs = [(essence(a), essence(b)) for a, b in zip(ours, theirs, strict=True)]
    different = [(a, b) for a, b in pairs if a != b]
    print(f"{count - len(different)} of {count} lines are equal")
    assert not different
    answered = [a for a, _ in pairs if len(a) == 3]
    assert len(answered) == count - 4 * (count // 50)
    assert sum(bool(calls) for _, choices, _ in answered for _, calls, _ in choices) > count // 20
