"""Checks that every task makes alike: of the text that goes in, of the answer that comes out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from pipeline.errors import RowFailed, RowRejected
from pipeline.markup import Kind, find_marks
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


UNFINISHED = {
    "length": "truncated",
    "max_tokens": "truncated",
    "content_filter": "stopped",
    "repetition": "stopped",
    "abort": "engine_error",
    "error": "engine_error",
}
"""What a row is whose answer ended for this finish reason, before its end."""


def check_finished(completion: Completion) -> None:
    """Raises RowRejected (`truncated` at max_tokens, `stopped` by a filter) or RowFailed
    (`engine_error`) if the answer was ended before its end."""
    reason = completion.finish_reason
    match UNFINISHED.get(reason):
        case "truncated":
            raise RowRejected(f"truncated: after {completion.usage.completion_tokens} tokens")
        case "stopped":
            raise RowRejected(f"stopped: {reason}")
        case "engine_error":
            raise RowFailed(f"engine_error: {reason}")


def finished_text(completion: Completion) -> str:
    """The answer's text. Raises RowRejected (`empty_answer`), and what `check_finished` does."""
    check_finished(completion)
    text = completion.text.strip()
    if not text:
        raise RowRejected("empty_answer")
    return text


REMINDERS = {
    "lost": "Copy each of these exactly as it is: {marks}",
    "invented": "Do not add any of these: {marks}",
}
"""What a task may add to its system prompt when it asks again; part of its identity then."""

_KIND_NAMES: dict[Kind, str] = {
    "code": "code in backticks",
    "url": "links",
    "placeholder": "placeholders in braces",
    "tag": "tags",
}


@dataclass(frozen=True)
class MarkupLoss:
    """The marks (see markup) of a text that its rewritten form lacks, and those that it has too
    many, each as often as it is so."""

    lost: tuple[tuple[Kind, str], ...]
    invented: tuple[tuple[Kind, str], ...]

    @property
    def reason(self) -> str:
        """`markup_lost: …` for RowRejected; of the marks, 200 characters at most."""
        parts = [
            f"{what} {' '.join(text for _, text in marks)}"
            for what, marks in (("lost", self.lost), ("invented", self.invented))
            if marks
        ]
        return f"markup_lost: {' '.join('; '.join(parts).split())[:200]}"

    @property
    def reminder(self) -> str:
        """Instructions that name the marks, by kind where they might say something themselves:
        row text with spaces in it has no place in a system prompt."""
        return "\n".join(
            REMINDERS[what].format(marks=" ".join(_names(marks)))
            for what, marks in (("lost", self.lost), ("invented", self.invented))
            if marks
        )


def markup_loss(text: str, rewritten: str) -> MarkupLoss | None:
    """What `rewritten` (a translation, say) lost or invented of the marks of `text`; None if all
    are there, in whatever order."""
    marks, others = find_marks(text), find_marks(rewritten)
    if not (marks or others):
        return None
    before, after = (Counter((mark.kind, mark.text) for mark in some) for some in (marks, others))
    if before == after:
        return None
    return MarkupLoss(tuple((before - after).elements()), tuple((after - before).elements()))


def _names(marks: tuple[tuple[Kind, str], ...]) -> list[str]:
    """Once each, twenty at most."""
    names = [
        text if len(text) <= 100 and not re.search(r"\s", text) else f"({_KIND_NAMES[kind]})"
        for kind, text in marks
    ]
    return list(dict.fromkeys(names))[:20]
