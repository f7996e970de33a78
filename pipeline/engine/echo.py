"""echo: no model. Answers with its last message, after a time that can be set.

For tests, dry runs of a whole job, and benchmarks of everything but the model. A token is a
whitespace-separated word here. `EchoOptions` are its keys under `model.engine`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import Field

from pipeline.accounting import Usage
from pipeline.config.model import MAX_NUM_SEQS, ModelConfig
from pipeline.config.section import Section
from pipeline.engine import DEFAULT_CONTEXT
from pipeline.errors import RowRejected
from pipeline.job_file import parse_section
from pipeline.meter import Meter
from pipeline.records import Completion


class EchoOptions(Section):
    """The cost model a + b * prompt + c * completion, in seconds, and the limits."""

    seconds_per_request: float = Field(0.0, ge=0)
    """a"""

    seconds_per_prompt_token: float = Field(0.0, ge=0)
    """b"""

    seconds_per_completion_token: float = Field(0.0, ge=0)
    """c"""

    max_num_seqs: int = Field(MAX_NUM_SEQS, ge=1)
    """Requests that take their time at once."""

    max_model_len: int = Field(DEFAULT_CONTEXT, ge=1)
    """Tokens of prompt and answer together."""


KNOWN = [*EchoOptions.model_fields]
NEAR = 0.85
"""How like one of ours (of 1) an option must be to be meant for us."""


class EchoEngine:
    """Deterministic; rejects what is no chat body or too long."""

    control_tokens: Sequence[str] = ()
    counts_exactly = True

    def __init__(self, model: ModelConfig) -> None:
        self.meter = Meter()
        self._options = parse_section(
            EchoOptions, _own_options(model.engine), "job file", "model.engine."
        )
        self.max_num_seqs = self._options.max_num_seqs
        self.max_model_len = self._options.max_model_len
        self._slots = asyncio.Semaphore(self.max_num_seqs)

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    async def chat(self, body: Mapping[str, Any]) -> Completion:
        options = self._options
        texts = _texts(body)
        answer = texts[-1]
        words = answer.split()
        prompt = len(words) + sum(map(self.count_tokens, texts[:-1]))
        if prompt + 1 > options.max_model_len:
            raise RowRejected(f"too_long: {prompt} tokens of {options.max_model_len}")
        limit = min(int(body.get("max_tokens", len(words))), options.max_model_len - prompt)
        finish_reason = "stop"
        if len(words) > limit:
            answer, finish_reason = " ".join(words[:limit]), "length"
        completion = min(len(words), limit)
        seconds = (
            options.seconds_per_request
            + options.seconds_per_prompt_token * prompt
            + options.seconds_per_completion_token * completion
        )
        usage = Usage(1, prompt, 0, completion)
        with self.meter.request():
            if seconds:
                async with self._slots:
                    await asyncio.sleep(seconds)  # the cost model, not synchronisation
        self.meter.count(usage)
        message = {"role": "assistant", "content": answer}
        return Completion(
            message,
            finish_reason,
            usage,
            {
                "id": "chatcmpl-echo",
                "object": "chat.completion",
                "created": 0,
                "model": "echo",
                "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
                "usage": {
                    "prompt_tokens": prompt,
                    "completion_tokens": completion,
                    "total_tokens": prompt + completion,
                },
            },
        )


def _own_options(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Without those of vLLM, so that a job may be tried with `--set model.backend=echo`. One that
    is nearly ours stays in, to be refused with the right name."""
    return {name: engine[name] for name in engine if get_close_matches(name, KNOWN, 1, NEAR)}


def _texts(body: Mapping[str, Any]) -> list[str]:
    """The content of every message. Raises RowRejected where a body has none."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowRejected("bad_request: `messages` must be a list of messages")
    if not all(isinstance(message, dict) for message in messages):
        raise RowRejected("bad_request: a message must be an object")
    return [str(message.get("content") or "") for message in messages]
