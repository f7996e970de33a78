"""Summarize, with a fake model: prompts, long texts round by round, and where it must end."""

from typing import Any

import pytest

from infra.demo_model import summaries
from jobs.summarize import Summarize
from pipeline.errors import RowRejected
from pipeline.records import Output
from tests.fake_model import FakeModel, echo

KEYS = {"kind": "summarize", "text": "text"}


def summarize(**keys: Any) -> Summarize:
    return Summarize.model_validate(KEYS | keys)


async def run(model: FakeModel, text: str, **keys: Any) -> str:
    output = await summarize(**{"chunk_tokens": 16, **keys}).run({"text": text}, model)
    assert output.status == "ok"
    return str(output.value)


SENTENCES = [f"Sentence number {i} has six words." for i in range(40)]
LONG = "\n\n".join(" ".join(SENTENCES[i : i + 2]) for i in range(0, 40, 2))


def first_words(text: str) -> str:
    return " ".join(text.split()[:3])


async def test_a_short_text_is_one_request() -> None:
    model = FakeModel(" Short.\n")
    assert await summarize().run({"text": " A text. "}, model) == Output("Short.")
    [[system, user]] = model.asked
    assert system == {"role": "system", "content": summaries.PROMPT}
    assert user == {"role": "user", "content": " A text. "}


def test_length_and_instructions_are_in_the_prompt() -> None:
    told = summarize(length="three bullet points", instructions="In Korean.")
    assert told.system_prompt == (
        "Summarize the user's text in three bullet points. Answer with the summary only.\n"
        "In Korean."
    )
    assert told.identity()["system_prompt"] == told.system_prompt


async def test_a_long_text_is_summarised_in_rounds_until_it_fits() -> None:
    model = FakeModel(first_words)
    assert await run(model, LONG) == "Sentence number 0"
    pieces = model.texts[:20]
    assert "\n\n".join(pieces) == LONG
    assert all(len(text.split()) <= 16 for text in model.texts)
    rest = [
        number for number in range(0, 40, 2) if f"number {number}" in " ".join(model.texts[20:24])
    ]
    assert rest == [*range(0, 40, 2)], "the second round reads what the first one wrote"
    assert {messages[0]["content"] for messages in model.asked} == {summaries.PROMPT}


async def test_summaries_are_joined_by_empty_lines() -> None:
    model = FakeModel(first_words)
    await run(model, "\n\n".join(LONG.split("\n\n")[:3]))
    assert model.texts[-1] == "Sentence number 0\n\nSentence number 2\n\nSentence number 4"


@pytest.mark.parametrize("answer", [echo, lambda text: text + " more", lambda text: "x" * 70])
async def test_summaries_that_do_not_get_shorter_end_the_row(answer: Any) -> None:
    model = FakeModel(answer)
    with pytest.raises(RowRejected, match=r"^too_long: "):
        await run(model, LONG)
    assert len(model.asked) == 20


async def test_the_cost_of_all_rounds_is_bounded() -> None:
    model = FakeModel(lambda text: text[: int(0.74 * len(text))])
    await run(model, LONG)
    assert sum(map(len, model.texts)) < 4 * len(LONG)


async def test_pieces_that_say_nothing_are_not_asked_for() -> None:
    model = FakeModel("Short.")
    rules = "\n\n".join(["* * * * * * * * * * * * * * * *"] * 3)
    await run(model, f"{SENTENCES[0]}\n\n{rules}\n\n{SENTENCES[1]}")
    assert all(any(map(str.isalnum, text)) for text in model.texts)


async def test_a_row_is_ok_only_if_all_its_pieces_are() -> None:
    model = FakeModel(lambda text: ("cut", "length") if "number 6 " in text else "Short.")
    with pytest.raises(RowRejected, match=r"^truncated: "):
        await run(model, LONG)


async def test_a_text_may_have_what_max_tokens_leaves_of_the_context() -> None:
    model = FakeModel("Short.", max_tokens=100, max_model_len=1000)
    await run(model, "word " * 800, chunk_tokens=None)
    assert len(model.asked) == 1


@pytest.mark.parametrize(
    ("overflow", "kept"), [("truncate_tail", SENTENCES[0]), ("truncate_head", SENTENCES[-1])]
)
async def test_truncation_leaves_one_request(overflow: str, kept: str) -> None:
    model = FakeModel("Short.")
    await run(model, LONG, overflow=overflow)
    assert len(model.asked) == 1
    assert kept in model.texts[0]
    with pytest.raises(RowRejected, match=r"^too_long: "):
        await run(model, LONG, overflow="reject")


@pytest.mark.parametrize(("text", "reason"), [(None, "null"), ("\n", "empty"), (b"x", "not_text")])
async def test_a_row_without_text_costs_no_request(text: object, reason: str) -> None:
    model = FakeModel()
    with pytest.raises(RowRejected, match=f"^{reason}"):
        await summarize().run({"text": text}, model)
    assert model.asked == []
