"""vllm: AsyncLLM in this process, spoken to through vLLM's own chat serving.

vLLM renders the template, tokenises, parses tool calls and enforces schemas exactly as
`vllm serve` does; there is no HTTP in between.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import os
import re
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from pydantic import ValidationError

from pipeline.accounting import Usage
from pipeline.config.model import ModelConfig
from pipeline.counting import CountTokens, counter_of
from pipeline.engine import EngineGone
from pipeline.engine.cores import claim_cores, omp_binding
from pipeline.errors import EngineError, ModelError, RowFailed, RowRejected
from pipeline.meter import Meter
from pipeline.records import Completion
from pipeline.tokens import is_control_token

DEFAULT_OPTIONS: dict[str, Any] = {
    # vLLM started from Python falls back to 2048 batched tokens, a fraction of a GPU's worth.
    "max_num_batched_tokens": 8192,
    # Without it the usage does not say how many prompt tokens came from the prefix cache.
    "enable_prompt_tokens_details": True,
    "disable_log_stats": True,
}

OPTIONS_ARE_VLLMS = "These are the options of `vllm serve`, with underscores."

FURTHER_ANSWER = re.compile(r"[1-9]\d*_")
"""How the ids begin under which vLLM computes the second and later of `n` answers. The prompt is
theirs together: usage counts it once, so the meter does too."""

CPU_KV_CACHE_GIB = 1
"""KV cache of an engine without a GPU, unless `kv_cache_memory_bytes` says otherwise."""


class VllmEngine:
    """One model on `tensor_parallel_size` x `pipeline_parallel_size` GPUs, or on CPU cores."""

    counts_exactly = True

    def __init__(self, model: ModelConfig, cpus: int, max_silence_s: float = math.inf) -> None:
        self.meter = Meter()
        _prepare_environment(model, cpus)
        import vllm.entrypoints.launchers.api_server.app_state  # noqa: F401  # now, not with a row
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError

        self.max_num_seqs = model.max_num_seqs
        self._dead = EngineDeadError
        self._args = _serve_args(model)
        self._name = (self._args.served_model_name or [self._args.model])[0]
        try:
            self._llm = AsyncLLM.from_engine_args(_engine_args(self._args))
        except ValidationError as error:  # a ValueError too, so it comes first
            reason = " ".join(error.errors()[0]["msg"].removeprefix("Value error, ").split())
            raise ModelError(f"model.engine: {reason[:300]}", OPTIONS_ARE_VLLMS) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineError(_first_line(error), "Mend `model` in the job file.") from error
        tokenizer = self._llm.renderer.tokenizer
        self.control_tokens: Sequence[str] = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if is_control_token(token.content, token.special)
        ]
        self.max_model_len = int(self._llm.model_config.max_model_len)
        self._counter = _TokenCounter(tokenizer)
        self._serving: Any = None
        self._starting = asyncio.Lock()
        self._max_silence_s = max_silence_s
        self._heard = time.monotonic()
        self._listen()

    def count_tokens(self, text: str) -> int:
        return self._counter(text)

    async def chat(self, body: Mapping[str, Any]) -> Completion:
        from vllm.exceptions import VLLMClientError, VLLMServerError

        serving = self._serving or await self._start_serving()
        request = _request({**body, "model": self._name})
        try:
            response = await self._unless_silent(serving.create_chat_completion(request))
        except self._dead as error:
            raise EngineGone(_first_line(error)) from error
        except ValidationError as error:  # of messages, which vLLM looks at late
            _refuse(_told(error))
        except (VLLMClientError, TemplateError, ValueError, TypeError, OverflowError) as error:
            _refuse(str(error))  # what `vllm serve` answers with 400
        except VLLMServerError as error:
            raise RowFailed(f"engine_error: {_first_line(error)[:200]}") from error
        if hasattr(response, "error"):
            if self._llm.errored:
                raise EngineGone(response.error.message)
            if response.error.code >= 500:
                raise RowFailed(f"engine_error: {response.error.message[:200]}")
            _refuse(response.error.message)
        usage, answer = response.usage, response.model_dump(mode="json")
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        details = usage.completion_tokens_details  # of reasoning models
        choice = answer["choices"][0]
        return Completion(
            {key: value for key, value in choice["message"].items() if value is not None},
            choice["finish_reason"],
            Usage(1, usage.prompt_tokens, cached or 0, usage.completion_tokens or 0),
            answer,
            (details.reasoning_tokens or 0) if details else 0,
        )

    def _listen(self) -> None:
        """Note when EngineCore sends something, as each of its steps does, and count its tokens:
        here they are all seen, also those of requests that never end."""
        receive = self._llm.engine_core.get_output_async

        async def heard() -> Any:
            outputs = await receive()
            self._heard = time.monotonic()
            for output in outputs.outputs:
                prefill = output.prefill_stats
                if prefill is None or FURTHER_ANSWER.match(output.request_id):
                    self.meter.count_completion(len(output.new_token_ids))
                else:
                    prompt, cached = prefill.num_prompt_tokens, prefill.num_cached_tokens
                    self.meter.count(Usage(1, prompt, cached, len(output.new_token_ids)))
            return outputs

        self._llm.engine_core.get_output_async = heard

    async def _unless_silent(self, request: Coroutine[Any, Any, Any]) -> Any:
        """The answer. Raises EngineGone once EngineCore has sent nothing for so long, though it
        had requests: it hangs, and would for ever."""
        if not self.meter.in_flight:
            self._heard = time.monotonic()
        with self.meter.request():
            answer = asyncio.ensure_future(request)
            try:
                while (left := self._heard + self._max_silence_s - time.monotonic()) > 0:
                    await asyncio.wait([answer], timeout=left)
                    if answer.done():
                        return answer.result()
                raise EngineGone(f"it sent nothing for {self._max_silence_s:g} s")
            finally:
                answer.cancel()

    def close(self) -> None:
        """End the engine's processes. A worker needn't: they end with it."""
        self._llm.shutdown()

    async def _start_serving(self) -> Any:
        """vLLM's serving objects want the running event loop, which __init__ doesn't have. Here
        vLLM first looks at some options.

        Raises EngineGone, ModelError.
        """
        from starlette.datastructures import State
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.exceptions import VLLMClientError

        async with self._starting:
            if self._serving is None:
                state = State()
                try:
                    tasks = await self._unless_silent(self._llm.get_supported_tasks())
                    await init_app_state(self._llm, state, self._args, tasks)
                except self._dead as error:
                    raise EngineGone(_first_line(error)) from error
                except (VLLMClientError, OSError, TypeError, ValueError) as error:
                    raise ModelError(
                        f"model.engine: {_first_line(error)}", OPTIONS_ARE_VLLMS
                    ) from error
                self._serving = state.openai_serving_chat
        return self._serving


class _TokenCounter:
    """Counts with a tokenizer of its own: vLLM's is not safe to share among threads."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:  # one in Python (Mistral's own, say), slow but rare
            lock = threading.Lock()

            def count(text: str) -> int:
                with lock:
                    return len(tokenizer.encode(text, add_special_tokens=False))

            self._count: CountTokens = count
            return
        own = type(backend).from_str(backend.to_str())
        own.no_truncation()
        own.no_padding()
        own.encode_special_tokens = True  # a row's text is text, whatever it says
        self._count = counter_of(own)

    def __call__(self, text: str) -> int:
        return self._count(text)


def _request(body: Mapping[str, Any]) -> Any:
    """vLLM's own request. Raises RowRejected (`bad_request`)."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.exceptions import VLLMClientError

    try:
        return ChatCompletionRequest(**body)
    except ValidationError as error:
        _refuse(_told(error))
    except VLLMClientError as error:
        _refuse(str(error))
    except (AttributeError, TypeError) as error:  # vLLM's own checks trip over some wrong types
        _refuse(f"a key's value is of the wrong type ({error})")


def _told(error: ValidationError) -> str:
    """Which key is wrong and why; unlike `str(error)` it quotes no value, which is row text."""
    # Of a union of message types each complains; those of another role say nothing.
    errors = sorted(error.errors(), key=lambda one: one["type"] == "literal_error")
    where = ".".join(map(str, errors[0]["loc"]))
    return f"{where}: {errors[0]['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def _refuse(message: str) -> NoReturn:
    message = " ".join(message.split())
    too_long = "maximum context length" in message or "max_model_len" in message
    raise RowRejected(f"{'too_long' if too_long else 'bad_request'}: {message[:200]}")


def _prepare_environment(model: ModelConfig, cpus: int) -> None:
    """What vLLM takes from the environment. What the user has set there stays. `cpus` are those
    that the engine computes on; 0: it has GPUs."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if not cpus:
        return  # on a GPU these mean nothing, but are part of the key of what vLLM has compiled
    if "kv_cache_memory_bytes" not in model.engine:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        ranks = model.world_size
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = omp_binding(claim_cores(cpus), ranks)


def check_options(model: ModelConfig, where: str) -> None:
    """Raises ModelError if vLLM has no such option; `where` is the key that holds them."""
    _serve_args(model, where)


def _serve_args(model: ModelConfig, where: str = "model.engine") -> Any:
    """The namespace of `vllm serve` with these options. Raises ModelError for a wrong one."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vllm is untyped here
        def error(self, message: str) -> NoReturn:
            raise ModelError(f"{where}: {message}", _nearest_option(message, self))

    options = {**DEFAULT_OPTIONS, "max_num_seqs": model.max_num_seqs, **model.engine}
    options["model"] = model.id
    if model.revision is not None:
        options["revision"] = model.revision
        # Of a tokenizer from elsewhere, vLLM would look for the same revision.
        if options.get("tokenizer") not in (None, model.id):
            options.setdefault("tokenizer_revision", "main")
    if model.world_size > 1:
        # One replica's GPUs are one node's; vLLM must not build a Ray cluster inside ours.
        options.setdefault("distributed_executor_backend", "mp")
    parser = make_arg_parser(Parser())
    # Of some options that are off unless named there is no `--no-` form.
    named = {
        f"--{name.replace('_', '-')}": name for name, value in options.items() if value is False
    }
    known = parser._option_string_actions
    for flag, name in named.items():
        if flag in known and f"--no-{flag[2:]}" not in known:
            del options[name]
    return parser.parse_args(_command_line(options))


def _engine_args(args: Any) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs.from_cli_args(args)


def _command_line(options: Mapping[str, Any]) -> list[str]:
    """`{"max_num_seqs": 8, "enforce_eager": True}` -> `--max-num-seqs 8 --enforce-eager`."""
    line: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        match value:
            case True:
                line.append(f"--{flag}")
            case False:
                line.append(f"--no-{flag}")
            case None:
                continue
            case dict():
                line += [f"--{flag}", json.dumps(value)]
            case list():
                line += [f"--{flag}", *map(str, value)]
            case _:
                line += [f"--{flag}", str(value)]
    return line


def _nearest_option(message: str, parser: Any) -> str:
    if "unrecognized" in message:
        known = [o[2:].replace("-", "_") for o in parser._option_string_actions if o[:2] == "--"]
        wrong = [word[2:].replace("-", "_") for word in message.split() if word.startswith("--")]
        near = difflib.get_close_matches(wrong[0], known, n=1) if wrong else []
        if near:
            return f"Did you mean `{near[0]}`?"
    return OPTIONS_ARE_VLLMS


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
