"""Filling a JSON Schema from the text of an order or a notice."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from infra.demo_model import grammar
from infra.demo_model.conversation import Conversation, asked
from infra.demo_model.grammar import Value

PROMPT = (
    "Extract the data that this JSON Schema describes from the user's text. "
    "Answer with the JSON only.\n"
)


class Clause(NamedTuple):
    """A sentence that tells some fields; its slots are the names of the fields."""

    fields: tuple[str, ...]
    en: tuple[str, ...]
    ko: tuple[str, ...]


ORDER = (
    Clause(
        ("customer", "item", "quantity"),
        ("{customer} ordered {goods}.", "{goods} for {customer}."),
        (
            "{customer} 님이 {goods}{을/를} 주문하셨습니다.",
            "{customer} 님, {goods} 주문 감사합니다.",
        ),
    ),
    Clause(
        ("order_number",),
        ("The order number is {order_number}.", "This is order {order_number}."),
        ("주문 번호는 {order_number}입니다.", "주문 {order_number} 건입니다."),
    ),
    Clause(
        ("price",),
        ("The total comes to {won} won.", "Please pay {won} won."),
        ("총액은 {won}원입니다.", "{won}원을 결제해 주세요."),
    ),
    Clause(
        ("city", "delivery_date"),
        ("It will be delivered to {city} on {delivery_date}.",),
        ("{delivery_date}에 {city}{으로/로} 배송됩니다.",),
    ),
    Clause(("color",), ("The color is {color}.",), ("색상은 {color}입니다.",)),
    Clause(("phone",), ("Questions? Call {phone}.",), ("문의 전화는 {phone}입니다.",)),
)
NOTICE = (
    Clause(
        ("event", "place", "date"),
        ("The {event} will be held at the {place} on {date}.", "{date}: {event} at the {place}."),
        ("{date} {place}에서 {event}{이/가} 열립니다.", "{date} {event}, 장소는 {place}입니다."),
    ),
    Clause(
        ("start_time",),
        ("It starts at {start_time}.", "Please come by {start_time}."),
        ("시작 시간은 {start_time}입니다.", "{start_time}까지 와 주세요."),
    ),
    Clause(
        ("team",), ("The {team} is in charge.",), ("담당 부서는 {team}입니다.",)
    ),
    Clause(
        ("seats",),
        ("There are {seats} seats.", "Up to {seats} people can join."),
        ("좌석은 {seats}석입니다.", "최대 {seats}명까지 참가할 수 있습니다."),
    ),
    Clause(
        ("fee",), ("The fee is {fee_won} won.",), ("참가비는 {fee_won}원입니다.",)
    ),
    Clause(("contact",), ("Contact: {contact}.",), ("담당자는 {contact} 씨입니다.",)),
)  # fmt: skip

SLOT_OF = {
    "customer": "name", "order_number": "order", "city": "city", "delivery_date": "date",
    "color": "color", "phone": "phone", "event": "event", "place": "place", "date": "date",
    "start_time": "time", "team": "team", "contact": "name",
}  # fmt: skip


class Case(NamedTuple):
    """A text and what the schema's fields are in it."""

    schema: dict[str, Any]
    text: str
    data: dict[str, str | int]


def extractions(dice: random.Random) -> Iterator[Conversation]:
    """Extractions with one schema, from texts of both languages."""
    clauses, schema = some_schema(dice)
    while True:
        case = make_case(clauses, schema, dice)
        answer = json.dumps(case.data, ensure_ascii=False)
        yield asked(system_prompt(schema), case.text, answer)


def system_prompt(schema: dict[str, Any]) -> str:
    return PROMPT + json.dumps(schema, ensure_ascii=False)


def some_schema(dice: random.Random) -> tuple[tuple[Clause, ...], dict[str, Any]]:
    """Two to six fields of a kind of text, in any order."""
    clauses = dice.choice([ORDER, NOTICE])
    fields = [field for clause in clauses for field in clause.fields]
    chosen = dice.sample(fields, dice.randint(2, 6))
    numbers = {"quantity", "price", "seats", "fee"}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            field: {"type": "integer" if field in numbers else "string"} for field in chosen
        },
        "required": chosen,
    }
    if dice.random() < 0.5:
        schema["additionalProperties"] = False
    return clauses, schema


def make_case(clauses: tuple[Clause, ...], schema: dict[str, Any], dice: random.Random) -> Case:
    """A text that tells all fields of the schema and perhaps others, in any order."""
    wanted = [*schema["properties"]]
    told = [
        clause
        for clause in clauses
        if dice.random() < 0.5 or not set(wanted).isdisjoint(clause.fields)
    ]
    rest = told[1:]
    dice.shuffle(rest)
    values, data = some_values(dice)
    korean = dice.random() < 0.5
    if korean:
        text = " ".join(
            grammar.in_korean(dice.choice(clause.ko), values) for clause in [*told[:1], *rest]
        )
    else:
        text = " ".join(
            grammar.in_english(dice.choice(clause.en), values) for clause in [*told[:1], *rest]
        )
    return Case(schema, text, {field: data[field][korean] for field in wanted})


def some_values(
    dice: random.Random,
) -> tuple[dict[str, Value], dict[str, tuple[str | int, str | int]]]:
    """What fills the clauses' slots, and each field's data in English and Korean."""
    values = {field: grammar.SLOTS[slot](dice) for field, slot in SLOT_OF.items()}
    data: dict[str, tuple[str | int, str | int]] = {
        field: (value.en, value.ko) for field, value in values.items()
    }
    item, quantity = grammar.word("item")(dice), dice.randint(1, 300)
    noun = item.en if quantity == 1 else item.plural
    values["goods"] = Value(f"{quantity} {noun}", f"{item.ko} {quantity}{item.counter}")
    price, fee, seats = grammar.won(dice), grammar.won(dice), dice.randint(2, 500)
    values |= {
        "won": grammar.same(f"{price:,}"),
        "fee_won": grammar.same(f"{fee:,}"),
        "seats": grammar.same(str(seats)),
    }
    data |= {
        "item": (item.en, item.ko),
        "quantity": (quantity, quantity),
        "price": (price, price),
        "fee": (fee, fee),
        "seats": (seats, seats),
    }
    return values, data
