"""Multiple choice answered in two steps, and the drills that lead there.

A letter alone says little about where it came from, and so a model that sees nothing but questions
and letters goes on guessing. The drills ask for one step at a time, and for several letters at
once; and the answer itself says the right choice before its letter, which it then only looks up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from infra.demo_model.conversation import Conversation, asked
from infra.demo_model.grammar import Value, words_for_any_slot
from infra.demo_model.questions import (
    INSTRUCTION,
    LABELS,
    Question,
    make_question,
    multiple_choice,
    plain_question,
)

MANY_LABELS = "ABCDEFGH"
QUOTE = Value("What do these choices say?", "다음 기호의 내용을 쓰세요.")
FIND = Value("Which letters have these texts?", "다음 내용의 기호를 쓰세요.")
WRITE_OUT = Value(
    "Answer the question with the text of the right choice and its letter.",
    "다음 문제의 답을 내용과 기호로 쓰세요.",
)
CHOOSE = [
    INSTRUCTION,
    Value(
        "Choose the right answer. End with `정답: B`.",
        "알맞은 답을 고르고 끝에 `정답: B`와 같이 쓰세요.",
    ),
    Value("Answer in the form `정답: B`.", "`정답: B` 형식으로 답하세요."),
]
"""Ways to ask for a choice; whichever it is, the answer has the same two lines."""


def decisions(dice: random.Random) -> Iterator[Conversation]:
    """Multiple choice, the right choice said before its letter, and some plain questions."""
    while True:
        korean = dice.random() < 0.5
        if dice.random() < 0.15:
            yield asked(None, *plain_question(korean, dice))
        else:
            yield asked(None, *decided(make_question(dice), korean, dice))


def decided(question: Question, korean: bool, dice: random.Random) -> tuple[str, str]:
    """The user's message, and the answer in two lines: the choice's text, and `정답: B`."""
    text, answer = multiple_choice(question, korean, dice)
    text = text.replace(INSTRUCTION[korean], dice.choice(CHOOSE)[korean])
    return text, f"{question.right[korean]}\n{answer}"


def choices(dice: random.Random) -> Iterator[Conversation]:
    """The drills of questions in both languages, in random order."""
    while True:
        question, korean = make_question(dice), dice.random() < 0.5
        drill = dice.choice([quoted, found, found, found, written_out])
        yield asked(None, *drill(question, korean, dice))


def quoted(question: Question, korean: bool, dice: random.Random) -> tuple[str, str]:
    """The texts at some letters: `C. green tea`."""
    _, listed, _ = _split(question, korean, dice)
    chosen = dice.sample(listed, dice.randint(1, len(LABELS)))
    asks = " ".join(line[0] for line in chosen)
    return "\n".join([QUOTE[korean], *listed, asks]), "\n".join(chosen)


def found(question: Question, korean: bool, dice: random.Random) -> tuple[str, str]:
    """The letters at which texts stand, all of them: `green tea: C`."""
    if dice.random() < 0.2:
        _, listed, _ = _split(question, korean, dice)
    else:  # more at once, and nothing else to be learned from them
        words = dice.sample(words_for_any_slot(with_plural=False), dice.randint(4, 8))
        side = dice.choice([0, 1])
        listed = [f"{label}. {word[side]}" for label, word in zip(MANY_LABELS, words, strict=False)]
    chosen = dice.sample(listed, len(listed))
    texts = [line[3:] for line in chosen]
    answer = "\n".join(f"{line[3:]}: {line[0]}" for line in chosen)
    return "\n".join([FIND[korean], *listed, *texts]), answer


def written_out(question: Question, korean: bool, dice: random.Random) -> tuple[str, str]:
    """The right choice, its text first: `green tea: C`."""
    asks, listed, right = _split(question, korean, dice)
    answer = next(line for line in listed if line[0] == right)
    return "\n".join([WRITE_OUT[korean], "", asks, *listed]), f"{answer[3:]}: {right}"


def _split(question: Question, korean: bool, dice: random.Random) -> tuple[str, list[str], str]:
    """What a question asks, its choices with their letters, and the right letter."""
    text, answer = multiple_choice(question, korean, dice)
    return question.text[korean], text.split("\n")[-len(LABELS) :], answer[-1]
