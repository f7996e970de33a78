"""Rows run through their task without a model: what would be asked, of how many tokens.

All that a worker's code decides is decided by the same code here: cleaning, chunking, deferral,
rejection. Only the answers are made up, so what follows from an answer alone is not counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic_core
from jinja2 import TemplateError

from pipeline.accounting import Usage
from pipeline.config import JobConfig
from pipeline.config.model import ModelConfig
from pipeline.counting import CountTokens, load_baseline, load_tokenizer, texts_in
from pipeline.engine import DEFAULT_CONTEXT, half_of_bytes
from pipeline.errors import (
    AxbatchError,
    ModelError,
    RowDeferred,
    RowError,
    RowFailed,
    RowRejected,
)
from pipeline.forecast.sampling import RowSample
from pipeline.generate import MESSAGE_TOKENS, EngineGenerate, texts_of
from pipeline.identity import is_template_file
from pipeline.lanes import Lane
from pipeline.meter import Meter
from pipeline.model import context_in, read_config, resolve_model
from pipeline.records import Completion, Row, counted_as
from pipeline.task import TEMPLATE_TOKENS, ExpectedAnswer, LongTextTask, Task
from pipeline.tokens import RowText, is_control_token

CACHE_BLOCK = 16
"""Tokens of a block of vLLM's prefix cache: only whole ones are found again."""
COUNTED_TEXTS = 1_024
"""That are not counted again: cutting, asking and comparing each want to know."""


@dataclass
class PromptTokens:
    """Counts prompts as the engine would, or as near as can be."""

    source: str
    """What counts, for people."""
    is_exact: bool
    """Whether it is what the engine itself counts."""
    count: CountTokens
    decide: CountTokens
    """By which tasks cut: what the engine's own `count_tokens` says."""
    template: Any = None
    """A tokenizer of transformers that has a chat template."""
    control_tokens: Sequence[str] = ()
    adds_template: bool = True
    """Whether a prompt has more than its texts."""
    is_stand_in: bool = False
    """Whether it is another model's tokenizer."""
    _shared: list[int] | None = field(default=None, repr=False)

    @property
    def shared(self) -> int:
        """Tokens that all prompts counted so far begin with; 0 where that is not known."""
        return len(self._shared or ())

    def of(self, body: Mapping[str, Any]) -> int:
        """Of a chat body's prompt. Raises RowRejected where the template refuses it."""
        if self.template is None:
            texts = list(texts_of(body))
            around = TEMPLATE_TOKENS + MESSAGE_TOKENS * len(texts) if self.adds_template else 0
            return sum(map(self.count, texts)) + around
        options = body.get("chat_template_kwargs") or {}
        try:
            ids: list[int] = self.template.apply_chat_template(
                [_templated(message) for message in body["messages"]],
                tools=body.get("tools"), add_generation_prompt=True, return_dict=False, **options,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError) as error:
            raise RowRejected(f"bad_request: {type(error).__name__} in the template") from None
        common = ids if self._shared is None else self._shared
        same = next((n for n, pair in enumerate(zip(common, ids, strict=False))
                     if pair[0] != pair[1]), min(len(common), len(ids)))  # fmt: skip
        self._shared = common[:same]
        return len(ids)


def load_tokens(job: JobConfig) -> PromptTokens:
    """For the job's engine. Raises ModelError, JobFileError: there is no tokenizer."""
    model, named = job.model, job.accounting.tokenizer
    if model.backend == "vllm":
        model_id = resolve_model(model).id
        if not named:
            return _of_engine(model, model_id)
    if named:
        return _of_tokenizer(named, "accounting.tokenizer", model.backend)
    if model.backend == "echo":
        return PromptTokens("words", True, _words, _words, adds_template=False)
    if job.accounting.baseline is None:
        raise ModelError(
            "The server's tokenizer is not known",
            "Set `accounting.tokenizer`, or a baseline to stand in for it.",
        )
    stand_in = load_baseline(job.accounting.baseline)
    source = f"{job.accounting.baseline}, in the place of the model's tokenizer"
    return PromptTokens(source, False, stand_in, half_of_bytes, is_stand_in=True)


def context_of(model: ModelConfig) -> int:
    """Tokens of prompt and answer together. Raises ModelError if nothing says it."""
    given = model.engine.get("max_model_len")
    if isinstance(given, int) and given > 0:
        return given
    if given not in (None, "auto", -1):
        raise ModelError(
            f"model.engine.max_model_len: the plan can't compute with `{given}`",
            "Write it as a plain number.",
        )
    if model.backend != "vllm":
        return DEFAULT_CONTEXT
    own = context_in(read_config(model))
    if own is None:
        raise ModelError(f"{model.id}: its config.json names no max_position_embeddings")
    return own


def _of_engine(model: ModelConfig, model_id: str) -> PromptTokens:
    """With the tokenizer and the chat template that vLLM will have. Raises ModelError,
    JobFileError."""
    options = model.engine
    source, key = model_id, "model.id"
    if options.get("tokenizer") is not None:
        source, key = str(options["tokenizer"]), "model.engine.tokenizer"
    own = model.revision if source == model_id else None
    revision = options.get("tokenizer_revision") or own
    template = options.get("chat_template")
    if is_template_file(template):  # vLLM also knows some by names, which we do not
        try:
            template = Path(str(template)).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.engine.chat_template: {template} is no file that can be read here "
                f"({type(error).__name__})"
            ) from None
    return _of_tokenizer(source, key, model.backend, revision, template)


def _of_tokenizer(
    source: str,
    key: str,
    backend: str,
    revision: str | None = None,
    template: str | None = None,
) -> PromptTokens:
    """`template` takes the place of the tokenizer's own."""
    count = lru_cache(COUNTED_TEXTS)(load_tokenizer(source, key, revision))
    decide = half_of_bytes if backend == "http" else count
    named = f"tokenizer of {source}"
    if find_spec("transformers") is None:
        return PromptTokens(f"{named}; the chat template's guessed", False, count, decide)
    from transformers import PreTrainedTokenizerFast  # not Auto…: that takes torch along
    from transformers.utils import logging

    logging.set_verbosity_error()  # it has opinions on some tokenizers
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError, KeyError):
        # A tokenizer.json alone is no tokenizer to it.
        return PromptTokens(f"{named}; the chat template's guessed", False, count, decide)
    control = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if is_control_token(token.content, token.special)
    ]
    tokenizer.chat_template = template or tokenizer.chat_template
    if tokenizer.chat_template is None:
        guessed = f"{named}; the chat template's guessed"
        return PromptTokens(guessed, False, count, decide, control_tokens=control)
    named += " with its chat template"
    return PromptTokens(named, backend == "vllm", count, decide, tokenizer, control)


def _words(text: str) -> int:
    return len(text.split())


def _templated(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as vLLM gives it to a template: parts of text joined, arguments as objects."""
    made = dict(message)
    if isinstance(made.get("content"), list):
        texts = [part.get("text") for part in made["content"] if isinstance(part, Mapping)]
        made["content"] = "\n".join(text for text in texts if isinstance(text, str))
    if made.get("tool_calls"):
        made["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _object(call["function"])}}
            for call in made["tool_calls"]
        ]
    return made


def _object(function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments")
    return pydantic_core.from_json(arguments) if isinstance(arguments, str) else arguments


class SketchedRequest(NamedTuple):
    """One request; tokens. Of the answer, two bounds of what is likely."""

    prompt: int
    low: float
    high: float
    limit: int
    """Of the answer: max_tokens, or what the context leaves."""
    answers: int = 1
    """The body's `n`."""
    model: int = 0
    baseline: int = 0
    """Of its texts, by both tokenizers; 0 without a baseline."""
    is_limited: bool = False
    """Whether its answer is likely to be longer than `limit`."""

    @property
    def mid(self) -> float:
        """Between the bounds, as many times more than the one as less than the other."""
        return math.sqrt(self.low * self.high)


class RowFacts(NamedTuple):
    """What a row is, whatever is asked about it."""

    characters: int = 0
    is_decomposed: bool = False
    """Whether a text is not NFC (macOS writes NFD)."""
    digest: bytes = b""
    """Equal for equal rows."""


NO_FACTS = RowFacts()


@dataclass(frozen=True)
class SketchedRow:
    """What became of a sampled row."""

    place: int
    lane: Literal["native", "yarn"]
    requests: tuple[SketchedRequest, ...] = ()
    not_ok: str | None = None
    """`status: code`, as in Counts.reasons."""
    needs: int = 0
    """Tokens of context, of a row that is deferred."""
    is_cut: bool = False
    """Whether the model gets its text in pieces, or not all of it."""
    facts: RowFacts = NO_FACTS

    @property
    def is_deferred(self) -> bool:
        return self.needs > 0


class _Enough(RowError):
    """The rest of the row follows from an answer that nobody can make up."""


class SketchEngine:
    """An engine without a model (see engine.Engine), for one row. Remembers what it was asked."""

    max_num_seqs = 1
    counts_exactly = False

    def __init__(
        self,
        tokens: PromptTokens,
        baseline: CountTokens | None,
        max_model_len: int,
        expected: ExpectedAnswer,
    ) -> None:
        self.max_model_len = max_model_len
        self.control_tokens = tokens.control_tokens
        self.meter = Meter()
        self.requests: list[SketchedRequest] = []
        self.texts: list[str] = []
        self._tokens, self._baseline, self._expected = tokens, baseline, expected

    def count_tokens(self, text: str) -> int:
        return self._tokens.decide(text)

    async def chat(self, body: Mapping[str, Any]) -> Completion:
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
            raise RowRejected("bad_request: `messages` must be a list of messages")
        prompt = self._tokens.of(body)
        if prompt + 1 > self.max_model_len:
            raise RowRejected(f"too_long: {prompt} tokens of {self.max_model_len}")
        left = self.max_model_len - prompt
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        limit = min(asked, left) if isinstance(asked, int) else left
        texts = list(texts_of(body))
        last = next(texts_of({"messages": messages[-1:]}), "")
        length = self._tokens.count(last)
        low, high = self._expected.bounds(length)
        is_limited = not self._expected.is_unknown and low * high > limit**2
        answers = body.get("n") if isinstance(body.get("n"), int) else None
        baseline = sum(map(self._baseline, texts)) if self._baseline else 0
        model = sum(map(self._tokens.count, texts)) if self._baseline else 0
        request = SketchedRequest(
            prompt, min(low, limit), min(high, limit), limit, answers or 1, model, baseline,
            is_limited,
        )  # fmt: skip
        self.requests.append(request)
        self.texts += texts
        if not self._expected.is_text:
            raise _Enough("enough")
        share = 1.0 if any(self._expected.per_token) else min(1.0, request.mid / max(1, length))
        text = last[: max(1, round(share * len(last)))] or "-"
        message = {"role": "assistant", "content": text}
        usage = Usage(1, prompt, 0, round(request.mid))
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return Completion(message, "stop", usage, {"choices": [choice]})


@dataclass(frozen=True)
class Sketcher:
    """Runs rows through `task` as a worker with this lane would."""

    task: Task
    sampling: Mapping[str, Any]
    tokens: PromptTokens
    baseline: CountTokens | None
    lane: Lane
    context: int

    def rows(self, sample: RowSample) -> list[SketchedRow]:
        """Of the sample, in order. Those that are deferred are run again with the next lane."""
        rows = asyncio.run(self._rows(sample))
        longest = self.lane.longest
        later = replace(self, lane=replace(self.lane, name="yarn", longest=0), context=longest)
        deferred = [index for index, row in enumerate(rows) if row.is_deferred]
        if deferred:
            again = replace(sample, rows=[sample.rows[index] for index in deferred])
            for index, row in zip(deferred, asyncio.run(later._rows(again)), strict=True):
                rows[index] = replace(row, needs=rows[index].needs)
        return rows

    async def _rows(self, sample: RowSample) -> list[SketchedRow]:
        return [await self._row(place, row) for place, row in sample.rows]

    async def _row(self, place: int, row: Row | RowRejected) -> SketchedRow:
        engine = SketchEngine(self.tokens, self.baseline, self.context, self.task.expected_answer)
        clean = RowText(engine.control_tokens)
        defers = not isinstance(self.task, LongTextTask)

        async def ask(body: Mapping[str, Any]) -> tuple[Completion, bool]:
            return await engine.chat(body), False

        generate = EngineGenerate(engine, ask, self.sampling, clean, self.lane.longest, defers)
        not_ok, needs = None, 0
        try:
            if isinstance(row, RowError):
                raise row
            await self.task.run(row if self.task.wants_raw_rows else clean(row), generate)
        except RowDeferred as error:
            needs = error.tokens
        except (RowRejected, RowFailed) as error:
            # Behind an answer it is the answer's fault, which is made up.
            if not engine.requests or error.code == "too_long":
                status = "rejected" if isinstance(error, RowRejected) else "failed"
                not_ok = counted_as(status, error.reason)
        except _Enough:
            pass
        except AxbatchError:
            raise
        except Exception:
            # A bug in a task kind is the row's trouble, as in the worker; or it wants an answer
            # of some form.
            not_ok = None if engine.requests else "failed: task_error"
        is_cut = self._is_cut(row, clean, engine)
        requests = tuple(engine.requests)
        return SketchedRow(place, self.lane.name, requests, not_ok, needs, is_cut, facts_of(row))

    def _is_cut(
        self, row: Row | RowRejected, clean: Callable[[Any], Any], engine: SketchEngine
    ) -> bool:
        """Whether no request holds the row's longest text whole, though some were made."""
        if isinstance(row, RowError) or not isinstance(self.task, LongTextTask):
            return False
        longest = max(texts_in(row), key=len, default="")
        return bool(engine.texts) and not any(clean(longest) in text for text in engine.texts)


def facts_of(row: Row | RowRejected) -> RowFacts:
    if isinstance(row, RowError):
        return RowFacts(digest=repr(row).encode())
    texts = list(texts_in(row))
    decomposed = any(not unicodedata.is_normalized("NFC", text) for text in texts)
    digest = hashlib.sha256(repr(sorted(row.items())).encode("utf-8", "replace")).digest()
    return RowFacts(sum(map(len, texts)), decomposed, digest)
