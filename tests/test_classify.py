"""Classify, with a fake model: always one of the labels, and what it asks for."""

import pytest
from pydantic import ValidationError

from jobs.classify import Classify
from pipeline.errors import RowRejected
from pipeline.records import Output
from tests.fake_model import FakeModel

LABELS = ["order", "complaint"]


def classify(**keys: object) -> Classify:
    return Classify.model_validate({"kind": "classify", "text": "text", "labels": LABELS} | keys)


@pytest.mark.parametrize("label", LABELS)
async def test_row_gets_the_models_label(label: str) -> None:
    model = FakeModel(f" {label}\n")
    assert await classify().run({"text": "Where is my parcel?"}, model) == Output(label)
    [[system, user]] = model.asked
    assert user["content"] == "Where is my parcel?"
    assert all(label in system["content"] for label in LABELS)


async def test_answer_that_is_no_label_is_rejected() -> None:
    with pytest.raises(RowRejected, match=r"^no_label$"):
        await classify().run({"text": "Hello"}, FakeModel("order, I think"))


async def test_long_text_loses_its_tail_and_is_asked_for_once() -> None:
    model = FakeModel("order", max_tokens=10, max_model_len=200)
    await classify().run({"text": "first " + "word " * 1000 + "last"}, model)
    [text] = model.texts
    assert text.startswith("first ")
    assert "last" not in text
    with pytest.raises(RowRejected, match=r"^too_long: "):
        await classify(overflow="reject").run({"text": "word " * 1000}, model)


def test_labels_decide_the_output() -> None:
    assert classify().identity() != classify(labels=[*LABELS, "other"]).identity()
    for wrong in (["one"], ["one", "two "], ["one", ""], ["one", "one"]):
        with pytest.raises(ValidationError):
            classify(labels=wrong)
