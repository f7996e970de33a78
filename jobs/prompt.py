"""prompt: one free prompt a row, made of its columns."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import Field, field_validator

from pipeline.checks import finished_text
from pipeline.errors import RowRejected
from pipeline.records import Message, Output, Row
from pipeline.task import Generate, Task
from pipeline.templates import Template


class Prompt(Task):
    """Send `prompt`, filled from the row, and keep the answer."""

    kind: Literal["prompt"]

    prompt: str = Field(min_length=1)
    """The user's message: a Jinja template over the row's columns, such as `{{ title }}`."""

    system: str = ""
    """The system prompt, a template as well. Empty: none is sent."""

    @field_validator("prompt", "system")
    @classmethod
    def _is_a_template(cls, source: str) -> str:
        Template(source)
        return source

    @field_validator("prompt")
    @classmethod
    def _prompt_depends_on_the_row(cls, prompt: str) -> str:
        if not Template(prompt).columns:
            raise ValueError("names no column; write {{ title }} for the column `title`")
        return prompt

    @cached_property
    def _templates(self) -> dict[str, Template]:
        """By role."""
        return {"system": Template(self.system), "user": Template(self.prompt)}

    @property
    def columns(self) -> list[str]:
        return sorted({c for template in self._templates.values() for c in template.columns})

    async def run(self, row: Row, generate: Generate) -> Output:
        said = {
            role: template.render(row, generate.clean) for role, template in self._templates.items()
        }
        if not said["user"].strip():
            raise RowRejected("empty")
        messages: list[Message] = [
            {"role": role, "content": text} for role, text in said.items() if text.strip()
        ]
        return Output(finished_text(await generate(messages)))
