"""Extract on real vLLM: whatever the text, the answer follows the schema and becomes a column."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.demo_model.extraction import make_case, some_schema
from jobs.extract import Extract
from pipeline.config.model import ModelConfig
from pipeline.engine.vllm import VllmEngine
from pipeline.generate import EngineGenerate
from pipeline.model import DEMO_MODEL
from pipeline.parts import result_table
from pipeline.records import Output
from pipeline.tokens import RowText
from tests.conftest import CPU_OPTIONS, asking

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

WITHOUT_BLANKS = {"backend": "xgrammar", "disable_any_whitespace": True}
"""A model that was never taught such JSON may go on with the blanks in it for ever."""

LINE = {
    "type": "object",
    "properties": {
        "item": {"type": "string", "maxLength": 30},
        "quantity": {"type": "integer", "minimum": 0, "maximum": 1000},
        "price": {"type": "number", "minimum": 0, "maximum": 1e7},
    },
    "required": ["item", "quantity"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "customer": {"type": "string", "maxLength": 40},
        "status": {"enum": ["new", "paid", "shipped"]},
        "note": {"type": ["string", "null"], "maxLength": 40},
        "lines": {"type": "array", "minItems": 1, "maxItems": 3, "items": LINE},
        "gift": {"type": "boolean"},
    },
    "required": ["customer", "status", "lines"],
}
TYPE = pa.struct([
    ("customer", pa.string()),
    ("status", pa.string()),
    ("note", pa.string()),
    ("lines", pa.list_(pa.struct([
        ("item", pa.string()), ("quantity", pa.int64()), ("price", pa.float64()),
    ]))),
    ("gift", pa.bool_()),
])  # fmt: skip


def texts(count: int) -> list[str]:
    dice = random.Random(5)
    return [make_case(*some_schema(dice), dice).text for _ in range(count)]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


async def test_nested_data_of_every_text_is_valid_and_typed(tmp_path: Path) -> None:
    """The demo model never saw such a schema; the engine keeps it to it all the same."""
    options = {**CPU_OPTIONS, "structured_outputs_config": WITHOUT_BLANKS}
    engine = VllmEngine(ModelConfig(id=str(DEMO_MODEL), engine=options), cpus=2)
    task = Extract.model_validate({"kind": "extract", "text": "text", "schema": SCHEMA})
    sampling = {"temperature": 0.0, "max_tokens": 384}

    async def extracted(text: str) -> Output:
        generate = EngineGenerate(engine, asking(engine), sampling, RowText())
        return await task.run({"text": text}, generate)

    outputs = await asyncio.gather(*map(extracted, texts(60)))
    engine.close()
    pq.write_table(result_table(outputs, "data", task.output_type), tmp_path / "a.parquet")
    data = pq.read_table(tmp_path / "a.parquet")["data"]
    assert data.cast(TYPE).equals(data.cast(task.output_type))
    assert task.output_type == TYPE
    check = jsonschema.Draft202012Validator(SCHEMA)
    assert all(check.is_valid(without_nulls(row)) for row in data.to_pylist())
    assert data.null_count == 0
