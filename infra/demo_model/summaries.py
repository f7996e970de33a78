"""Summaries: a passage's first sentence that announces something is its summary."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from infra.demo_model.conversation import Conversation, asked
from infra.demo_model.grammar import Sentence, Template, fill, fill_oddly, read_templates, sentences

PROMPT = "Summarize the user's text in one sentence. Answer with the summary only."


def summaries(dice: random.Random) -> Iterator[Conversation]:
    """Passages of 2 to 15 sentences in both languages."""
    while True:
        yield asked(PROMPT, *make_case(dice, held_out=False))


def odd_summaries(dice: random.Random) -> Iterator[Conversation]:
    """The same of sentences with words of any type: the template alone says which is the key."""
    while True:
        yield asked(PROMPT, *make_case(dice, held_out=False, filled=fill_oddly))


def make_case(
    dice: random.Random,
    held_out: bool,
    filled: Callable[[Template, random.Random], Sentence] = fill,
) -> tuple[str, str]:
    """A passage of one topic and its key sentence; more key sentences may follow it."""
    topics = sorted({template.topic for template in read_templates() if template.is_key})
    topic, korean = dice.choice(topics), dice.random() < 0.5
    announcing = sentences(dice, held_out, lambda t: t.topic == topic and t.is_key, filled)
    telling = sentences(dice, held_out, lambda t: t.topic == topic and not t.is_key, filled)
    key = next(announcing)
    passage = [next(telling) for _ in range(dice.choice([0, 0, 1, 2, 3]))] + [key]
    for _ in range(dice.randint(1, 11)):
        passage.append(next(announcing) if dice.random() < 0.1 else next(telling))
    separator = dice.choice([" ", "\n"])
    text = separator.join(sentence.ko if korean else sentence.en for sentence in passage)
    return text, key.ko if korean else key.en
