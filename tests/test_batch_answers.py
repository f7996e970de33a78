"""Batch API files: every row becomes a line, as OpenAI writes them, and verify knows each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.model import ModelConfig
from pipeline.engine.echo import EchoEngine
from pipeline.errors import VerifyError
from pipeline.generate import EngineGenerate
from pipeline.records import Completion
from pipeline.s3 import PatientS3
from pipeline.tokens import RowText
from pipeline.verify import verify_output
from tests.batches import ANSWERS, COLUMN, ERRORS, NAME, URL, Batch, as_line, mixed, request
from tests.conftest import asking
from tests.s3_store import Store, serving


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
    sampling = {"max_tokens": 1, "temperature": 0.0}
    generate = Recorder(engine, asking(engine), sampling, RowText())
    asyncio.run(batch.task.run(row, generate))
    assert sent == [body]


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
