"""translate: one text column into another language, texts of any length."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.checks import REMINDERS, finished_text, markup_loss, text_of
from pipeline.chunking import Chunk, Split, cut_smaller
from pipeline.errors import RowRejected
from pipeline.records import Message, Output, Row
from pipeline.task import ExpectedAnswer, Generate, LongTextTask, at_once

LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "pt": "Portuguese",
    "ru": "Russian", "th": "Thai", "vi": "Vietnamese", "zh": "Chinese",
    "zh-Hans": "Simplified Chinese", "zh-Hant": "Traditional Chinese",
}  # fmt: skip
"""BCP 47 tags with the names that prompts use; any other tag stands for itself."""


KOREAN_AND_ENGLISH = (0.75, 1.35)
"""Tokens of a translation for each of its text's, whole corpora, in either direction. Seen from en
to ko: 0.93 (NTREX news, 56,149 tokens), 0.94 (Django's documentation, 156,294), 1.02 (OpenStack,
50,803) with A.X 3.1's tokenizer; 0.99 to 1.06 of the same, and 0.83 to 1.10 on sentences like
those that it was made for, with the embedded model's."""

WITHOUT_SPACES = ("ja", "km", "lo", "my", "th", "zh")
"""Languages that write no space between words, or between sentences."""

ANY_LANGUAGES = (0.4, 3.0)
"""The same of other pairs. Not measured: a tokenizer may have hardly a word of a language."""

MAY_GO_BETTER_SMALLER = ("truncated", "empty_answer", "too_long", "markup_lost")
"""Reasons to try once more with smaller pieces."""


class Translate(LongTextTask):
    """Translate the column `text` from `source` to `target`."""

    kind: Literal["translate"]

    text: str
    """Input column that holds the text."""

    source: str = Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]+)*$")
    """Language of the text, as a BCP 47 tag: en, ko, zh-Hans."""

    target: str = Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]+)*$")
    """Language of the result, as a BCP 47 tag."""

    instructions: str = ""
    """Added to the system prompt: tone, terms, what to leave untranslated."""

    context: Literal["none", "rolling"] = "none"
    """Of a text that is cut. none: its pieces are translated all at once. rolling: one after the
    other, each with the one before it and its translation in view."""

    @model_validator(mode="after")
    def _languages_differ(self) -> Translate:
        if self.source == self.target:
            raise ValueError("`source` and `target` are the same language")
        return self

    @property
    def columns(self) -> list[str]:
        return [self.text]

    @cached_property
    def system_prompt(self) -> str:
        """After the model card's quickstart, for any pair of languages."""
        source = LANGUAGES.get(self.source, self.source)
        target = LANGUAGES.get(self.target, self.target)
        prompt = (
            f"You are an expert who translates the user's {source} sentences into {target}. "
            "Answer with the translation only."
        )
        return f"{prompt}\n{self.instructions}" if self.instructions else prompt

    @property
    def expected_answer(self) -> ExpectedAnswer:
        languages = {tag.partition("-")[0].lower() for tag in (self.source, self.target)}
        ratio = KOREAN_AND_ENGLISH if languages == {"en", "ko"} else ANY_LANGUAGES
        return ExpectedAnswer(per_token=ratio, constant=(1.0, 1.0))  # the end of the turn

    def identity(self) -> dict[str, Any]:
        return {**self.model_dump(), "system_prompt": self.system_prompt, "reminders": REMINDERS}

    async def run(self, row: Row, generate: Generate) -> Output:
        text = text_of(row, self.text)
        turns = 2 if self.context == "rolling" else 1
        pieces = await self.fit(text, generate, self.system_prompt, self.source, turns)
        if self.context == "rolling":
            answers = await self._one_by_one(pieces, generate)
        else:
            answers = await at_once(self._piece(chunk, [], generate) for chunk in pieces.chunks)
        return Output(pieces.join(answers, self._space))

    @property
    def _space(self) -> str:
        """What comes between two pieces that nothing is between in the text."""
        source, target = (
            tag.partition("-")[0].lower() in WITHOUT_SPACES for tag in (self.source, self.target)
        )
        return " " if source and not target else ""

    async def _one_by_one(self, pieces: Split, generate: Generate) -> list[str]:
        answers: list[str] = []
        before: list[Message] = []
        for chunk in pieces.chunks:
            answers.append(await self._piece(chunk, before, generate))
            before = [
                {"role": "user", "content": chunk.text},
                {"role": "assistant", "content": generate.clean(answers[-1])},
            ]
        return answers

    async def _piece(self, chunk: Chunk, before: list[Message], generate: Generate) -> str:
        """One piece's translation. If there is none, that of smaller pieces."""
        try:
            return await self._translated(chunk, before, generate)
        except RowRejected as error:
            smaller = cut_smaller(chunk.text, self.source) if self.overflow == "chunk" else None
            if error.code not in MAY_GO_BETTER_SMALLER or smaller is None:
                raise
        parts = await at_once(self._translated(part, before, generate) for part in smaller.chunks)
        return smaller.join(parts, self._space)

    async def _translated(self, chunk: Chunk, before: list[Message], generate: Generate) -> str:
        """The model's answer. If its markup is not the text's, another one, after a reminder."""
        if chunk.is_verbatim:
            return chunk.text
        user: Message = {"role": "user", "content": chunk.text}
        system: Message = {"role": "system", "content": self.system_prompt}
        answer = finished_text(await generate([system, *before, user]))
        # The text has been made safe, and its marks with it; so the answer's are compared like it.
        loss = markup_loss(chunk.text, generate.clean(answer))
        if loss:
            reminder = generate.clean(loss.reminder)
            system = {"role": "system", "content": f"{self.system_prompt}\n{reminder}"}
            answer = finished_text(await generate([system, *before, user]))
            loss = markup_loss(chunk.text, generate.clean(answer))
        if loss:
            raise RowRejected(loss.reason)
        return answer
