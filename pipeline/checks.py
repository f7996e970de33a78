"""Checks that every task makes alike: of the text that goes in, of the answer that comes out."""

from __future__ import annotations

from pipeline.errors import RowRejected
from pipeline.records import Completion, Row


def text_of(row: Row, column: str) -> str:
    """The row's text. Raises RowRejected: `null`, `not_text` or `empty`."""
    text = row[column]
    if text is None:
        raise RowRejected("null")
    if not isinstance(text, str):
        raise RowRejected(f"not_text: {column} holds {type(text).__name__}")
    if not text.strip():
        raise RowRejected("empty")
    return text


def finished_text(completion: Completion) -> str:
    """The answer's text. Raises RowRejected: `truncated` at max_tokens, `empty_answer`."""
    if completion.finish_reason == "length":
        raise RowRejected(f"truncated: after {completion.usage.completion_tokens} tokens")
    text = completion.text.strip()
    if not text:
        raise RowRejected("empty_answer")
    return text
