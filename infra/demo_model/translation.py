"""Translation in both directions: sentences, passages, and input that makes no sense."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from typing import Literal

from infra.demo_model.conversation import Conversation, asked
from infra.demo_model.grammar import (
    SLOTS,
    Sentence,
    Template,
    Value,
    fill,
    fill_oddly,
    read_lexicon,
    sentences,
    words_for_any_slot,
)
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


def odd_sentences(dice: random.Random) -> Iterator[Conversation]:
    """As `single_sentences`, but with words of any type, and more of the short templates."""
    return _translations(dice, lambda: 1 if dice.random() < 0.7 else dice.randint(2, 5), odd(dice))


def odd_passages(dice: random.Random) -> Iterator[Conversation]:
    """Long passages of which half the sentences have words of any type."""
    return _translations(
        dice, lambda: dice.randint(*dice.choice([(2, 12), (16, 20)])), half_odd(dice)
    )


def odd(dice: random.Random) -> Iterator[Sentence]:
    """Sentences with words of any type, one in six of them of the short templates."""
    anywhere = sentences(dice, False, filled=fill_oddly)
    short = sentences(dice, False, lambda template: template.topic == "short-texts", fill_oddly)
    while True:
        yield next(short if dice.random() < 1 / 6 else anywhere)


def half_odd(dice: random.Random) -> Iterator[Sentence]:
    def filled(template: Template, dice: random.Random) -> Sentence:
        return (fill_oddly if dice.random() < 0.5 else fill)(template, dice)

    return sentences(dice, False, filled=filled)


def word_lists(dice: random.Random) -> Iterator[Conversation]:
    """Two to twelve words and values between slashes: what each is in the other language."""
    direction: Direction = dice.choice(["en-ko", "ko-en"])
    words = words_for_any_slot(with_plural=False)
    makers = [make for kind, make in SLOTS.items() if kind not in read_lexicon()]
    while True:
        chosen: list[Value] = [
            dice.choice(words) if dice.random() < 0.7 else dice.choice(makers)(dice)
            for _ in range(dice.randint(2, 12))
        ]
        english, korean = (
            " / ".join(column) for column in zip(*[v[:2] for v in chosen], strict=True)
        )
        pair = (english, korean) if direction == "en-ko" else (korean, english)
        yield asked(system_prompt(direction), *pair)


def _translations(
    dice: random.Random,
    length: Callable[[], int],
    known: Iterator[Sentence] | None = None,
) -> Iterator[Conversation]:
    direction: Direction = dice.choice(["en-ko", "ko-en"])
    known = known or sentences(dice, held_out=False)
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
