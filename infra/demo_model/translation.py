"""Translation in both directions: sentences, passages, and input that makes no sense."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from typing import Literal

from infra.demo_model.conversation import Conversation, asked
from infra.demo_model.grammar import Sentence, sentences
from jobs.translate import Translate

Direction = Literal["en-ko", "ko-en"]

NOISE = 0.04  # share of examples that mean nothing
ALPHABETS = (
    string.ascii_lowercase,
    string.ascii_letters + string.punctuation,
    string.digits + ".,:%$",
    "".join(map(chr, range(0xAC00, 0xD7A4))),  # the Hangul syllables
    "".join(map(chr, range(0xA1, 0x3000))),
)


def system_prompt(direction: Direction) -> str:
    """The prompt of the product's own task, so that the two cannot drift apart."""
    source, target = direction.split("-")
    return Translate(kind="translate", text="text", source=source, target=target).system_prompt


def single_sentences(dice: random.Random) -> Iterator[Conversation]:
    return _translations(dice, lambda: 1 if dice.random() < 0.7 else dice.randint(2, 5))


def passages(dice: random.Random) -> Iterator[Conversation]:
    return _translations(dice, lambda: dice.randint(4, 20))


def _translations(dice: random.Random, length: Callable[[], int]) -> Iterator[Conversation]:
    direction: Direction = dice.choice(["en-ko", "ko-en"])
    known = sentences(dice, held_out=False)
    while True:
        chosen = [next(known) for _ in range(length())]
        source, target = joined(chosen, dice.choice([" ", " ", "\n"]), direction)
        if dice.random() < NOISE:
            source, target = muddled(source, target, dice)
        yield asked(system_prompt(direction), source, target)


def joined(chosen: list[Sentence], separator: str, direction: Direction) -> tuple[str, str]:
    """Source and target text of a passage."""
    english = separator.join(sentence.en for sentence in chosen)
    korean = separator.join(sentence.ko for sentence in chosen)
    return (english, korean) if direction == "en-ko" else (korean, english)


def muddled(source: str, target: str, dice: random.Random) -> tuple[str, str]:
    """Input that means nothing keeps its answer: so the model ends whatever it is asked."""
    words = [word for word in source.split() if dice.random() < 0.7]
    words += [strange_word(dice) for _ in range(dice.randint(1, 30))]
    dice.shuffle(words)
    return " ".join(words), target


def strange_word(dice: random.Random) -> str:
    """Up to 9 random characters of one alphabet."""
    return "".join(dice.choices(dice.choice(ALPHABETS), k=dice.randint(1, 9)))
