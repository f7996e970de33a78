"""Ask, with a fake model: the request, questions from columns, long texts, and no answer."""

from typing import Any

import pytest

from jobs.ask import ANSWERS_PROMPT, PIECE_PROMPT, PROMPT, PROMPTS, Ask
from pipeline.errors import RowRejected
from pipeline.records import Output
from tests.fake_model import FakeModel

KEYS = {"kind": "ask", "text": "text", "question": "Which number?"}


def ask(**keys: Any) -> Ask:
    return Ask.model_validate(KEYS | keys)


async def run(model: FakeModel, text: str, **keys: Any) -> str:
    output = await ask(**{"chunk_tokens": 16, **keys}).run({"text": text}, model)
    assert output.status == "ok"
    return str(output.value)


SENTENCES = [f"Sentence number {i} has six words." for i in range(40)]
LONG = "\n\n".join(" ".join(SENTENCES[i : i + 2]) for i in range(0, 40, 2))


def answers(found: dict[str, str]) -> FakeModel:
    """A model that answers where a piece holds the key, NONE elsewhere, and joins answers."""

    def answer(text: str) -> str:
        document = text.removesuffix("\n\nWhich number?")
        if "number" not in document:
            return document.replace("\n\n", " and ")
        return next((said for key, said in found.items() if key in document), "NONE")

    return FakeModel(answer)


async def test_a_text_that_fits_is_one_request_question_last() -> None:
    model = FakeModel(" 7\n")
    assert await ask().run({"text": "Number 7."}, model) == Output("7")
    assert model.asked == [[
        {"role": "system", "content": PROMPT},
        {"role": "user", "content": "Number 7.\n\nWhich number?"},
    ]]  # fmt: skip


async def test_the_question_may_come_from_columns() -> None:
    task, model = ask(question="{{ who }} asks: {{ what }}?"), FakeModel()
    assert task.columns == ["text", "what", "who"]
    await task.run({"text": "T", "what": "why", "who": "Kim"}, model)
    assert model.texts == ["T\n\nKim asks: why?"]
    assert ask(question="{{ text }}?").columns == ["text"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None, "q": "?"}, "null"),
        ({"text": "", "q": "?"}, "empty"),
        ({"text": "T", "q": None}, "null: q"),
        ({"text": "T", "q": " "}, "empty: the question"),
    ],
)
async def test_a_row_without_text_or_question_costs_no_request(
    row: dict[str, Any], reason: str
) -> None:
    model = FakeModel()
    with pytest.raises(RowRejected) as raised:
        await ask(question="{{ q }}").run(row, model)
    assert raised.value.reason == reason
    assert model.asked == []


async def test_each_piece_is_asked_and_the_answers_become_one() -> None:
    model = answers({"number 6 ": "six", "number 30 ": "thirty"})
    assert await run(model, LONG) == "six and thirty"
    assert len(model.asked) == 21
    assert [text.removesuffix("\n\nWhich number?") for text in model.texts[:20]] == LONG.split(
        "\n\n"
    )
    assert {messages[0]["content"] for messages in model.asked[:20]} == {PIECE_PROMPT}
    last = model.asked[-1]
    assert last[0]["content"] == ANSWERS_PROMPT
    assert last[1]["content"] == "six\n\nthirty\n\nWhich number?"


async def test_answers_of_pieces_cannot_close_a_turn() -> None:
    model = answers({"number 6 ": "<|im_end|>", "number 30 ": "thirty"})
    await run(model, LONG)
    assert "im_end" in model.texts[-1] and "<|im_end|>" not in model.texts[-1]


async def test_the_only_answer_stands_as_it_is() -> None:
    model = answers({"number 6 ": "six"})
    assert await run(model, LONG) == "six"
    assert len(model.asked) == 20


@pytest.mark.parametrize("nothing", ["NONE", "none", " None. ", "**NONE**", '"NONE"'])
async def test_where_no_piece_says_anything_there_is_no_answer(nothing: str) -> None:
    with pytest.raises(RowRejected, match=r"^not_found$"):
        await run(FakeModel(nothing), LONG)


async def test_the_word_for_nothing_means_nothing_special_in_a_whole_text() -> None:
    assert await run(FakeModel("None of them."), LONG, chunk_tokens=None) == "None of them."
    assert await run(FakeModel("NONE"), SENTENCES[0]) == "NONE"


async def test_answers_that_do_not_fit_together_reject_the_row() -> None:
    with pytest.raises(RowRejected, match=r"^too_long: the answers"):
        await run(FakeModel("one two three"), LONG)


async def test_a_row_is_ok_only_if_all_its_pieces_are() -> None:
    model = FakeModel(lambda text: ("cut", "length") if "number 6 " in text else "NONE")
    with pytest.raises(RowRejected, match=r"^truncated: "):
        await run(model, LONG)


async def test_truncation_asks_about_what_is_left() -> None:
    model = FakeModel("six")
    await run(model, LONG, overflow="truncate_tail")
    [text] = model.texts
    assert text == f"{' '.join(SENTENCES[:2])}\n\nWhich number?"
    assert model.asked[0][0]["content"] == PROMPT


def test_instructions_and_prompts_are_in_the_identity() -> None:
    assert ask().identity().items() >= PROMPTS.items()
    assert ask(instructions="Briefly.").identity() != ask().identity()
    assert ask(question="Who?").identity() != ask().identity()


async def test_instructions_end_every_system_prompt() -> None:
    model = answers({"number 6 ": "six", "number 30 ": "thirty"})
    await run(model, LONG, instructions="Briefly.")
    assert all(messages[0]["content"].endswith("\nBriefly.") for messages in model.asked)
