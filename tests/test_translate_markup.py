"""Translate: what must come out as it went in, and what a model does with it."""

from __future__ import annotations

import pytest

from pipeline.errors import RowRejected
from pipeline.tokens import RowText
from tests.fake_model import FakeModel
from tests.test_translate import LONG, run, translate

MARKED = "Hello {name}, see <b>this</b> at https://x.example/a and `run me`."


async def test_an_answer_that_lost_markup_is_asked_for_once_more_with_a_reminder() -> None:
    answers = iter(["잃었다", MARKED])
    model = FakeModel(lambda text: next(answers))
    assert await run(model, MARKED) == MARKED
    first, second = model.asked
    assert first[1] == second[1] == {"role": "user", "content": MARKED}
    assert first[0]["content"] == translate().system_prompt
    assert second[0]["content"].startswith(translate().system_prompt + "\n")
    for mark in ("{name}", "<b>", "</b>", "https://x.example/a"):
        assert mark in second[0]["content"]
    assert "run me" not in second[0]["content"], "words of a row have no place in a system prompt"


CONTROL = "<|im_end|>"


async def test_marks_of_an_answer_cannot_close_the_system_turn() -> None:
    model = FakeModel(f"Write `{CONTROL}` now.")
    with pytest.raises(RowRejected, match=r"^markup_lost"):
        await run(model, "Write `it` now.")
    assert "im_end" in model.asked[1][0]["content"]
    assert CONTROL not in model.asked[1][0]["content"]


async def test_a_translation_that_is_shown_again_cannot_close_its_turn() -> None:
    model = FakeModel(f"say {CONTROL}")
    assert (await run(model, LONG, context="rolling")).count(CONTROL) == len(model.asked)
    assert all(CONTROL not in messages[2]["content"] for messages in model.asked[1:])


@pytest.mark.parametrize(
    ("answer", "details"),
    [
        ("안녕 <b>이것</b> https://x.example/a `run me`", "lost {name}"),
        ("안녕 {name} 이것</b> https://x.example/b `run me`", "lost <b> https://x.example/a; "
         "invented https://x.example/b"),
        (MARKED + " %s", "invented %s"),
    ],
)  # fmt: skip
async def test_markup_lost_twice_rejects_the_row_and_names_the_marks_alone(
    answer: str, details: str
) -> None:
    model = FakeModel(answer)
    with pytest.raises(RowRejected) as raised:
        await run(model, MARKED)
    assert raised.value.reason == f"markup_lost: {details}"
    assert len(model.asked) == 2


async def test_only_the_piece_that_lost_markup_is_asked_for_again() -> None:
    text, met = f"{LONG}\n\n{MARKED}", set[str]()

    def forget_once(piece: str) -> str:
        forgets = "{name}" in piece and piece not in met
        met.add(piece)
        return "잃었다" if forgets else piece

    model = FakeModel(forget_once)
    assert await run(model, text) == text
    assert len(model.texts) == len(met) + 1


async def test_code_that_a_model_will_not_copy_is_copied_for_it() -> None:
    text = "Run this:\n\n```\nprint('One. Two.')\n```\n\nIt prints."
    model = FakeModel(lambda asked: "번역")
    assert await run(model, text) == "번역\n\n```\nprint('One. Two.')\n```\n\n번역"
    assert model.texts == [text, text, "Run this:", "It prints."]


@pytest.mark.parametrize("text", ["Wrap it in `<|call|>` tags.", "It writes <|think|> first."])
async def test_marks_are_compared_as_the_model_was_shown_them(text: str) -> None:
    """It leaves out the space without width that keeps them from being control tokens."""
    model = FakeModel(text)
    assert await run(model, RowText()(text)) == text
    assert len(model.asked) == 1


async def test_a_row_that_is_code_is_not_asked_for() -> None:
    text = "\n```python\n# sum the values\nsum(x)\n```\n"
    model = FakeModel("번역")
    assert await run(model, text) == text
    assert not model.asked


@pytest.mark.parametrize(
    ("source", "target", "between"),
    [("ja", "ko", " "), ("zh-Hans", "en", " "), ("ja", "zh", ""), ("en", "ko", "")],
)
async def test_pieces_without_a_space_between_them_get_one_where_the_language_has_it(
    source: str, target: str, between: str
) -> None:
    model = FakeModel(lambda piece: "번역." if len(piece) < 40 else ("", "length"))
    task = translate(source=source, target=target)
    output = await task.run({"text": "晴れました。" * 5 + "明日は雨です。" * 3}, model)
    assert len(model.asked) == 3
    assert output.value == f"번역.{between}번역."
