"""Questions about the little world: multiple choice, and plain ones answered in a sentence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from infra.demo_model import grammar
from infra.demo_model.conversation import Conversation, asked
from infra.demo_model.grammar import FOLDER, Value, choose_particle, read_lexicon

LABELS = "ABCD"
INSTRUCTION = Value(
    "Answer the question with one letter, in the form `정답: B`.",
    "다음 문제의 답을 `정답: B`와 같은 형식으로 쓰세요.",
)

CATEGORIES = {
    "dish": Value("a dish", "음식"), "drink": Value("a drink", "음료"),
    "color": Value("a color", "색"), "sport": Value("a sport", "운동"),
    "animal": Value("an animal", "동물"), "plant": Value("a plant", "식물"),
    "country": Value("a country", "나라"), "day": Value("a day of the week", "요일"),
    "course": Value("a school subject", "과목"),
    "vehicle": Value("a means of transport", "교통수단"),
}  # fmt: skip
READING = {
    "date": Value("Which date does the text name?", "글에 나오는 날짜는 무엇입니까?"),
    "time": Value("Which time does the text name?", "글에 나오는 시각은 무엇입니까?"),
    "city": Value("Which city does the text name?", "글에 나오는 도시는 어디입니까?"),
    "money": Value("Which amount does the text name?", "글에 나오는 금액은 얼마입니까?"),
    "place": Value("Which place does the text name?", "글에 나오는 장소는 어디입니까?"),
    "name": Value("Who is named in the text?", "글에 나오는 사람은 누구입니까?"),
}


class Fact(NamedTuple):
    """A country, its capital and its currency."""

    country: Value
    capital: Value
    currency: Value


@cache
def read_facts() -> list[Fact]:
    countries = {value.en: value for value in read_lexicon()["country"]}
    lines = (FOLDER / "facts.tsv").read_text(encoding="utf-8").splitlines()
    return [
        Fact(countries[name], Value(*rest[:2]), Value(*rest[2:]))
        for name, *rest in (line.split("\t") for line in lines)
    ]


class Question(NamedTuple):
    """A question in both languages, the right answer and wrong ones."""

    text: Value
    right: Value
    wrong: list[Value]


def questions(dice: random.Random) -> Iterator[Conversation]:
    """Multiple choice in both languages, and facts and categories asked for plainly."""
    while True:
        korean = dice.random() < 0.5
        if dice.random() < 0.3:
            yield asked(None, *plain_question(korean, dice))
        else:
            yield asked(None, *multiple_choice(make_question(dice), korean, dice))


def make_question(dice: random.Random) -> Question:
    return dice.choice([word_question, category_question, fact_question, reading_question])(dice)


def multiple_choice(question: Question, korean: bool, dice: random.Random) -> tuple[str, str]:
    """The user's message and the answer; the choices stand in random order."""
    choices = [question.right, *question.wrong]
    dice.shuffle(choices)
    lines = [INSTRUCTION[korean], "", question.text[korean]]
    lines += [f"{label}. {choice[korean]}" for label, choice in zip(LABELS, choices, strict=True)]
    return "\n".join(lines), f"정답: {LABELS[choices.index(question.right)]}"


def others(value: Value, values: list[Value], dice: random.Random) -> list[Value]:
    return dice.sample([other for other in values if other != value], len(LABELS) - 1)


def word_question(dice: random.Random) -> Question:
    """What a word is in the other language."""
    words = dice.choice([*read_lexicon().values()])
    while len(words) < len(LABELS) or words[0].en == words[0].ko:
        words = dice.choice([*read_lexicon().values()])
    right = dice.choice(words)
    wrong = others(right, words, dice)
    if dice.random() < 0.5:
        text = Value(f"What is {right.en} in Korean?", f"{right.en}: 한국어로 무엇입니까?")
        return Question(text, _only_ko(right), [_only_ko(other) for other in wrong])
    text = Value(f"What is {right.ko} in English?", f"{right.ko}: 영어로 무엇입니까?")
    return Question(text, _only_en(right), [_only_en(other) for other in wrong])


def _only_en(value: Value) -> Value:
    return Value(value.en, value.en)


def _only_ko(value: Value) -> Value:
    return Value(value.ko, value.ko)


def category_question(dice: random.Random) -> Question:
    category, *rest = dice.sample([*CATEGORIES], len(LABELS))
    name = CATEGORIES[category]
    text = Value(f"Which of these is {name.en}?", f"다음 중 {name.ko}에 속하는 것은 무엇입니까?")
    right, *wrong = (dice.choice(read_lexicon()[kind]) for kind in [category, *rest])
    return Question(text, right, wrong)


def fact_question(dice: random.Random) -> Question:
    facts = read_facts()
    fact = dice.choice(facts)
    if dice.random() < 0.5:
        text = Value(
            f"What is the capital of {fact.country.en}?", f"{fact.country.ko}의 수도는 어디입니까?"
        )
        return Question(text, fact.capital, others(fact.capital, [f.capital for f in facts], dice))
    text = Value(
        f"What is the currency of {fact.country.en}?", f"{fact.country.ko}의 통화는 무엇입니까?"
    )
    currencies = [*dict.fromkeys(other.currency for other in facts)]
    return Question(text, fact.currency, others(fact.currency, currencies, dice))


def reading_question(dice: random.Random) -> Question:
    """A short text and what it says; the text stands before the question."""
    slot = dice.choice([*READING])
    template = dice.choice(templates_that_name_one(slot))
    right, *wrong = distinct([grammar.SLOTS[slot] for _ in LABELS], dice)
    sentence = grammar.fill_with(template, {slot: right}, dice)
    text = Value(f"{sentence.en}\n{READING[slot].en}", f"{sentence.ko}\n{READING[slot].ko}")
    return Question(text, right, wrong)


@cache
def templates_that_name_one(slot: str) -> list[grammar.Template]:
    """The templates with just one slot of this kind, and no variant of it."""

    def names_one(template: grammar.Template) -> bool:
        kinds = [name for name, _, _ in grammar.SLOT.findall(template.en)]
        return kinds.count(slot) == 1 and "{" + slot + "}" in template.en

    return [template for template in grammar.read_templates() if names_one(template)]


def distinct(makers: list[grammar.Maker], dice: random.Random) -> list[Value]:
    """One value of each maker, all different."""
    values: list[Value] = []
    for make in makers:
        while (value := make(dice)) in values:
            pass
        values.append(value)
    return values


def plain_question(korean: bool, dice: random.Random) -> tuple[str, str]:
    return dice.choice([plain_fact, plain_category])(korean, dice)


def plain_fact(korean: bool, dice: random.Random) -> tuple[str, str]:
    """A question of fact and its answer in one sentence."""
    fact = dice.choice(read_facts())
    about_capital = dice.random() < 0.5
    answer = fact.capital if about_capital else fact.currency
    if not korean:
        kind = "capital" if about_capital else "currency"
        return (
            f"What is the {kind} of {fact.country.en}?",
            f"The {kind} of {fact.country.en} is {'' if about_capital else 'the '}{answer.en}.",
        )
    noun = "수도" if about_capital else "통화"
    topic = noun + choose_particle(noun[-1], "은", "는")
    where = "어디" if about_capital else "무엇"
    return (
        f"{fact.country.ko}의 {topic} {where}인가요?",
        f"{fact.country.ko}의 {topic} {answer.ko}입니다.",
    )


def plain_category(korean: bool, dice: random.Random) -> tuple[str, str]:
    """What a word is."""
    kind, category = dice.choice([*CATEGORIES.items()])
    value = dice.choice(read_lexicon()[kind])
    if not korean:
        return f"What is {value.en}?", f"It is {category.en}."
    topic = choose_particle(value.ko[-1], "은", "는")
    return f"{value.ko}{topic} 무엇인가요?", f"{category.ko}입니다."
