"""Lanes on real vLLM: YaRN computes what transformers computes, and only long rows meet it."""

from __future__ import annotations

import asyncio
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.demo_model.exam import held_out_sentences
from pipeline.config.model import ModelConfig
from pipeline.engine.vllm import VllmEngine
from pipeline.lanes import yarn_lane
from pipeline.model import DEMO_MODEL
from tests.conftest import CPU_OPTIONS
from tests.runs import Job
from tests.test_vllm import token_ids

pytestmark = pytest.mark.engine

LONG_DOCS = Path(__file__).parents[2] / "shared" / "data" / "long-docs"
NATIVE = 2048
"""Tokens of the demo model's own context."""
MAX_TOKENS = 64


def passage(tokens: int) -> str:
    """Sentences of the demo model's world, as many as fit into so many of its tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    sentences = [sentence.en for sentence in held_out_sentences(1200)]
    ends = accumulate(len(tokenizer.encode(f"{sentence} ")) for sentence in sentences)
    return " ".join(s for s, end in zip(sentences, ends, strict=True) if end <= tokens)


@pytest.mark.asyncio(loop_scope="session")
async def test_greedy_yarn_equals_transformers_token_for_token() -> None:
    """Of prompts within the native window, beyond it, and of all the longer one holds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = ModelConfig(id=str(DEMO_MODEL), engine=CPU_OPTIONS, context="auto")
    lane = yarn_lane(model, 5000)
    engine = VllmEngine(lane.model, cpus=2)
    asked: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": passage(tokens)}],
            "max_tokens": 48,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for tokens in (100, 2500, 4900)
    ]
    answers = await asyncio.gather(*(token_ids(engine, body) for body in asked))
    engine.close()
    assert [len(prompt) > NATIVE for prompt, _ in answers] == [False, True, True]

    overrides = lane.model.engine["hf_overrides"]
    config = AutoConfig.from_pretrained(DEMO_MODEL, **overrides)
    other = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, config=config, dtype=torch.float32)
    for prompt, answer in answers:
        with torch.no_grad():
            made = other.generate(
                torch.tensor([prompt]),
                max_new_tokens=len(answer),
                eos_token_id=None,
                do_sample=False,
            )
        assert made[0, len(prompt) :].tolist() == answer


def lanes_job(folder: Path, **task: Any) -> Job:
    return Job(
        folder,
        task={"kind": "summarize", "text": "text", "overflow": "reject", **task},
        output={"path": str(folder / "out"), "column": "summary"},
        input={"path": str(folder / "in"), "rows_per_unit": 8},
        model={"id": "demo", "engine": CPU_OPTIONS, "context": "auto"},
        sampling={"max_tokens": MAX_TOKENS},
        # A text of thousands of tokens is not of the demo model's world.
        limits={"max_failed_fraction": 1.0},
    )


def test_only_long_rows_meet_the_yarn_engine(tmp_path: Path) -> None:
    texts = [passage(tokens) for tokens in (60, 80, 3000, 1500, 2600, 9000)]
    job = lanes_job(tmp_path)
    job.write_input("a.parquet", pa.table({"text": texts}))
    native, yarn = job.run()["lanes"]
    assert (native["rows"], native["deferred"]) == (4, 2)
    assert yarn["usage"]["requests"] == yarn["rows"] == 2
    rows = pq.read_table(job.output / "a.parquet").to_pylist()
    longest = max(row["_usage"]["prompt_tokens"] for row in rows) + MAX_TOKENS
    assert longest <= yarn["engine"]["max_model_len"] < longest + 80
    assert 1 < yarn["factor"] < (longest + 80) / NATIVE
    assert [row["_usage"]["prompt_tokens"] > NATIVE for row in rows] == [
        False, False, True, False, True, False,
    ]  # fmt: skip
    assert rows[5]["_reason"].startswith("too_long: ")
    assert job.verify()["rows"] == len(texts)
