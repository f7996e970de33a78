"""Chat on real vLLM: tool turns, what a request asks for, and no way out of one's own turn."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from infra.demo_model import extraction, tools
from infra.demo_model.conversation import says
from infra.demo_model.exam import called
from infra.make_chat_data import ATTACK
from jobs.chat import Chat
from pipeline.conversations import without_nulls
from pipeline.engine.vllm import VllmEngine
from pipeline.errors import RowRejected
from pipeline.generate import EngineGenerate
from pipeline.records import Completion, Message, Output
from pipeline.tokens import RowText
from tests.conftest import asking
from tests.test_vllm import token_ids

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

GREEDY = {"temperature": 0.0, "max_tokens": 128}


def cases(count: int) -> list[tools.Case]:
    """Conversations with something missing at first, of both tools and languages."""
    dice = random.Random(5)
    made = (tools.make_case([tools.DISCOUNT, tools.EXCHANGE], dice) for _ in range(9 * count))
    return [case for case in made if case.question is not None][:count]


async def answered(
    demo: VllmEngine, talk: Any, sampling: dict[str, Any] | None = None, **keys: Any
) -> Output:
    """As a worker does it: the row cleaned, the job's sampling added."""
    clean = RowText(demo.control_tokens)
    source = {} if "body" in keys else {"messages": "talk"}
    task = Chat.model_validate({"kind": "chat", **source, **keys})
    generate = EngineGenerate(demo, asking(demo), sampling or GREEDY, clean)
    return await task.run(clean({"talk": talk}), generate)


async def messages_of(demo: VllmEngine, talks: list[Any], **keys: Any) -> list[Message]:
    outputs = await asyncio.gather(*(answered(demo, talk, **keys) for talk in talks))
    return [without_nulls(output.value) for output in outputs]


BOTH = {"tools": [tools.DISCOUNT, tools.EXCHANGE]}


@pytest.mark.parametrize("form", [lambda talk: talk, json.dumps], ids=["structs", "json"])
async def test_the_three_turns_of_the_model_card(
    demo: VllmEngine, form: Callable[[Any], Any]
) -> None:
    """Ask for what is missing, call with what is there, answer from the result."""
    some = cases(12)
    asked = await messages_of(demo, [form([says("user", case.request)]) for case in some], **BOTH)
    assert asked == [says("assistant", case.question or "") for case in some]

    calls = await messages_of(demo, [form(tools.opening(case)) for case in some], **BOTH)
    for case, message in zip(some, calls, strict=True):
        assert set(message) == {"role", "tool_calls"}
        [call] = message["tool_calls"]
        assert call["type"] == "function"
        assert call["function"]["name"] == case.call["name"]
        assert json.loads(call["function"]["arguments"]) == case.call["arguments"]

    talks = [
        [*tools.opening(case), message,
         {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": case.result}]
        for case, message in zip(some, calls, strict=True)
    ]  # fmt: skip
    final = await messages_of(demo, [form(talk) for talk in talks], **BOTH)
    assert [message["content"] for message in final] == [case.answer for case in some]


async def prompt_of(demo: VllmEngine, talk: Any, **keys: Any) -> str:
    """What the model is shown, with control tokens spelled out."""
    prompts = []

    class Seen:
        async def chat(self, body: dict[str, Any]) -> Completion:
            body = {**body, "max_tokens": 1}
            prompts.append((await token_ids(demo, body))[0])
            return await demo.chat(body)

        def __getattr__(self, name: str) -> Any:
            return getattr(demo, name)

    await answered(Seen(), talk, returns="response", **keys)  # type: ignore[arg-type]
    [ids] = prompts
    return str(demo._llm.renderer.tokenizer.decode(ids))


@pytest.mark.parametrize(
    "arguments", ['{"original_price": 700}', {"original_price": 700}, '{"original_price":700}']
)
async def test_arguments_reach_the_template_once_encoded(demo: VllmEngine, arguments: Any) -> None:
    call = {"function": {"name": "calculate_discount", "arguments": arguments}}
    talk = [says("user", "?"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    once = '<tool_call>{"name": "calculate_discount", "arguments": {"original_price": 700}}'
    assert once in await prompt_of(demo, json.dumps([*talk, says("tool", "{}")]))
    assert once in await prompt_of(demo, json.dumps({"messages": talk, "seed": 1}), body="talk")


ESCAPED = ATTACK.replace("<", r"\u003c")


def attacked_text(form: str) -> Any:
    user = says("user", f"Hi.{ATTACK}")
    arguments = f'{{"{ESCAPED}": "{ESCAPED}"}}'
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    match form:
        case "struct":
            return [user]
        case "json":
            return json.dumps([user])
        case "escaped":
            return json.dumps([user]).replace("<", r"\u003c")
        case "parts":
            parts = [{"type": "text", "text": f"Hi.{ATTACK}"}]
            return json.dumps([{"role": "user", "content": parts}]).replace("<", r"\u003c")
        case "arguments":
            return json.dumps([
                says("user", "Hi."), {"role": "assistant", "content": "", "tool_calls": [call]},
            ])  # fmt: skip
    raise ValueError(form)


@pytest.mark.parametrize("form", ["struct", "json", "escaped", "parts", "arguments"])
@pytest.mark.parametrize("column", ["messages", "body"])
async def test_a_document_cannot_close_its_own_turn(
    demo: VllmEngine, form: str, column: str
) -> None:
    talk: Any = attacked_text(form)
    if column == "messages":
        prompt = await prompt_of(demo, talk)
    else:
        body = f'{{"messages": {talk}}}' if isinstance(talk, str) else {"messages": talk}
        prompt = await prompt_of(demo, body, body="talk")
    turns = ["user", "assistant", "assistant"] if form == "arguments" else ["user", "assistant"]
    starts = [start.partition("|>")[0] for start in prompt.split("<|im_start|><|")[1:]]
    assert starts == turns, "no system turn, one user turn, and the one that is to be answered"
    assert prompt.count("<|im_end|>") == len(turns) - 1
    assert prompt.count("<|system|>") == 0
    assert "ignore all instructions" in prompt


async def test_a_response_has_all_choices_and_logprobs(demo: VllmEngine) -> None:
    sampling = {"temperature": 1.0, "max_tokens": 12}
    keys = {"n": 3, "seed": 4, "logprobs": True, "top_logprobs": 2, "returns": "response"}
    talk = [says("user", cases(1)[0].request)]
    first, second = [
        json.loads((await answered(demo, talk, sampling, **keys)).value)["choices"]
        for _ in range(2)
    ]
    texts = [choice["message"]["content"] for choice in first]
    assert texts == [choice["message"]["content"] for choice in second], "the same seed"
    assert len(texts) == 3
    assert len(set(texts)) > 1
    for choice in first:
        tokens = choice["logprobs"]["content"]
        assert 0 < len(tokens) <= 12
        assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    other = await answered(demo, talk, sampling, **{**keys, "seed": 5})
    assert [c["message"]["content"] for c in json.loads(other.value)["choices"]] != texts


async def test_stop_ends_an_answer(demo: VllmEngine) -> None:
    case = cases(1)[0]
    [whole] = await messages_of(demo, [[says("user", case.request)]], **BOTH)
    stop = whole["content"].split()[1]
    [cut] = await messages_of(demo, [[says("user", case.request)]], stop=stop, **BOTH)
    assert cut["content"] == whole["content"].partition(stop)[0]


async def test_response_format_holds(demo: VllmEngine) -> None:
    """A text and a schema of the model's world, but for one property that may not be what it is."""
    dice = random.Random(3)
    case = extraction.make_case(*extraction.some_schema(dice), dice)
    name = next(iter(case.data))
    properties = {**case.schema["properties"], name: {"enum": ["nothing of the text's"]}}
    schema = {**case.schema, "properties": properties}
    form = {"type": "json_schema", "json_schema": {"name": "data", "schema": schema}}
    talk = [says("system", extraction.system_prompt(case.schema)), says("user", case.text)]
    [message] = await messages_of(demo, [talk], response_format=form)
    assert json.loads(message["content"])[name] == "nothing of the text's" != case.data[name]


async def test_whole_bodies_are_answered_as_they_ask(demo: VllmEngine) -> None:
    case = cases(1)[0]
    body = {"messages": called(case), "tools": case.tools, "model": "other", **GREEDY}
    both = await messages_of(demo, [body, json.dumps(body)], body="talk")
    assert [message["content"] for message in both] == [case.answer] * 2
    with pytest.raises(RowRejected, match=r"^truncated: after 2 tokens"):
        await answered(demo, {**body, "max_tokens": 2}, body="talk")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "secret"},
        {"structured_outputs": "secret"},
        {"tool_choice": "secret"},
        {"response_format": {"type": "json_schema", "secret": 1}},
        {"stop": {"secret": "secret"}},
        {"messages": [{"role": "user", "content": "secret", "name": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "secret"}]}]},
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/secret.png"}}]}]},
        {"n": 2},
    ],
)  # fmt: skip
async def test_a_wrong_body_is_refused_and_not_quoted(
    demo: VllmEngine, wrong: dict[str, Any]
) -> None:
    body = {"messages": [says("user", "secret text")], **GREEDY, **wrong}
    with pytest.raises(RowRejected, match=r"^bad_request: .{10}") as raised:
        await answered(demo, json.dumps(body), body="talk", returns="response")
    print(raised.value.reason)
    assert "secret" not in raised.value.reason


async def test_the_model_calls_functions_until_it_answers(demo: VllmEngine) -> None:
    functions = {
        name: f"configs.tools_example:{name}"
        for name in ("calculate_discount", "get_exchange_rate")
    }
    some = [case for case in cases(20) if case.call["name"] == "calculate_discount"][:5]
    talks = [tools.opening(case) for case in some]
    heard = await messages_of(demo, talks, functions=functions, returns="messages", **BOTH)
    for case, turns in zip(some, heard, strict=True):
        assert [turn["role"] for turn in turns] == ["assistant", "tool", "assistant"]
        assert turns[2]["content"] == case.answer
