"""ask: a question about one text column, texts of any length."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.checks import finished_text, text_of
from pipeline.errors import RowRejected
from pipeline.records import Output, Row
from pipeline.task import ExpectedAnswer, Generate, LongTextTask, at_once
from pipeline.templates import Template

PROMPT = "Answer the question from the user's text alone. Answer with the answer only."
PIECE_PROMPT = (
    f"{PROMPT} The text is one part of a longer one: if it does not say, answer NONE and nothing "
    "else."
)
ANSWERS_PROMPT = (
    "The user's text holds answers to one question, each found in another part of a document. "
    "Make one answer of them alone. Answer with the answer only."
)
PROMPTS = {"prompt": PROMPT, "piece_prompt": PIECE_PROMPT, "answers_prompt": ANSWERS_PROMPT}


class Ask(LongTextTask):
    """Ask `question` about the column `text`. Of a text that is cut, each piece is asked, and one
    answer is made of what they say."""

    kind: Literal["ask"]

    text: str
    """Input column that holds the text."""

    question: str = Field(min_length=1)
    """The question: plain text, or a Jinja template over the row's columns."""

    language: str = Field("en", pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]+)*$")
    """Language of the text, as a BCP 47 tag; it tells where sentences end."""

    instructions: str = ""
    """Added to the system prompt: the answer's form, length, language."""

    answers_are_short: ClassVar[bool] = True

    @field_validator("question")
    @classmethod
    def _question_is_a_template(cls, question: str) -> str:
        Template(question)
        return question

    @cached_property
    def _template(self) -> Template:
        return Template(self.question)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys([self.text, *self._template.columns]))

    @property
    def expected_answer(self) -> ExpectedAnswer:
        """From a word to a paragraph: the prompts want the answer only."""
        return ExpectedAnswer(constant=(2.0, 200.0))

    def identity(self) -> dict[str, Any]:
        return {**self.model_dump(), **PROMPTS}

    async def run(self, row: Row, generate: Generate) -> Output:
        text = text_of(row, self.text)
        question = self._template.render(row, generate.clean).strip()
        if not question:
            raise RowRejected("empty: the question")
        pieces = await self._pieces(text, question, PIECE_PROMPT, generate)
        if len(pieces) == 1:
            return Output(await self._answer(PROMPT, pieces[0], question, generate))
        found = [
            answer
            for answer in await at_once(
                self._answer(PIECE_PROMPT, piece, question, generate) for piece in pieces
            )
            if answer.strip("\"'`*. ").upper() != "NONE"
        ]
        if not found:
            raise RowRejected("not_found")
        if len(found) == 1:
            return Output(found[0])
        answers = generate.clean("\n\n".join(found))
        if len(await self._pieces(answers, question, ANSWERS_PROMPT, generate)) > 1:
            raise RowRejected("too_long: the answers of its pieces")
        return Output(await self._answer(ANSWERS_PROMPT, answers, question, generate))

    async def _pieces(self, text: str, question: str, prompt: str, generate: Generate) -> list[str]:
        beside = f"{self._system(prompt)}\n{question}"
        pieces = await self.fit(text, generate, beside, self.language)
        return [chunk.text for chunk in pieces.chunks]

    async def _answer(self, prompt: str, text: str, question: str, generate: Generate) -> str:
        return finished_text(
            await generate([
                {"role": "system", "content": self._system(prompt)},
                {"role": "user", "content": f"{text}\n\n{question}"},
            ])
        )  # fmt: skip

    def _system(self, prompt: str) -> str:
        return f"{prompt}\n{self.instructions}" if self.instructions else prompt
