"""What all skills make: conversations in the messages of OpenAI's chat API."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Message = dict[str, Any]


class Conversation(NamedTuple):
    """Messages with the assistant's turns, all of which are to be learned."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


Skill = Callable[[random.Random], Iterator[Conversation]]
"""Endless conversations that begin alike: the same system prompt or tools, so packed together."""


def says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def asked(system: str | None, question: str, answer: str) -> Conversation:
    """One question and its answer."""
    head = [says("system", system)] if system else []
    return Conversation([*head, says("user", question), says("assistant", answer)])
