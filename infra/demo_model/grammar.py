"""Parallel sentences: templates in English and Korean whose slots are filled alike.

A template is a line of `topics/<topic>.tsv`; `{city}` is a slot, `{city:a}` one of several of that
type, `{item.s}` a form of its value, `{은/는}` a particle that depends on the sound before it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
SLOT = re.compile(r"\{(/?[a-z_]+)(?:\.(s|a))?(?::([a-z]))?\}")
MARKS = re.compile(r"\{\{?\w+\}?\}|%\(\w+\)s|%[sd]|</?\w[^>]*>|https?://[!-~]*[0-9A-Za-z]")
"""What a translation keeps letter by letter: placeholders, tags, addresses."""
PARTICLE = re.compile(r"\{([가-힣]+)/([가-힣]+)\}")

Maker = Callable[[random.Random], "Value"]
"""Makes what fills a slot."""

UNSEEN_COMBINATIONS = 20
"""One in so many pairs of a template and a word is kept from training."""
UNSEEN_SENTENCES = 50
"""One in so many sentences is kept from training."""
ODD_WORDS = 0.7
"""Share of the slots for words that an oddly filled sentence fills with a word of any type."""


class Value(NamedTuple):
    """What fills a slot, in both languages; `plural` and `counter` (개, 권) only for goods."""

    en: str
    ko: str
    plural: str = ""
    counter: str = ""


class Template(NamedTuple):
    """A sentence with slots; `is_key` if it can be the main point of a notice."""

    topic: str
    is_key: bool
    en: str
    ko: str


class Sentence(NamedTuple):
    """A filled template: the sentence in both languages."""

    template: Template
    en: str
    ko: str
    words: tuple[str, ...]
    """The English words from the lexicon that it was filled with."""


@cache
def read_lexicon() -> dict[str, list[Value]]:
    """The words by type, in file order."""
    lexicon: dict[str, list[Value]] = {}
    for line in (FOLDER / "lexicon.tsv").read_text(encoding="utf-8").splitlines():
        kind, *forms = line.split("\t")
        lexicon.setdefault(kind, []).append(Value(*forms))
    return lexicon


@cache
def read_templates() -> list[Template]:
    """All templates, ordered by topic."""
    return [
        Template(path.stem, kind == "key", en, ko)
        for path in sorted((FOLDER / "topics").glob("*.tsv"))
        for line in path.read_text(encoding="utf-8").splitlines()
        for kind, en, ko in [line.split("\t")]
    ]


def fill(template: Template, dice: random.Random) -> Sentence:
    """Fill a template with random values, the same in both languages."""
    return fill_with(template, {}, dice)


def fill_with(template: Template, given: dict[str, Value], dice: random.Random) -> Sentence:
    """Fill a template with `given` values and, in the other slots, random ones."""
    values = dict(given)
    for name, _, label in SLOT.findall(template.en):
        if not name.startswith("/") and name + label not in values:
            values[name + label] = _other_value(name, dice, values)
    words = tuple(
        value.en for slot, value in values.items() if slot.rstrip("abc") in read_lexicon()
    )
    return Sentence(
        template, in_english(template.en, values), in_korean(template.ko, values), words
    )


def fill_oddly(template: Template, dice: random.Random) -> Sentence:
    """Fill a template with words of any type: `Your library was shipped to bibimbap`.

    A sentence of this kind teaches that a template and the words in it have nothing to do with each
    other. Where a template asks for a plural, it gets a word that has one.
    """
    given: dict[str, Value] = {}
    for name, form, label in SLOT.findall(template.en):
        if name in read_lexicon() and (form or dice.random() < ODD_WORDS):
            words = words_for_any_slot(with_plural=bool(form))
            while (value := dice.choice(words)) in given.values():
                pass
            given[name + label] = value
    return fill_with(template, given, dice)


@cache
def words_for_any_slot(with_plural: bool) -> list[Value]:
    """The words that are whole by themselves (a family name is not)."""
    lexicon = read_lexicon()
    return [
        value
        for kind, values in lexicon.items()
        for value in values
        if (value.plural if with_plural else kind != "family")
    ]


def _other_value(name: str, dice: random.Random, taken: dict[str, Value]) -> Value:
    """A value that no other slot of the sentence has: from Seoul to Seoul makes no sense."""
    while (value := SLOTS[name](dice)) in taken.values():
        pass
    return value


def in_english(text: str, values: dict[str, Value]) -> str:
    """Fill an English template."""

    def form(match: re.Match[str]) -> str:
        name, form, label = match[1], match[2], match[3] or ""
        if name == "/b":
            return closing_tag(values["b" + label].en)
        value = values[name + label]
        if form == "s":
            return value.plural
        return with_article(value.en) if form == "a" else value.en

    filled = SLOT.sub(form, text)
    if filled.endswith(".m.."):  # the period of a.m. ends the sentence, too
        filled = filled[:-1]
    # A sentence that begins with one of our words begins with a capital; a placeholder stays.
    return filled[0].upper() + filled[1:] if text[0] == "{" and filled[0].isalpha() else filled


def in_korean(text: str, values: dict[str, Value]) -> str:
    """Fill a Korean template, then choose its particles."""

    def form(match: re.Match[str]) -> str:
        name, label = match[1], match[3] or ""
        return closing_tag(values["b" + label].ko) if name == "/b" else values[name + label].ko

    filled = SLOT.sub(form, text)
    while match := PARTICLE.search(filled):
        particle = choose_particle(filled[match.start() - 1], match[1], match[2])
        filled = filled[: match.start()] + particle + filled[match.end() :]
    return filled


# Final sounds of 0 to 9 as Korean reads them: 영 일 이 삼 사 오 육 칠 팔 구.
DIGIT_FINALS = dict(zip("0123456789", "ㅇㄹ-ㅁ--ㄱㄹㄹ-", strict=True))


def choose_particle(before: str, with_final: str, without_final: str) -> str:
    """은 after a final consonant, 는 after a vowel; 로 also after ㄹ."""
    if "가" <= before <= "힣":
        final = (ord(before) - ord("가")) % 28
        closed, is_rieul = final > 0, final == 8
    else:
        sound = DIGIT_FINALS.get(before, "-")
        closed, is_rieul = sound != "-", sound == "ㄹ"
    if with_final == "으로" and is_rieul:
        return without_final
    return with_final if closed else without_final


def with_article(noun: str) -> str:
    """a or an, by the first letter; the lexicon has no silent h and no `yu` sound."""
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def closing_tag(tag: str) -> str:
    """`</b>` for `<b>`, `</a>` for `<a href="#">`."""
    return "</" + tag[1:].split()[0].rstrip(">") + ">"


def is_held_out(sentence: Sentence) -> bool:
    """Whether training never sees the sentence."""
    return has_unseen_combination(sentence) or _one_in(UNSEEN_SENTENCES, sentence.en)


def has_unseen_combination(sentence: Sentence) -> bool:
    """Whether training never sees one of its words in its template."""
    return any(
        _one_in(UNSEEN_COMBINATIONS, f"{sentence.template.en} {word}") for word in sentence.words
    )


def _one_in(count: int, text: str) -> bool:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") % count == 0


def sentences(
    dice: random.Random,
    held_out: bool,
    of: Callable[[Template], bool] = lambda template: True,
    filled: Callable[[Template, random.Random], Sentence] = fill,
) -> Iterator[Sentence]:
    """Sentences of random templates for ever, all of them held out from training or none."""
    templates = [template for template in read_templates() if of(template)]
    while True:
        sentence = filled(dice.choice(templates), dice)
        if is_held_out(sentence) == held_out:
            yield sentence


# How each type of slot gets its value.

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


def date(dice: random.Random) -> Value:
    month, day = dice.randint(1, 12), dice.randint(1, 28)
    return Value(f"{MONTHS[month - 1]} {day}", f"{month}월 {day}일")


def time(dice: random.Random) -> Value:
    hour, minute = dice.randint(1, 12), dice.choice([0, 0, 0, *range(5, 60, 5)])
    half, korean_half = dice.choice([("a.m.", "오전"), ("p.m.", "오후")])
    if minute == 0:
        return Value(f"{hour} {half}", f"{korean_half} {hour}시")
    return Value(f"{hour}:{minute:02} {half}", f"{korean_half} {hour}시 {minute}분")


def money(dice: random.Random) -> Value:
    kind = dice.random()
    if kind < 0.7:
        amount = won(dice)
        return Value(f"{amount:,} won", f"{amount:,}원")
    whole = dice.randint(2, 999)
    if kind < 0.8:
        return Value(f"{whole} euros", f"{whole}유로")
    cents = dice.choice(["", f".{dice.randint(1, 99):02}"])
    return Value(f"${whole}{cents}", f"{whole}{cents}달러")


def won(dice: random.Random) -> int:
    """An everyday price, 500 to 9,990,000 won."""
    return dice.randint(50, 999) * dice.choice([10, 100, 100, 100, 1000, 1000, 10_000])


def goods(dice: random.Random) -> Value:
    count, item = dice.choice([1, *range(2, 13), dice.randint(13, 300)]), word("item")(dice)
    noun = item.en if count == 1 else item.plural
    return Value(f"{count} {noun}", f"{item.ko} {count}{item.counter}")


def full_name(dice: random.Random) -> Value:
    family, given = word("family")(dice), word("given")(dice)
    return Value(f"{family.en} {given.en}", f"{family.ko}{given.ko}")


def floor(dice: random.Random) -> Value:
    number = dice.randint(1, 25)
    ending = (
        {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number not in (11, 12, 13) else "th"
    )
    return Value(f"{number}{ending} floor", f"{number}층")


def temperature(dice: random.Random) -> Value:
    degrees = dice.randint(-20, 39)
    if degrees in (-1, 1):
        degrees *= 2
    return Value(f"{degrees} degrees", f"{degrees}도" if degrees >= 0 else f"영하 {-degrees}도")


LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
STEMS = [
    "user",
    "name",
    "order",
    "count",
    "total",
    "item",
    "date",
    "time",
    "price",
    "city",
    "email",
    "code",
    "page",
    "file",
]
PLACEHOLDERS: tuple[Callable[[str, int], str], ...] = (
    lambda stem, number: f"{{{stem}}}",
    lambda stem, number: f"{{{stem}_name}}",
    lambda stem, number: f"{{{number}}}",
    lambda stem, number: f"{{{{{stem}}}}}",
    lambda stem, number: f"%({stem})s",
    lambda stem, number: "%s",
    lambda stem, number: "%d",
)
TAGS = ("<b>", "<i>", "<strong>", "<em>", "<u>", "<0>", "<1>", "<2>", '<a href="#">')
FILE_STEMS = [
    "report",
    "invoice",
    "photo",
    "backup",
    "notes",
    "table",
    "plan",
    "draft",
    "list",
    "summary",
]
COUPONS = ["SPRING", "SUMMER", "AUTUMN", "WINTER", "WELCOME", "THANKS", "HELLO", "GIFT", "SAVE"]


def placeholder(dice: random.Random) -> Value:
    return same(dice.choice(PLACEHOLDERS)(dice.choice(STEMS), dice.randint(0, 9)))


def same(text: str) -> Value:
    return Value(text, text)


def word(kind: str) -> Maker:
    """A slot that is filled from the lexicon."""
    return lambda dice: dice.choice(read_lexicon()[kind])


def unit(one: str, korean: str, most: int) -> Maker:
    """A number with its unit: `1 hour` and `1시간`, `5 hours` and `5시간`."""

    def value(dice: random.Random) -> Value:
        number = dice.randint(1, most)
        return Value(f"{number} {one}{'s' * (number > 1)}", f"{number}{korean}")

    return value


SLOTS: dict[str, Maker] = {
    **{kind: word(kind) for kind in read_lexicon()},
    "items": goods,
    "name": full_name,
    "room": lambda dice: (lambda n: Value(f"Room {n}", f"{n}호"))(dice.randint(101, 1299)),
    "date": date,
    "time": time,
    "year": lambda dice: same(str(dice.randint(2015, 2035))),
    "money": money,
    "percent": lambda dice: same(f"{dice.randint(2, 95)}%"),
    "n": lambda dice: same(str(dice.randint(2, 99))),
    "minutes": unit("minute", "분", 59),
    "hours": unit("hour", "시간", 12),
    "days": unit("day", "일", 30),
    "weeks": unit("week", "주", 12),
    "months": unit("month", "개월", 24),
    "floor": floor,
    "temp": temperature,
    "km": lambda dice: (lambda n: Value(f"{n} km", f"{n}km"))(dice.randint(2, 400)),
    "order": lambda dice: same(
        f"{dice.choice(LETTERS)}{dice.choice(LETTERS)}-{dice.randint(10_000, 99_999)}"
    ),
    "phone": lambda dice: same(
        f"{dice.choice(['02', '031', '051', '070', '1588'])}"
        f"-{dice.randint(200, 999)}-{dice.randint(1000, 9999)}"
    ),
    "version": lambda dice: same(".".join(str(dice.randint(0, 20)) for _ in range(3))),
    "file": lambda dice: same(
        f"{dice.choice(FILE_STEMS)}{dice.choice(['', str(dice.randint(1, 99))])}"
        f".{dice.choice(['pdf', 'xlsx', 'jpg', 'txt', 'zip', 'docx'])}"
    ),
    "url": lambda dice: same(
        f"https://shop.example/{dice.choice(['help', 'notice', 'order', 'event'])}"
        f"/{dice.randint(1, 999)}"
    ),
    "coupon": lambda dice: same(f"{dice.choice(COUPONS)}{dice.randint(5, 99)}"),
    "ph": placeholder,
    "b": lambda dice: same(dice.choice(TAGS)),
}
