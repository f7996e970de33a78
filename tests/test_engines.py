"""Engines: each answer is a completion or a row's status; http against a real server."""

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting import Usage
from pipeline.config.model import ModelConfig
from pipeline.engine import Engine, start_engine
from pipeline.engine.echo import EchoEngine
from pipeline.engine.http import HttpEngine
from pipeline.engine.vllm import VllmEngine
from pipeline.errors import EngineError, JobFileError, RowError, RowFailed, RowRejected
from pipeline.generate import EngineGenerate
from pipeline.meter import Meter
from pipeline.model import DEMO_MODEL
from pipeline.records import Completion
from pipeline.tokens import RowText
from tests.conftest import asking
from tests.openai_server import HANG_UP, OpenAIServer, Reply, answer, error, serving

SYSTEM = {"role": "system", "content": "Answer with the translation only."}


def ask(text: str, **body: Any) -> dict[str, Any]:
    return {"messages": [SYSTEM, {"role": "user", "content": text}], **body}


def echo(**options: Any) -> Engine:
    return start_engine(
        ModelConfig(id="echo", backend="echo", engine=options), cpus=1, max_silence_s=60
    )


# --- vllm, without one -----------------------------------------------------------------------


async def test_vllm_counts_the_prompt_of_several_answers_once() -> None:
    def step(request: str, prompt: int, tokens: int) -> SimpleNamespace:
        stats = SimpleNamespace(num_prompt_tokens=prompt, num_cached_tokens=prompt // 2)
        return SimpleNamespace(
            request_id=request, prefill_stats=stats if prompt else None, new_token_ids=[7] * tokens
        )

    steps = [step("0_chatcmpl-a", 40, 1), step("1_chatcmpl-a", 40, 1), step("chatcmpl-b", 8, 1),
             step("0_chatcmpl-a", 0, 2), step("1_chatcmpl-a", 0, 3)]  # fmt: skip

    async def receive() -> SimpleNamespace:
        return SimpleNamespace(outputs=steps)

    engine: Any = object.__new__(VllmEngine)
    engine.meter = Meter()
    engine._llm = SimpleNamespace(engine_core=SimpleNamespace(get_output_async=receive))
    engine._listen()
    await engine._llm.engine_core.get_output_async()
    assert engine.meter.read().usage == Usage(2, 48, 24, 8)


# --- echo ------------------------------------------------------------------------------------


async def test_echo_answers_its_last_message() -> None:
    completion = await echo().chat(ask("one  two\nthree"))
    assert completion == Completion(
        {"role": "assistant", "content": "one  two\nthree"}, "stop", Usage(1, 5 + 3, 0, 3)
    )


@given(st.text(max_size=50), st.integers(1, 8))
async def test_echo_is_deterministic_and_keeps_to_max_tokens(text: str, limit: int) -> None:
    first, again = [await echo().chat(ask(text, max_tokens=limit)) for _ in range(2)]
    assert first == again
    assert first.usage.completion_tokens == min(limit, len(text.split()))
    assert (first.finish_reason == "length") == (len(text.split()) > limit)
    assert first.text.split() == text.split()[:limit]


async def test_echo_rejects_a_prompt_that_leaves_no_room_for_an_answer() -> None:
    engine = echo(max_model_len=8)
    answer = await engine.chat(ask("one two"))
    assert (answer.text, answer.finish_reason) == ("one", "length")
    with pytest.raises(RowRejected) as raised:
        await engine.chat(ask("one two three"))
    assert raised.value.reason == "too_long: 8 tokens of 8"


@pytest.mark.parametrize("options", [{"max_num_seq": 8}, {"max_model_len": 0}])
def test_echo_refuses_wrong_options(options: dict[str, int]) -> None:
    with pytest.raises(JobFileError, match=next(iter(options))):
        echo(**options)


@given(st.text(max_size=50))
async def test_echo_counts_as_it_answers(text: str) -> None:
    engine = echo(max_model_len=64)
    assert engine.max_model_len == 64
    completion = await engine.chat({"messages": [{"role": "user", "content": text}]})
    assert completion.usage.prompt_tokens == engine.count_tokens(text)


# --- http ------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("TEST_SERVER_KEY", "right")
    with serving(OpenAIServer()) as running:
        running.key = "right"
        yield running


@pytest.fixture
def engine(server: OpenAIServer) -> Callable[..., Engine]:
    def start(model: str = "served", **options: Any) -> Engine:
        config = ModelConfig(
            id=model,
            backend="http",
            base_url=server.url,
            api_key_env="TEST_SERVER_KEY",
            engine=options,
        )
        return start_engine(config, cpus=1, max_silence_s=60)

    return start


async def test_http_gives_the_servers_answer_and_counts(
    server: OpenAIServer, engine: Callable[..., HttpEngine]
) -> None:
    server.replies = [answer("안녕")]
    completion = await engine().chat(ask("Hello", temperature=0.0, max_tokens=9, top_k=1))
    assert (completion.text, completion.finish_reason) == ("안녕", "stop")
    assert completion.usage == Usage(1, 12, 8, 3)
    sent = ask("Hello", temperature=0.0, max_tokens=9, top_k=1, model="served")
    assert server.bodies == [sent]


async def test_http_has_in_flight_also_what_waits_for_a_slot(
    engine: Callable[..., HttpEngine],
) -> None:
    made = engine(max_num_seqs=1)
    async with made._slots:
        asked = [asyncio.ensure_future(made.chat(ask("Hello"))) for _ in range(3)]
        await asyncio.sleep(0)  # all have begun
        assert made.meter.in_flight == 3
    await asyncio.gather(*asked)
    assert made.meter.in_flight == 0


async def test_http_passes_on_what_openai_does_not_know(
    server: OpenAIServer, engine: Callable[..., HttpEngine]
) -> None:
    extra = {"repetition_penalty": 1.1, "guided_json": {"type": "object"}}
    await engine().chat(ask("Hello", **extra))
    assert {key: server.bodies[0][key] for key in extra} == extra


@pytest.mark.parametrize(
    "changes",
    [{"usage": None}, {"usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}}],
)
async def test_http_does_without_the_counts_that_a_server_leaves_out(
    server: OpenAIServer, engine: Callable[..., HttpEngine], changes: dict[str, Any]
) -> None:
    server.replies = [answer("fine", **changes)]
    completion = await engine().chat(ask("Hello"))
    assert completion.usage == (Usage(1, 12, 0, 3) if changes["usage"] else Usage(1))


async def test_http_gives_tool_calls_as_they_are(
    server: OpenAIServer, engine: Callable[..., HttpEngine]
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    server.replies = [answer(None, choices=[choice])]
    completion = await engine().chat(ask("Hello"))
    assert (completion.text, completion.finish_reason) == ("", "tool_calls")
    assert completion.message["tool_calls"] == [call]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (error(400, "Too many tokens", "context_length_exceeded"), "too_long: "),
        (error(400, "This model's maximum context length is 8"), "too_long: "),
        (error(422, "temperature: must be a number"), "bad_request: "),
        (error(400, "temperature\nmust be  a number"), "bad_request: "),
    ],
)
async def test_http_rejects_what_the_server_will_never_do_and_asks_once(
    server: OpenAIServer, engine: Callable[..., HttpEngine], reply: Reply, reason: str
) -> None:
    server.replies = [reply]
    with pytest.raises(RowRejected) as raised:
        await engine().chat(ask("Hello"))
    assert raised.value.reason.startswith(reason)
    assert "\n" not in raised.value.reason
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_http_tries_again_when_the_server_stumbles(
    server: OpenAIServer, engine: Callable[..., HttpEngine], status: int
) -> None:
    server.replies = [error(status, "busy"), error(status, "busy"), answer("fine")]
    completion = await engine(max_retries=2).chat(ask("Hello"))
    assert completion.text == "fine"
    assert len(server.bodies) == 3


async def test_http_row_fails_when_the_server_keeps_stumbling(
    server: OpenAIServer, engine: Callable[..., HttpEngine]
) -> None:
    server.replies = [error(500, "down")] * 2
    with pytest.raises(RowFailed, match="engine_error: InternalServerError"):
        await engine(max_retries=1).chat(ask("Hello"))
    assert len(server.bodies) == 2


async def test_http_server_that_is_gone_ends_the_job_and_marks_no_row(
    server: OpenAIServer, engine: Callable[..., HttpEngine]
) -> None:
    started = engine(max_retries=0)
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineError, match="APIConnectionError after 0 retries"):
        await started.chat(ask("Hello"))


@pytest.mark.parametrize("status", [403, 404])
async def test_http_row_fails_where_something_before_the_server_refuses_it(
    server: OpenAIServer, engine: Callable[..., HttpEngine], status: int
) -> None:
    """The server lets us in, and has the model. Else the job ends."""
    started = engine(max_retries=0)
    refusals: list[Reply] = [
        error(403, "who are you?"),
        error(404, "no such tunnel"),
        (200, {"object": "list", "data": [OTHER]}),
    ]
    server.replies = [error(status, "blocked")]
    with pytest.raises(RowFailed, match="engine_error: "):
        await started.chat(ask("<script>"))
    assert (await started.chat(ask("Hello"))).text == "fine"
    hint = "Mend the server or the key" if status == 403 else "`model.base_url`, which is likely to"
    server.replies = [error(status, "gone", "model_not_found")]
    with pytest.raises(EngineError, match=hint):
        await started.chat(ask("Hello"))
    for server.models in refusals:
        server.replies = [error(status, "who are you?")]
        with pytest.raises(EngineError, match=hint):
            await started.chat(ask("Hello"))


OTHER = {"id": "another", "object": "model"}


async def test_http_row_fails_when_the_server_hangs_up_on_it(
    server: OpenAIServer, engine: Callable[..., HttpEngine]
) -> None:
    server.respond = lambda body: HANG_UP
    with pytest.raises(RowFailed, match="engine_error: APIConnectionError"):
        await engine(max_retries=0).chat(ask("Hello"))


@pytest.mark.parametrize(
    "reply",
    [
        (200, "<html>the proxy's log-in page</html>"),
        (200, {"object": "error", "message": "overloaded"}),
        answer(None, choices=[]),
    ],
)
async def test_http_row_fails_when_the_answer_is_no_completion(
    server: OpenAIServer, engine: Callable[..., HttpEngine], reply: Reply
) -> None:
    server.replies = [reply]
    with pytest.raises(RowError, match="engine_error"):
        await engine(max_retries=0).chat(ask("Hello"))


def test_http_refuses_to_start_with_a_wrong_key(
    server: OpenAIServer, engine: Callable[..., HttpEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_SERVER_KEY", "very-wrong")
    with pytest.raises(EngineError, match="refused the key") as raised:
        engine()
    assert "TEST_SERVER_KEY" in str(raised.value)
    assert "very-wrong" not in str(raised.value)


def test_http_refuses_to_start_with_a_model_that_is_not_served(
    server: OpenAIServer, engine: Callable[..., HttpEngine]
) -> None:
    with pytest.raises(EngineError, match=r"does not serve `other` \(it has served\)"):
        engine("other")


def test_http_refuses_to_start_without_a_server(
    server: OpenAIServer, engine: Callable[..., HttpEngine]
) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(EngineError, match="no answer"):
        engine()


async def test_http_starts_with_a_server_that_lists_no_models(
    server: OpenAIServer, engine: Callable[..., HttpEngine]
) -> None:
    server.models = error(404, "no such page")
    started = engine(max_retries=0)
    server.replies = [error(404, "no such page")]
    with pytest.raises(EngineError, match=r"does not serve `served` there(.|\n)*end in /v1"):
        await started.chat(ask("Hello"))
    assert (await started.chat(ask("Hello"))).text == "fine"
    server.replies = [error(403, "blocked")]
    with pytest.raises(RowFailed, match="engine_error: PermissionDeniedError"):
        await started.chat(ask("<script>"))


@pytest.mark.parametrize("page", ["<html>log in</html>", "[]", "null", '{"data": 7}'])
def test_http_refuses_to_start_with_a_server_of_another_kind(
    server: OpenAIServer, engine: Callable[..., HttpEngine], page: str
) -> None:
    server.models = 200, page
    with pytest.raises(EngineError, match=r"OpenAI-compatible(.|\n)*/v1"):
        engine()


@pytest.mark.parametrize(
    ("served", "options", "expected"),
    [
        ({}, {}, 32_768),
        ({"max_model_len": 4096}, {}, 4096),
        ({"max_model_len": 4096}, {"max_model_len": 2048}, 2048),
        ({"max_model_len": None}, {}, 32_768),
    ],
)
def test_http_context_is_the_jobs_or_what_the_server_says(
    server: OpenAIServer,
    engine: Callable[..., HttpEngine],
    served: dict[str, Any],
    options: dict[str, int],
    expected: int,
) -> None:
    model = {"id": "served", "object": "model", **served}
    server.models = 200, {"object": "list", "data": [model]}
    assert engine(**options).max_model_len == expected


PROSE = "고객님의 상품이 내일 서울로 배송됩니다. Your product will be delivered to Seoul tomorrow."


def test_http_counts_rather_too_many_tokens_than_too_few(
    engine: Callable[..., HttpEngine],
) -> None:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    true = len(tokenizer.encode(PROSE, add_special_tokens=False))
    assert true < engine().count_tokens(PROSE) < 4 * true
    assert engine().count_tokens("") == 0


async def test_a_rows_usage_is_the_sum_of_its_requests_also_of_those_at_once() -> None:
    engine = echo(seconds_per_request=0.001)
    generate = EngineGenerate(engine, asking(engine), {"max_tokens": 5}, RowText())
    await asyncio.gather(*(generate([{"role": "user", "content": "a b"}]) for _ in range(20)))
    assert generate.usage == Usage(20, 40, 0, 40)
    assert (generate.max_tokens, generate.max_model_len) == (5, 32_768)
    assert generate.count_tokens("a b c") == 3


def test_echo_engine_is_what_backend_echo_starts() -> None:
    started = echo(max_num_seqs=3)
    assert isinstance(started, EchoEngine)
    assert started.max_num_seqs == 3
