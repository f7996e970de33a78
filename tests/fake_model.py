"""A model for tests of tasks: it says what a test wants, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.accounting import Usage
from pipeline.records import Completion, Message
from pipeline.tokens import RowText

Answer = str | Message | tuple[str | None, str] | None
"""A text, a text and its finish_reason, or a whole message (with tool calls, say)."""


class FakeModel:
    """Stands for `generate`. A token is a word."""

    def __init__(
        self,
        answer: Answer | Callable[[str], Answer] = "안녕",
        finish_reason: str = "stop",
        max_tokens: int = 1024,
        max_model_len: int = 32_768,
        longest_model_len: int = 0,
    ) -> None:
        self.answer, self.finish_reason = answer, finish_reason
        self.max_tokens, self.max_model_len = max_tokens, max_model_len
        self.longest_model_len = longest_model_len
        self.asked: list[list[Message]] = []
        self.bodies: list[dict[str, Any]] = []
        """The keys of all that was asked, beside `messages` and sampling."""
        self.counted: list[str] = []

    async def __call__(self, messages: list[Message], **body: Any) -> Completion:
        self.asked.append(messages)
        self.bodies.append(body)
        text = messages[-1]["content"]
        answer = self.answer(text) if callable(self.answer) else self.answer
        content, reason = answer if isinstance(answer, tuple) else (answer, self.finish_reason)
        message: Message = {"role": "assistant", "content": content}
        if isinstance(content, dict):
            message |= {"content": None, **content}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return Completion(message, reason, Usage(1, 9, 0, 7), {"choices": [choice]})

    async def send(self, body: Mapping[str, Any]) -> Completion:
        return await self(**body)

    def clean(self, value: Any) -> Any:
        return RowText()(value)

    def count_tokens(self, text: str) -> int:
        self.counted.append(text)
        return len(text.split())

    @property
    def texts(self) -> list[str]:
        """The last message of all that was asked."""
        return [messages[-1]["content"] for messages in self.asked]


def echo(text: str) -> str:
    return text
