"""http: an OpenAI-compatible server, through the `openai` client."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import openai
from pydantic import Field

from pipeline.accounting import Usage
from pipeline.config.model import HTTP_MAX_NUM_SEQS, ModelConfig
from pipeline.config.section import Section
from pipeline.engine import DEFAULT_CONTEXT, half_of_bytes
from pipeline.errors import EngineError, RowFailed, RowRejected
from pipeline.job_file import parse_section
from pipeline.meter import Meter
from pipeline.records import Completion

PROBE_TIMEOUT_S, PROBE_RETRIES = 20, 2
NO_LIST = (AttributeError, TypeError, ValueError)
"""What the client raises of a model list that is none: a web page, say."""


class HttpOptions(Section):
    """Options under `model.engine`."""

    max_num_seqs: int = Field(HTTP_MAX_NUM_SEQS, ge=1)
    """Requests in flight to the server, per replica."""

    timeout: float = Field(600.0, gt=0)
    """Seconds for one answer."""

    max_retries: int = Field(5, ge=0)
    """Tries after the first, with the client's exponential backoff, on 408, 409, 429, 5xx and
    lost connections."""

    max_model_len: int | None = Field(None, ge=1)
    """Tokens of prompt and answer together; null: what the server says (vLLM's do), else 32,768."""


class HttpEngine:
    """Asks a server. The key comes from the environment variable `model.api_key_env`."""

    control_tokens: Sequence[str] = ()
    counts_exactly = False

    def __init__(self, model: ModelConfig) -> None:
        self.meter = Meter()
        options = _options(model)
        self._served = check_server(model)
        self.max_num_seqs = options.max_num_seqs
        self._model = model
        self._options = options
        self._slots = asyncio.Semaphore(options.max_num_seqs)
        self._client = openai.AsyncOpenAI(
            base_url=model.base_url,
            # The client insists on a key; servers without one ignore it.
            api_key=os.environ.get(model.api_key_env) or "none",
            timeout=options.timeout,
            max_retries=options.max_retries,
        )
        self.max_model_len = options.max_model_len or self._served.context or DEFAULT_CONTEXT

    def count_tokens(self, text: str) -> int:
        return half_of_bytes(text)

    async def chat(self, body: Mapping[str, Any]) -> Completion:
        known = {"messages", "temperature", "max_tokens", "top_p", "seed", "stop",
                 "presence_penalty", "frequency_penalty"}  # fmt: skip
        named = {key: value for key, value in body.items() if key in known}
        extra = {key: value for key, value in body.items() if key not in known | {"model"}}
        try:
            with self.meter.request():  # one that waits too, as with the other engines
                async with self._slots:
                    answer = await self._client.chat.completions.create(
                        model=self._model.id, extra_body=extra or None, **named
                    )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            too_long = error.code == "context_length_exceeded" or "context length" in str(error)
            code = "too_long" if too_long else "bad_request"
            raise RowRejected(f"{code}: {' '.join(error.message.split())[:200]}") from None
        except (openai.PermissionDeniedError, openai.NotFoundError) as error:
            # A filter before the server may refuse one row; a wrong key or address, all of them.
            if error.code == "model_not_found" or not await self._is_there():
                raise self._gone(error) from None
            raise RowFailed(f"engine_error: {type(error).__name__}") from None
        except openai.APITimeoutError:
            raise RowFailed("engine_error: APITimeoutError") from None
        except openai.APIConnectionError as error:
            if not await self._is_there():
                raise self._gone(error) from None
            # It, or a proxy, hangs up on this row.
            raise RowFailed("engine_error: APIConnectionError") from None
        except openai.AuthenticationError as error:
            raise self._gone(error) from None
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise RowFailed(f"engine_error: {type(error).__name__}") from None
        if not getattr(answer, "choices", None):
            raise RowFailed("engine_error: an answer without choices")
        choice, told = answer.choices[0], answer.usage
        details = told.prompt_tokens_details if told else None
        answered = told.completion_tokens_details if told else None
        usage = Usage(
            1,
            told.prompt_tokens if told else 0,
            (details.cached_tokens or 0) if details else 0,
            told.completion_tokens if told else 0,
        )
        self.meter.count(usage)
        return Completion(
            choice.message.model_dump(exclude_none=True),
            choice.finish_reason,
            usage,
            answer.model_dump(mode="json"),
            (answered.reasoning_tokens or 0) if answered else 0,
        )

    async def _is_there(self) -> bool:
        """Whether the server lets us in, and has our model."""
        client = self._client.with_options(timeout=PROBE_TIMEOUT_S, max_retries=PROBE_RETRIES)
        try:
            served = [entry.id async for entry in client.models.list()]
        except openai.NotFoundError:
            # Without a list, that it has answered before must do.
            return not self._served.lists_models and self.meter.read().usage.requests > 0
        except (openai.OpenAIError, *NO_LIST):
            return False
        return not served or self._model.id in served

    def _gone(self, error: openai.OpenAIError) -> EngineError:
        """The server is away, or refuses us: no row's fault, and true of all rows to come."""
        then = "then the same command goes on where it stopped."
        url, said = self._model.base_url, type(error).__name__
        if isinstance(error, openai.NotFoundError):
            return EngineError(
                f"{url}: does not serve `{self._model.id}` there (404)",
                f"Mend `model.base_url`, which is likely to end in /v1, or `model.id`; {then}",
            )
        if isinstance(error, openai.APIConnectionError):
            said += f" after {self._options.max_retries} retries"
        return EngineError(f"{url}: {said}", f"Mend the server or the key; {then}")


def _options(model: ModelConfig) -> HttpOptions:
    return parse_section(HttpOptions, model.engine, "job file", "model.engine.")


class Served(NamedTuple):
    """What a server says of itself."""

    lists_models: bool
    context: int | None
    """Tokens that the model takes."""


def check_server(model: ModelConfig) -> Served:
    """Ask the server for its models.

    Raises EngineError if the server is away, refuses the key or lacks the model, JobFileError
    for an unknown option.
    """
    _options(model)
    client = openai.OpenAI(
        base_url=model.base_url,
        api_key=os.environ.get(model.api_key_env) or "none",
        timeout=PROBE_TIMEOUT_S,
        max_retries=PROBE_RETRIES,
    )
    try:
        served = {entry.id: entry for entry in client.models.list()}
    except openai.AuthenticationError:
        raise EngineError(
            f"{model.base_url}: the server refused the key",
            f"Put the key into the environment variable {model.api_key_env}.",
        ) from None
    except openai.NotFoundError:
        return Served(False, None)  # whether it has the model, the first request will tell
    except NO_LIST:
        raise EngineError(
            f"{model.base_url}: does not answer as an OpenAI-compatible server does",
            "Mend `model.base_url`; it is likely to end in /v1.",
        ) from None
    except openai.OpenAIError as error:
        raise EngineError(
            f"{model.base_url}: no answer ({error})", "Start the server or mend `model.base_url`."
        ) from None
    if served and model.id not in served:
        raise EngineError(
            f"{model.base_url}: does not serve `{model.id}` (it has {', '.join([*served][:5])})",
            "Set `model.id` to one of these.",
        )
    context = getattr(served.get(model.id), "max_model_len", None)
    return Served(True, context if isinstance(context, int) else None)
