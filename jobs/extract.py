"""extract: data that a JSON Schema describes, out of one text column."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from pipeline.checks import finished_text, text_of
from pipeline.errors import RowRejected
from pipeline.records import Message, Output, Row
from pipeline.schemas import AnswerSchema, Schema
from pipeline.task import ExpectedAnswer, Generate, LongTextTask

PROMPT = (
    "Extract the data that this JSON Schema describes from the user's text. "
    "Answer with the JSON only.\n"
)
CORRECTION = (
    "Your answer does not follow the JSON Schema ({reason}). Answer with the right JSON only."
)


class Extract(LongTextTask):
    """Fill the schema from the column `text`; the result column is typed as the schema is."""

    kind: Literal["extract"]

    text: str
    """Input column that holds the text."""

    schema_: Schema | str = Field(alias="schema")
    """JSON Schema of the data, an object or an array; or `module:Class`, a pydantic class. What it
    does not name is not allowed."""

    instructions: str = ""
    """Added to the system prompt: where to find things, how to write them."""

    structured: bool = True
    """Make the engine generate nothing but JSON that follows the schema. false: for servers that
    can't; answers are checked all the same."""

    overflow: Literal["truncate_head", "truncate_tail", "reject"] = "reject"
    """What becomes of a text that does not fit. truncate_head, truncate_tail: its head or its tail
    is left out. reject: the row is rejected."""

    answers_are_short: ClassVar[bool] = True

    @field_validator("schema_", mode="plain")
    @classmethod
    def _schema_has_a_type(cls, schema: Any) -> Any:
        if not isinstance(schema, dict | str):
            raise ValueError("must be a JSON Schema, or `module:Class` for a pydantic class")
        AnswerSchema.of(schema)
        return schema

    @cached_property
    def answers(self) -> AnswerSchema:
        return AnswerSchema.of(self.schema_)

    @property
    def columns(self) -> list[str]:
        return [self.text]

    @property
    def output_type(self) -> pa.DataType:
        return self.answers.type

    @property
    def system_prompt(self) -> str:
        prompt = PROMPT + json.dumps(self.answers.schema, ensure_ascii=False)
        return f"{prompt}\n{self.instructions}" if self.instructions else prompt

    @property
    def expected_answer(self) -> ExpectedAnswer:
        """For each value that the schema names: 3 tokens (its punctuation, a number) to 80 (a long
        key, a sentence or two, or several items of an array)."""
        values = json.dumps(self.answers.schema).count('"type"')
        return ExpectedAnswer(constant=(3.0 * values, 80.0 * values), is_text=False)

    def identity(self) -> dict[str, Any]:
        """The schema itself, wherever it came from; in the prompt also its properties' order."""
        return {
            **self.model_dump(exclude={"schema_"}),
            "schema": self.answers.schema,
            "system_prompt": self.system_prompt,
            "correction": CORRECTION,
        }

    async def run(self, row: Row, generate: Generate) -> Output:
        pieces = await self.fit(text_of(row, self.text), generate, self.system_prompt)
        [chunk] = pieces.chunks
        asked: list[Message] = [
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": chunk.text},
        ]
        answer = await self._answer(asked, generate)
        try:
            return Output(self.answers.read(answer))
        except RowRejected as error:
            correction = CORRECTION.format(reason=error.reason)
        again: list[Message] = [
            {"role": "assistant", "content": generate.clean(answer)},
            {"role": "user", "content": correction},
        ]
        return Output(self.answers.read(await self._answer([*asked, *again], generate)))

    async def _answer(self, asked: list[Message], generate: Generate) -> str:
        if not self.structured:
            return finished_text(await generate(asked))
        form = {"name": "answer", "schema": self.answers.schema, "strict": True}
        body = {"response_format": {"type": "json_schema", "json_schema": form}}
        return finished_text(await generate(asked, **body))
