"""What `axbatch plan` expects holds what real vLLM then takes."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.demo_model.grammar import Sentence, sentences
from jobs import load_task
from pipeline.accounting import NOTHING_USED, Interval, Usage
from pipeline.errors import RowError
from pipeline.forecast import sampling
from pipeline.forecast.estimate import estimate_job
from pipeline.generate import EngineGenerate
from pipeline.storage import Folder
from pipeline.tokens import RowText
from tests.conftest import asking, make_job, make_plan_of

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="session"),
]

DATASETS, ROWS = 20, 240
AT_LEAST = 18


def texts(number: int) -> list[str]:
    """Dataset `number`: other sentences, other topics, longer or shorter texts; English, or Korean
    where it is odd."""
    dice = random.Random(f"plan {number}")
    topics = {sentence.template.topic for sentence in islice(sentences(dice, held_out=True), 500)}
    chosen = set(dice.sample(sorted(topics), dice.randint(1, 6)))
    stream = sentences(dice, held_out=True, of=lambda template: template.topic in chosen)
    longest = dice.randint(1, 6)

    def text_of(sentence: Sentence) -> str:
        return sentence.ko if number % 2 else sentence.en

    return [
        " ".join(text_of(next(stream)) for _ in range(dice.randint(1, longest)))
        for _ in range(ROWS)
    ]


async def test_actual_tokens_are_inside_the_planned_interval(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "PLACES", 8)  # so that most rows are not looked at
    inside = {"prompt": 0, "completion": 0}
    for number in range(DATASETS):
        folder = tmp_path / str(number)
        languages = ("ko", "en") if number % 2 else ("en", "ko")
        job = make_job(
            folder,
            task=dict(zip(("source", "target"), languages, strict=True)),
            model={"id": "demo", "backend": "vllm"},
            output={"column": "out"},
            sampling={"max_tokens": 256},
        )
        (folder / "in").mkdir(parents=True)
        rows = texts(number)
        pq.write_table(pa.table({"text": rows}), folder / "in" / "a.parquet", row_group_size=16)
        task, plan = load_task(job), make_plan_of(job)
        estimate = await asyncio.to_thread(estimate_job, job, task, plan, Folder(job.output.path))
        tokens = estimate.tokens
        assert tokens is not None
        clean = RowText(demo.control_tokens)

        async def used(text: str, job: Any = job, task: Any = task, clean: Any = clean) -> Usage:
            generate = EngineGenerate(demo, asking(demo), job.sampling.body(), clean)
            with suppress(RowError):
                await task.run({"text": clean(text)}, generate)
            return generate.usage

        total = sum(await asyncio.gather(*map(used, rows)), NOTHING_USED)
        actual = {"prompt": total.prompt_tokens, "completion": total.completion_tokens}
        planned: dict[str, Interval] = {"prompt": tokens.prompt, "completion": tokens.completion}
        for what, interval in planned.items():
            inside[what] += interval.low <= actual[what] <= interval.high
            print(number, what, actual[what], [round(end) for end in interval])
    assert min(inside.values()) >= AT_LEAST, inside
