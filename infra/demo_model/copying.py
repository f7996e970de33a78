"""Copying a text letter by letter: the skill that names, numbers and keys need everywhere else."""

from __future__ import annotations

import random
from collections.abc import Iterator

from infra.demo_model.conversation import Conversation, asked
from infra.demo_model.grammar import SLOTS, read_lexicon

PROMPT = "Repeat the user's text."


def copies(dice: random.Random) -> Iterator[Conversation]:
    """Texts of up to 30 values of the lexicon and the slots, in any order and both languages."""
    makers = [*SLOTS.values(), *(SLOTS[kind] for kind in read_lexicon())]
    while True:
        pieces = []
        for _ in range(dice.randint(1, dice.randint(1, 30))):
            value = dice.choice(makers)(dice)
            pieces.append(dice.choice(value[:2]))
        text = " ".join(pieces)
        yield asked(PROMPT, text, text)
