"""What a task kind is: its keys in the job file, and one async function over a row."""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import pyarrow as pa
from pydantic import Field

from pipeline.chunking import Split, keep, split_aside, surely_fits, whole
from pipeline.config.data import InputFormat
from pipeline.config.section import Section
from pipeline.counting import SHORT
from pipeline.errors import RowDeferred, RowRejected
from pipeline.records import Completion, Message, Output, Row


class Generate(Protocol):
    """Ask the model, and know how much it can take."""

    async def __call__(self, messages: list[Message], **body: Any) -> Completion:
        """Sampling comes from the job file; keywords override or add body keys.

        Raises RowRejected where the request can't be done as asked (too long, say) and RowFailed
        where the engine failed; a task may let both pass: they become the row's status.
        """
        ...

    async def send(self, body: Mapping[str, Any]) -> Completion:
        """Ask with a whole chat body as it is: nothing of the job file's sampling is added."""
        ...

    def clean(self, value: Any) -> Any:
        """Text that a task has decoded itself (JSON in a column, say), or an answer that is to be
        part of a prompt, made as safe as that in the row is already."""
        ...

    @property
    def count_tokens(self) -> Callable[[str], int]:
        """Tokens of a text by the model's tokenizer; some milliseconds per 10,000 of them."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        ...

    @property
    def longest_model_len(self) -> int:
        """The same of the lane to which a row may still be deferred; 0 if there is none."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of one answer."""
        ...


class ExpectedAnswer(NamedTuple):
    """How long answers are before any is known, for plans: two bounds that the mean of one
    answer's tokens is likely to lie between."""

    per_token: tuple[float, float] = (0.0, 0.0)
    """For each token of the last message."""
    constant: tuple[float, float] = (1.0, math.inf)
    """Beside that; tokens."""
    is_text: bool = True
    """Whether plain text is an answer that `run` goes on with: its later requests are then known
    before as well. Else a plan takes the first for the only one."""

    @property
    def is_unknown(self) -> bool:
        return math.isinf(self.constant[1])

    def bounds(self, text_tokens: int) -> tuple[float, float]:
        """Of an answer to a message of so many tokens, if nothing ends it early."""
        (slope, steepest), (least, most) = self.per_token, self.constant
        return slope * text_tokens + least, steepest * text_tokens + most


class Task(Section):
    """Base of all kinds. A kind's fields are its keys under `task:` in the job file."""

    kind: str

    input_format: ClassVar[InputFormat] = "auto"
    """The `input.format` that it goes with."""

    wants_raw_rows: ClassVar[bool] = False
    """Whether `run` gets text as it is, and makes it safe itself (`Generate.clean`) once it has
    decoded it: normalising JSON as text may break its escapes."""

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Input columns that `run` reads; only these travel to the workers."""

    @property
    def output_type(self) -> pa.DataType:
        """Arrow type of the result column."""
        return pa.string()

    def identity(self) -> dict[str, Any]:
        """All that decides the output: the fields, and the prompts where code makes them."""
        return self.model_dump(exclude_defaults=False)

    @property
    def expected_answer(self) -> ExpectedAnswer:
        """For `axbatch plan`; unknown, unless a kind knows better."""
        return ExpectedAnswer()

    @abstractmethod
    async def run(self, row: Row, generate: Generate) -> Output:
        """Process one row. Text in `row` is NFC and free of the model's special tokens, unless it
        `wants_raw_rows`."""


T = TypeVar("T")

SMALLEST = 16
"""Tokens of the smallest piece that makes sense; where not even that fits, the engine says so."""

TEMPLATE_TOKENS = 64
"""Left for what the chat template adds to a prompt."""


class LongTextTask(Task):
    """Base of kinds that work on texts of any length: what is too long for one request is cut,
    shortened or rejected."""

    chunk_tokens: int | None = Field(None, ge=SMALLEST)
    """Most tokens of a text that the model gets whole, and of the pieces of a longer one. null: a
    text may have `sampling.max_tokens`, pieces half as many, less where the context is small; of a
    kind whose answers are short, or with `overflow: reject`, what `max_tokens` leaves of it."""

    overflow: Literal["chunk", "truncate_head", "truncate_tail", "reject"] = "chunk"
    """What becomes of a longer text. chunk: it is cut, and the results are joined.
    truncate_head, truncate_tail: its head or its tail is left out. reject: the row is rejected;
    without `chunk_tokens` only if the model's context can't hold the text and `max_tokens`.
    With `model.context: auto`, only of a text that is too long for the YaRN engine as well."""

    answers_are_short: ClassVar[bool] = False
    """Whether an answer is likely to be much shorter than its text. A text may then have all that
    `max_tokens` leaves of the model's context."""

    async def fit(
        self, text: str, generate: Generate, prompt: str, language: str = "en", turns: int = 1
    ) -> Split:
        """`text` in the pieces that go to the model: itself, nearly always.

        `prompt` is what each request holds beside its piece, `turns` how many pieces with their
        answers one request may hold, `language` (BCP 47) that of the text.

        Raises RowRejected (`too_long`), RowDeferred.
        """
        count = generate.count_tokens
        taken = TEMPLATE_TOKENS + _count_once(count, prompt)
        limit, budget = self._limits(generate.max_model_len - taken, generate.max_tokens, turns)
        if surely_fits(text, limit):
            return whole(text)
        # A short one holds Python's lock while it is counted, wherever that is.
        tokens = count(text) if len(text) < SHORT else await asyncio.to_thread(count, text)
        if tokens <= limit:
            return whole(text)
        most = limit
        if generate.longest_model_len:

            def limit_of(context: int) -> int:
                return self._limits(context - taken, generate.max_tokens, turns)[0]

            most = max(limit, limit_of(generate.longest_model_len))
            if tokens <= most:  # it waits for the shortest context that lets it go whole
                contexts = range(generate.longest_model_len)
                raise RowDeferred(bisect_left(contexts, tokens, key=limit_of))
        match self.overflow:
            case "chunk":
                return await split_aside(text, budget, count, language)
            case "reject":
                raise RowRejected(f"too_long: {tokens} tokens, the limit is {most}")
            case "truncate_head":
                return whole(await asyncio.to_thread(keep, "tail", text, limit, count, language))
            case "truncate_tail":
                return whole(await asyncio.to_thread(keep, "head", text, limit, count, language))

    def _limits(self, context: int, max_tokens: int, turns: int) -> tuple[int, int]:
        """Tokens of a text that is asked for whole, and of the pieces of a longer one. `context`
        is what the prompt leaves of the model's."""
        if self.overflow == "reject" or self.answers_are_short:
            limit = min(self.chunk_tokens or context, room(context, max_tokens))
            return max(limit, SMALLEST), max(limit, SMALLEST)
        if self.chunk_tokens:
            limit = budget = min(self.chunk_tokens, context // (2 * turns))
        else:
            # Nobody knows how long an answer gets. One as long as its text is likely enough to try
            # for; what must be cut anyway is cut so that answers may be twice as long.
            limit = min(max_tokens, context // 2)
            budget = min(max_tokens // 2, context // (3 * turns))
        return max(limit, SMALLEST), max(budget, SMALLEST)


def room(context: int, max_tokens: int) -> int:
    """Tokens that a prompt may have: what the answer leaves of the context, half of it at least."""
    return context - min(max_tokens, context // 2)


async def at_once(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. Raises the first error in that order, once all calls have ended, so
    that it does not depend on which was fastest."""
    calls = list(calls)
    if len(calls) == 1:  # nearly always; it needs no task of its own
        return [await calls[0]]
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


@lru_cache(maxsize=64)
def _count_once(count: Callable[[str], int], prompt: str) -> int:
    return count(prompt)
