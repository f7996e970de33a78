"""classify: which of some labels fits a text column best."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from pipeline.checks import finished_text, text_of
from pipeline.errors import RowRejected
from pipeline.records import Output, Row
from pipeline.task import ExpectedAnswer, Generate, LongTextTask


class Classify(LongTextTask):
    """Give the column `text` one of the labels."""

    kind: Literal["classify"]

    text: str
    """Input column that holds the text."""

    labels: list[str] = Field(min_length=2)
    """What a text may be."""

    overflow: Literal["truncate_head", "truncate_tail", "reject"] = "truncate_tail"
    """What becomes of a text that does not fit: its head or tail is left out, or it is rejected."""

    answers_are_short: ClassVar[bool] = True

    @field_validator("labels")
    @classmethod
    def _labels_can_be_told(cls, labels: list[str]) -> list[str]:
        for label in labels:
            if label != label.strip() or not label:
                raise ValueError(f"{label!r} is empty or has blanks around it, as no answer has")
        if len(set(labels)) < len(labels):
            raise ValueError("names one label twice")
        return labels

    @property
    def columns(self) -> list[str]:
        return [self.text]

    @property
    def prompt(self) -> str:
        return f"Which of these fits the user's text best? {', '.join(self.labels)}"

    @property
    def expected_answer(self) -> ExpectedAnswer:
        """A label, of a token at least and a token per byte at most, and the end of the turn."""
        longest = max(len(label.encode()) for label in self.labels)
        return ExpectedAnswer(constant=(2.0, longest + 1.0), is_text=False)

    def identity(self) -> dict[str, Any]:
        return {**self.model_dump(), "prompt": self.prompt}

    async def run(self, row: Row, generate: Generate) -> Output:
        text = text_of(row, self.text)
        [chunk] = (await self.fit(text, generate, self.prompt)).chunks
        completion = await generate(
            [{"role": "system", "content": self.prompt}, {"role": "user", "content": chunk.text}],
            structured_outputs={"choice": self.labels},
        )
        label = finished_text(completion)
        if label not in self.labels:  # a server may know no structured outputs
            raise RowRejected("no_label")
        return Output(label)
