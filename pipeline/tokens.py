"""Row text on its way to the model: NFC, and nothing the tokenizer would take for a control token.

A literal `<|im_end|>` inside a document tokenises to the end-of-turn id: the document could close
its own turn and open a system turn. A zero-width space behind the first character keeps the text
readable, to people and to the model, and the control token unmatched.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

ZERO_WIDTH_SPACE = "\u200b"

# The common shape of control tokens, for engines whose tokenizer we can't ask (http).
CONTROL_TOKEN_SHAPE = r"<\|[^<>|\s]{1,64}\|>"  # noqa: S105 (not a secret)


def is_control_token(token: str, special: bool) -> bool:
    """Whether an added token steers the model; added runs of spaces or plain words do not."""
    bracketed = token[:1] + token[-1:] in ("<>", "[]") and len(token) > 2
    return bool(token.strip()) and (special or bracketed)


class RowText:
    """Makes row values safe to template. Call it with any row value; text inside is found."""

    def __init__(self, control_tokens: Iterable[str] = ()) -> None:
        # Matches a token's first character and looks ahead for the rest, so that tokens that
        # overlap are each found; by first character, so that `re` skips plain text quickly.
        rests: dict[str, list[str]] = {"<": [CONTROL_TOKEN_SHAPE.removeprefix("<")]}
        for token in sorted(set(control_tokens)):
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
        self._control = re.compile(
            "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
        )

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            text = unicodedata.normalize("NFC", value)
            return self._control.sub(lambda first: first.group() + ZERO_WIDTH_SPACE, text)
        if isinstance(value, Mapping):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self(item) for item in value]
        if isinstance(value, tuple):  # a key and its value of an Arrow map
            return tuple(self(item) for item in value)
        return value
