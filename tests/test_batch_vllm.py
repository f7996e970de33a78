"""Batch API files: answers are those of vLLM's own `run_batch`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from infra import make_batch_data
from pipeline.model import DEMO_MODEL
from tests.batches import BAD_LINES, batch_job, lines_in_order

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
