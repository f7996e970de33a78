"""Engines take an OpenAI chat body and give a completion. One protocol, three of them."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from pipeline.config.model import ModelConfig
from pipeline.errors import EngineError
from pipeline.meter import Meter
from pipeline.records import Completion

DEFAULT_CONTEXT = 32_768
"""Tokens of prompt and answer together, where neither the job nor the engine says how many."""


def half_of_bytes(text: str) -> int:
    """Tokens of a text where nobody can be asked: about twice what is true of prose, in any of the
    common tokenizers. No bound: the densest text (base64, rare scripts) may have more."""
    return (len(text.encode("utf-8", "replace")) + 1) // 2


class EngineGone(Exception):
    """The engine died. Its worker must leave, so that another one takes the units."""


class Engine(Protocol):
    """A model that answers. Built in a worker process, used from one event loop."""

    max_num_seqs: int
    """Requests computed at once; a worker keeps a little more in flight."""

    control_tokens: Sequence[str]
    """Strings that the tokenizer would take for control tokens; may be empty if unknown."""

    max_model_len: int
    """Tokens of prompt and answer together."""

    meter: Meter
    """Counts what it does."""

    counts_exactly: bool
    """Whether `count_tokens` is the model's own tokenizer."""

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` as part of a prompt, by the model's own tokenizer; an engine that
        can't ask it errs on the high side. May be called from any thread."""
        ...

    async def chat(self, body: Mapping[str, Any]) -> Completion:
        """Answer one chat body (`messages` and sampling keys).

        Raises RowRejected (`too_long`, `bad_request`), RowFailed (`engine_error`), EngineGone.
        """
        ...


def check_engine(model: ModelConfig) -> None:
    """What can be known of the engine without starting it, before a cluster is.

    Raises JobFileError for options it doesn't have, EngineError if its server is away.
    """
    match model.backend:
        case "vllm":
            return  # it may be on the cluster's machines alone, and takes ten seconds to import
        case "http":
            from pipeline.engine.http import check_server

            check_server(model)
        case "echo":
            from pipeline.engine.echo import EchoEngine

            EchoEngine(model)


def start_engine(model: ModelConfig, cpus: int, max_silence_s: float) -> Engine:
    """Start the engine of `model`; `cpus` is what it may use where it has no GPU. One in this
    process is gone when it has been silent for `max_silence_s`; a server has its `timeout`.

    Raises EngineError or ModelError with the engine's own reason.
    """
    match model.backend:
        case "vllm":
            if find_spec("vllm") is None:
                raise EngineError(
                    f"vllm is not installed on {socket.gethostname()}",
                    "Install axbatch[gpu] there; without a GPU, `make setup` installs all.",
                )
            from pipeline.engine.vllm import VllmEngine

            return VllmEngine(model, cpus, max_silence_s)
        case "http":
            from pipeline.engine.http import HttpEngine

            return HttpEngine(model)
        case "echo":
            from pipeline.engine.echo import EchoEngine

            return EchoEngine(model)


def check_options(model: ModelConfig, where: str) -> None:
    """What only the engine's own machine knows of the options of an engine that is to start later;
    `where` is the key that holds them. Raises ModelError."""
    if model.backend == "vllm":
        from pipeline.engine.vllm import check_options

        check_options(model, where)
