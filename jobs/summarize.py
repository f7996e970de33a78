"""summarize: one text column in short, texts of any length."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.checks import finished_text, text_of
from pipeline.errors import RowRejected
from pipeline.records import Output, Row
from pipeline.task import ExpectedAnswer, Generate, LongTextTask, at_once

SHORTER = 0.75
"""Summaries of the pieces, together, are at most so much of the text: else there would be no end of
summarising them again."""


class Summarize(LongTextTask):
    """Summarise the column `text`. Of a text that is cut, the summaries of its pieces are
    summarised, again and again until they fit."""

    kind: Literal["summarize"]

    text: str
    """Input column that holds the text."""

    length: str = Field("one sentence", min_length=1)
    """How long a summary is, in words that complete `Summarize the user's text in …`."""

    language: str = Field("en", pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]+)*$")
    """Language of the text, as a BCP 47 tag; it tells where sentences end."""

    instructions: str = ""
    """Added to the system prompt: the summary's language, style, what must be in it."""

    answers_are_short: ClassVar[bool] = True

    @property
    def columns(self) -> list[str]:
        return [self.text]

    @property
    def system_prompt(self) -> str:
        prompt = f"Summarize the user's text in {self.length}. Answer with the summary only."
        return f"{prompt}\n{self.instructions}" if self.instructions else prompt

    @property
    def expected_answer(self) -> ExpectedAnswer:
        """From a short sentence to a page; `length` says more, to those who can read it."""
        return ExpectedAnswer(constant=(10.0, 400.0))

    def identity(self) -> dict[str, Any]:
        return {**self.model_dump(), "system_prompt": self.system_prompt}

    async def run(self, row: Row, generate: Generate) -> Output:
        text = text_of(row, self.text)
        while len(pieces := await self._pieces(text, generate)) > 1:
            summaries = await at_once(self._summary(piece, generate) for piece in pieces)
            shorter = "\n\n".join(summaries)
            if len(shorter) > SHORTER * len(text):
                raise RowRejected("too_long: the summaries of its pieces are hardly shorter")
            text = generate.clean(shorter)
        return Output(await self._summary(pieces[0], generate))

    async def _pieces(self, text: str, generate: Generate) -> list[str]:
        """One if the text fits; of several, those that say something."""
        pieces = await self.fit(text, generate, self.system_prompt, self.language)
        texts = [chunk.text for chunk in pieces.chunks]
        return [text for text in texts if any(map(str.isalnum, text))] or texts[:1]

    async def _summary(self, text: str, generate: Generate) -> str:
        return finished_text(
            await generate([
                {"role": "system", "content": self.system_prompt},
                {"role": "user", "content": text},
            ])
        )  # fmt: skip
