"""The model card's tool conversation: ask for what is missing, call, answer from the result."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from infra.demo_model.conversation import Conversation, Message, says
from infra.demo_model.grammar import Value, in_english, in_korean, same, word


def _function(name: str, description: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": kind, "description": text}
                    for key, (kind, text) in parameters.items()
                },
                "required": [*parameters],
            },
        },
    }


DISCOUNT = _function(
    "calculate_discount",
    "Calculates the price after a discount.",
    original_price=("number", "Price before the discount"),
    discount_percentage=("number", "Discount in percent"),
)
EXCHANGE = _function(
    "get_exchange_rate",
    "Looks up the exchange rate between two currencies.",
    base_currency=("string", "Currency to convert from, such as USD"),
    target_currency=("string", "Currency to convert to, such as KRW"),
)

CURRENCIES = {
    "USD": Value("US dollar", "미국 달러", "US dollars"),
    "KRW": Value("Korean won", "원", "Korean won"),
    "EUR": Value("euro", "유로", "euros"),
    "JPY": Value("Japanese yen", "엔", "Japanese yen"),
    "CNY": Value("Chinese yuan", "위안", "Chinese yuan"),
    "GBP": Value("British pound", "파운드", "British pounds"),
    "CAD": Value("Canadian dollar", "캐나다 달러", "Canadian dollars"),
    "AUD": Value("Australian dollar", "호주 달러", "Australian dollars"),
    "CHF": Value("Swiss franc", "스위스 프랑", "Swiss francs"),
    "THB": Value("Thai baht", "바트", "Thai baht"),
}


class Missing(NamedTuple):
    """How a user leaves out one argument, how the assistant asks for it, what the user replies."""

    requests: tuple[Value, ...]
    question: Value
    replies: tuple[Value, ...]


class Talk(NamedTuple):
    """All that is said around one tool; the slots are filled with the case's own values."""

    complete: tuple[Value, ...]
    missing: tuple[Missing, ...]
    answer: Value


ABOUT_DISCOUNT = Talk(
    complete=(
        Value(
            "How much is {item.a} for {price} won with a {percent} discount?",
            "{price}원짜리 {item}에 {percent} 할인을 적용하면 얼마인가요?",
        ),
        Value(
            "The {item} costs {price} won. What is the price after {percent} off?",
            "{item}{은/는} {price}원인데 {percent} 할인하면 가격이 얼마예요?",
        ),
        Value(
            "Please calculate the price of {price} won after a {percent} discount.",
            "원가 {price}원에서 {percent} 할인된 가격을 계산해 주세요.",
        ),
    ),
    missing=(
        Missing(
            requests=(
                Value(
                    "The {item} costs {price} won. Please calculate the price after the discount.",
                    "{item}의 원가가 {price}원인데 할인된 가격을 계산해 주세요.",
                ),
                Value(
                    "How much do I pay for the {item} at {price} won with my staff discount?",
                    "{item}{은/는} {price}원입니다. 직원 할인을 받으면 얼마인가요?",
                ),
            ),
            question=Value(
                "What is the discount in percent?", "할인율이 몇 퍼센트인지 알려 주시겠어요?"
            ),
            replies=(
                Value("It is {percent}.", "{percent}입니다."),
                Value("I get {percent} off.", "{percent} 할인받을 수 있어요."),
            ),
        ),
        Missing(
            requests=(
                Value(
                    "How much is the {item} with a {percent} discount?",
                    "{item}에 {percent} 할인을 받으면 얼마인가요?",
                ),
                Value(
                    "What do I pay for the {item} if I use a {percent} coupon?",
                    "{percent} 할인 쿠폰으로 {item}{을/를} 사면 얼마예요?",
                ),
            ),
            question=Value("What is the original price?", "원래 가격이 얼마인지 알려 주시겠어요?"),
            replies=(
                Value("It is {price} won.", "{price}원입니다."),
                Value("The original price is {price} won.", "원래 가격은 {price}원이에요."),
            ),
        ),
    ),
    answer=Value(
        "The price of {before} won after a {percent} discount is {after} won.",
        "{before}원에서 {percent} 할인된 가격은 {after}원입니다.",
    ),
)
ABOUT_EXCHANGE = Talk(
    complete=(
        Value(
            "What is the exchange rate from {base.s} to {target.s}?",
            "{base}{을/를} {target}{으로/로} 바꿀 때의 환율을 알려 주세요.",
        ),
        Value(
            "How many {target.s} do I get for one {base}?",
            "지금 {base}에서 {target}{으로/로} 환율이 얼마인가요?",
        ),
    ),
    missing=(
        Missing(
            requests=(
                Value(
                    "I want to exchange {base.s}. What is the rate?",
                    "{base}{을/를} 환전하고 싶은데 환율이 얼마예요?",
                ),
                Value("What is one {base} worth today?", "오늘 {base} 환율을 알려 주세요."),
            ),
            question=Value(
                "Which currency do you want to convert to?", "어느 통화로 바꾸시겠어요?"
            ),
            replies=(
                Value("To {target.s}.", "{target}{으로/로} 바꿔 주세요."),
                Value("I need {target.s}.", "{target}입니다."),
            ),
        ),
        Missing(
            requests=(
                Value(
                    "I need {target.s}. What is the exchange rate?",
                    "{target}{으로/로} 환전하고 싶은데 환율이 얼마예요?",
                ),
                Value(
                    "What is the exchange rate to {target.s}?",
                    "{target}{으로/로} 바꿀 때의 환율을 알려 주세요.",
                ),
            ),
            question=Value(
                "Which currency do you want to convert from?", "어느 통화에서 바꾸시겠어요?"
            ),
            replies=(
                Value("From {base.s}.", "{base}{을/를} 바꾸려고 해요."),
                Value("I have {base.s}.", "{base}입니다."),
            ),
        ),
    ),
    answer=Value(
        "The exchange rate is now {rate} {target.s} for one {base}.",
        "현재 1 {base}{은/는} {rate} {target}입니다.",
    ),
)


class Case(NamedTuple):
    """One conversation in pieces, so that an exam can compare each."""

    tools: list[dict[str, Any]]
    request: str
    question: str | None
    """What the assistant asks for if something is missing; `reply` is what the user says then."""
    reply: str
    call: dict[str, Any]
    result: str
    answer: str


def conversations(dice: random.Random) -> Iterator[Conversation]:
    """Whole conversations with the same tools."""
    tools = some_tools(dice)
    while True:
        yield as_conversation(make_case(tools, dice))


def some_tools(dice: random.Random) -> list[dict[str, Any]]:
    """One tool or both, in any order."""
    return dice.choice([[DISCOUNT, EXCHANGE], [EXCHANGE, DISCOUNT], [DISCOUNT], [EXCHANGE]])


def as_conversation(case: Case) -> Conversation:
    """All turns: request, question and reply if something is missing, call, result, answer."""
    return Conversation(
        [
            *opening(case),
            {"role": "assistant", "content": None, "tool_calls": [{"function": case.call}]},
            says("tool", case.result),
            says("assistant", case.answer),
        ],
        case.tools,
    )


def opening(case: Case) -> list[Message]:
    """The turns before the call."""
    if case.question is None:
        return [says("user", case.request)]
    return [
        says("user", case.request),
        says("assistant", case.question),
        says("user", case.reply),
    ]


def make_case(tools: list[dict[str, Any]], dice: random.Random) -> Case:
    """A case for one of the tools, in either language."""
    if dice.choice(tools) is DISCOUNT:
        arguments, result, values = discount(dice)
        name, talk = "calculate_discount", ABOUT_DISCOUNT
    else:
        arguments, result, values = exchange(dice)
        name, talk = "get_exchange_rate", ABOUT_EXCHANGE
    korean = dice.random() < 0.5

    def say(text: Value) -> str:
        return in_korean(text.ko, values) if korean else in_english(text.en, values)

    call = {"name": name, "arguments": arguments}
    missing = dice.choice([None, None, *talk.missing])
    if missing is None:
        request = say(dice.choice(talk.complete))
        return Case(tools, request, None, "", call, result, say(talk.answer))
    return Case(
        tools,
        say(dice.choice(missing.requests)),
        say(missing.question),
        say(dice.choice(missing.replies)),
        call,
        result,
        say(talk.answer),
    )


def discount(dice: random.Random) -> tuple[dict[str, Any], str, dict[str, Value]]:
    """Arguments of a call, what the tool returns, and the values that the talk names."""
    price, percent = random_price(dice), dice.randint(2, 90)
    left = round(price * (100 - percent) / 100)
    arguments = {"original_price": price, "discount_percentage": percent}
    result: dict[str, Any] = {"discounted_price": dice.choice([left, left, float(left)])}
    if dice.random() < 0.5:
        result = {**arguments, **result}
    values = {
        "item": word("item")(dice),
        "price": same(dice.choice([f"{price:,}", f"{price}"])),
        "percent": same(f"{percent}%"),
        "before": same(f"{price:,}"),
        "after": same(f"{left:,}"),
    }
    return arguments, json.dumps(result), values


def random_price(dice: random.Random) -> int:
    """3 to 7 digits in won, each length equally likely; all end in zeros, as prices do."""
    digits = dice.randint(3, 7)
    zeros = dice.choice([1, 2, digits - 2])
    power: int = 10 ** (digits - zeros)
    return dice.randint(power // 10, power - 1) * int(10**zeros)


def exchange(dice: random.Random) -> tuple[dict[str, Any], str, dict[str, Value]]:
    """Arguments of a call, what the tool returns, and the values that the talk names."""
    base, target = dice.sample([*CURRENCIES], 2)
    whole = dice.choice([0, dice.randint(2, 999), dice.randint(1000, 9999)])
    fraction = f".{dice.randint(1, 99)}" if whole == 0 or dice.random() < 0.6 else ""
    arguments = {"base_currency": base, "target_currency": target}
    result = f'{{"rate": {whole}{fraction}}}'
    if dice.random() < 0.5:
        result = f'{{"base_currency": "{base}", "target_currency": "{target}", {result[1:]}'
    values = {
        "base": CURRENCIES[base],
        "target": CURRENCIES[target],
        "rate": same(f"{whole:,}{fraction}"),
    }
    return arguments, result, values
