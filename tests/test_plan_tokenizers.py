"""Which tokenizer a plan counts with: the model's and its template, or one in its place."""

import json
from collections.abc import Callable
from typing import Any

from pipeline.forecast.sketch import load_tokens
from pipeline.model import DEMO_MODEL
from tests.conftest import PreparedJob
from tests.forecasts import estimate

Prepare = Callable[..., PreparedJob]


def test_prompts_are_counted_with_the_models_template(prepared: Prepare) -> None:
    from transformers import AutoTokenizer

    tokens = load_tokens(prepared(model={"id": "demo", "backend": "vllm"}).config)
    assert tokens.is_exact and "<|im_end|>" in tokens.control_tokens
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    function = {"name": "f", "description": "A function.", "parameters": {"type": "object"}}
    tool = {"type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    plain = json.loads(json.dumps(messages))
    plain[1]["content"] = "Hello"
    plain[2]["tool_calls"][0]["function"]["arguments"] = {"a": 1}
    ids = tokenizer.apply_chat_template(
        plain, tools=[tool], add_generation_prompt=True, return_dict=False
    )
    assert tokens.of({"messages": messages, "tools": [tool]}) == len(ids)
    assert tokens.shared == len(ids)
    tokens.of({"messages": [{"role": "user", "content": "Other"}]})
    assert 0 < tokens.shared < 8


def test_a_server_without_a_tokenizer_has_a_stand_in(prepared: Prepare) -> None:
    model = {"id": "m", "backend": "http", "base_url": "http://localhost:9/v1"}
    compare = [{"name": "x", "input": 1.0, "output": 1.0}]
    texts = ["Some text in English."] * 40
    job = prepared(texts, model=model, accounting={"compare": compare})
    found = estimate(job)
    assert found.tokens and not found.tokens.is_exact
    assert "o200k_base, in the place" in found.tokens.source
    assert found.tokens.ratios is None and not found.compared
    assert any("accounting.tokenizer" in line for line in found.missing)
    named = {"tokenizer": str(DEMO_MODEL), "compare": compare}
    known = estimate(job.changed(model=model, accounting=named))
    assert known.tokens and known.tokens.ratios and known.compared
    assert known.tokens.prompt != found.tokens.prompt
