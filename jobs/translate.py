"""translate: one text column into another language, row by row."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.checks import finished_text, text_of
from pipeline.records import Output, Row
from pipeline.task import Generate, Task

LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "pt": "Portuguese",
    "ru": "Russian", "th": "Thai", "vi": "Vietnamese", "zh": "Chinese",
    "zh-Hans": "Simplified Chinese", "zh-Hant": "Traditional Chinese",
}  # fmt: skip
"""BCP 47 tags with the names that prompts use; any other tag stands for itself."""


class Translate(Task):
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

    @model_validator(mode="after")
    def _languages_differ(self) -> Translate:
        if self.source == self.target:
            raise ValueError("`source` and `target` are the same language")
        return self

    @property
    def columns(self) -> list[str]:
        return [self.text]

    @property
    def system_prompt(self) -> str:
        """After the model card's quickstart, for any pair of languages."""
        source = LANGUAGES.get(self.source, self.source)
        target = LANGUAGES.get(self.target, self.target)
        prompt = (
            f"You are an expert who translates the user's {source} sentences into {target}. "
            "Answer with the translation only."
        )
        return f"{prompt}\n{self.instructions}" if self.instructions else prompt

    def identity(self) -> dict[str, Any]:
        return {**self.model_dump(), "system_prompt": self.system_prompt}

    async def run(self, row: Row, generate: Generate) -> Output:
        completion = await generate([
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": text_of(row, self.text)},
        ])  # fmt: skip
        return Output(finished_text(completion))
