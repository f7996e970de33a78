"""Chunking: nothing is lost, no chunk is over the budget, what fits is kept whole."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.chunking import (
    LONG,
    Chunk,
    Split,
    cut_smaller,
    keep,
    split,
    split_aside,
    surely_fits,
    whole,
)
from pipeline.markup import find_marks
from pipeline.model import DEMO_MODEL

SHARED = Path(__file__).parents[2] / "shared" / "data"
TOKENIZERS = {
    "demo": DEMO_MODEL,
    "A.X-3.1": SHARED / "ax31" / "A.X-3.1",
    "A.X-3.1-Light": SHARED / "ax31" / "A.X-3.1-Light",
}
LONG_DOCS = sorted((SHARED / "long-docs").rglob("*.txt"))


@cache
def tokenizer(name: str) -> Callable[[str], int]:
    """Counts with a model's own tokenizer, or skips the test where it is not beside the project."""
    from tokenizers import Tokenizer

    file = TOKENIZERS[name] / "tokenizer.json"
    if not file.is_file():
        pytest.skip(f"no tokenizer in {file.parent}")
    loaded: Any = Tokenizer.from_file(str(file))
    return lambda text: len(loaded.encode(text, add_special_tokens=False))


def words(text: str) -> int:
    return len(text.split())


def utf8(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


COUNTS: dict[str, Callable[[str], int]] = {"bytes": utf8, "characters": len}

PIECES = [
    "한국어 문장입니다. ", "값은 3.5이다.", "Hello. ", "Dr. Kim said so. ", "你好。", "ภาษาไทย",
    unicodedata.normalize("NFD", "각하"), "e\u0301\u0302", "👨‍👩‍👧", "🇰🇷", "\ufe0f", "\u200b",
    "\u202e", "שלום ",
    "مرحبا ", "\r\n", "\r", "\n", "\n\n", "  ", "\t", "\u3000", "\u2028", "\x0b", "\x00", "\ud800",
    "# ", "## 제목\n", "- ", "1. ", "    ", "> ", "| a | b |\n", "|---|---|\n", "```\n", "```",
    "~~~\n",
    "`x y`", "{name}", "%s", "https://a.b/c ", "<b>", "</b>", "a" * 50,
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=40).map("".join)


@settings(max_examples=300)
@given(texts, st.sampled_from(sorted(COUNTS)), st.integers(4, 60))
@example("", "bytes", 4)
@example(" \r\n\u3000", "bytes", 4)
@example("👨‍👩‍👧" * 9, "bytes", 4)
@example("가" * 5000, "bytes", 60)
@example("word " * 5000, "characters", 60)
@example("\n" * 5000, "characters", 4)
def test_chunks_and_separators_are_the_text_and_no_chunk_is_over_the_budget(
    text: str, unit: str, budget: int
) -> None:
    count = COUNTS[unit]
    cut = split(text, budget, count)
    assert cut.join() == text
    assert [chunk.text for chunk in cut.chunks if count(chunk.text) > budget] == []
    assert all(chunk.text and chunk.text == chunk.text.strip() for chunk in cut.chunks)
    assert not "".join(cut.separators).strip()
    assert split(text, budget, count) == cut


@settings(max_examples=60)
@given(texts.map(lambda text: unicodedata.normalize("NFC", text.replace("\ud800", ""))))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_budgets_hold_in_the_tokens_of_real_models(name: str, text: str) -> None:
    count = tokenizer(name)
    cut = split(text, 16, count)
    assert cut.join() == text
    assert max((count(chunk.text) for chunk in cut.chunks), default=0) <= 16


@settings(max_examples=200)
@given(
    st.text(st.characters(exclude_categories=["Cs"])).map(lambda t: unicodedata.normalize("NFC", t))
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_row_text_has_more_tokens_than_bytes(name: str, text: str) -> None:
    assert surely_fits(text, utf8(text))
    assert tokenizer(name)(text) <= utf8(text)
    assert not surely_fits(text + "가", utf8(text) + 2)


def test_a_character_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="one character has 4 tokens"):
        split("a 🚀 b", 3, utf8)


# --- what is kept whole ----------------------------------------------------------------------

PARAGRAPH = "One two three four five. Six seven eight nine ten."
TABLE = "| a | b |\n|---|---|\n| one | two |\n| three | four |"
CODE = "```python\ndef f(x):\n\n    return x + 1\n```"
LIST = "- one two\n  three\n- four five\n\n  six\n- seven"
KOREAN = "첫 문장은 짧다. 둘째 문장은 조금 더 길다.\n셋째 문장이다."

blocks = st.lists(st.sampled_from([PARAGRAPH, TABLE, CODE, LIST, KOREAN]), min_size=2, max_size=12)


@given(blocks, st.integers(max(map(words, [PARAGRAPH, TABLE, CODE, LIST, KOREAN])), 60))
def test_a_block_within_the_budget_is_never_cut(parts: list[str], budget: int) -> None:
    # Headings keep lists apart that would be one; with sections larger than the budget.
    text = "# Title\n\n" + "\n\n***\n\n".join(parts) + "\n"
    chunks = [chunk.text for chunk in split(text, budget, words).chunks]
    for part in set(parts):
        assert sum(chunk.count(part) for chunk in chunks) == parts.count(part)


@given(blocks, st.integers(8, 60))
def test_two_chunks_in_a_row_would_not_have_fit_one(parts: list[str], budget: int) -> None:
    cut = split("\n\n".join(parts), budget, words)
    for (one, other), space in zip(pairwise(cut.chunks), cut.separators[1:], strict=False):
        together = words(one.text + space + other.text)
        large_code = "```" in one.text + other.text
        assert together > budget or large_code


def pieces(text: str, budget: int, language: str = "en") -> list[str]:
    return [chunk.text for chunk in split(text, budget, words, language).chunks]


def test_sections_are_kept_whole_and_a_heading_goes_with_what_follows_it() -> None:
    text = "# A\n\na b c d\n\n## B\n\ne f g\n\nh i\n\n## C\n\nj k l m"
    assert pieces(text, 9) == ["# A\n\na b c d", "## B\n\ne f g\n\nh i", "## C\n\nj k l m"]
    assert pieces(text, 5) == [
        "# A", "a b c d", "## B\n\ne f g", "h i", "## C", "j k l m"
    ]  # fmt: skip


def test_a_list_is_cut_between_items_and_a_table_between_rows() -> None:
    assert pieces(LIST, 5) == ["- one two\n  three", "- four five\n\n  six", "- seven"]
    assert pieces("| a | b |\n|---|---|\n| c | d |\n| e | f |", 6) == [
        "| a | b |\n|---|---|", "| c | d |", "| e | f |"
    ]  # fmt: skip


def test_sentences_are_kept_whole_also_where_lines_were_wrapped_by_hand() -> None:
    text = (
        "It was long and\nwrapped by the author. It has\nfour sentences. Mr. Smith\nsaid 3.5! So."
    )
    assert pieces(text, 9) == [
        "It was long and\nwrapped by the author.",
        "It has\nfour sentences. Mr. Smith\nsaid 3.5! So.",
    ]


def test_korean_sentences() -> None:
    text = '그는 "좋아요."라고 말했다. 값은 3.5입니다. 가. 첫째 항목이다. 정말요? 네! 끝이다.'
    assert pieces(text, 3, "ko") == [
        '그는 "좋아요."라고 말했다.', "값은 3.5입니다.", "가. 첫째 항목이다.", "정말요? 네! 끝이다."
    ]  # fmt: skip


def test_scripts_without_spaces_are_cut_between_sentences_then_words() -> None:
    def cut(text: str, budget: int, language: str) -> list[str]:
        return [chunk.text for chunk in split(text, budget, len, language).chunks]

    assert cut("今日はいい天気です。明日も晴れます。", 11, "ja") == [
        "今日はいい天気です。",
        "明日も晴れます。",
    ]
    assert cut("ภาษาไทยง่าย", 8, "th") == ["ภาษาไทย", "ง่าย"]


@given(st.lists(st.sampled_from([
    "`code. More code`", "<a href='https://x.y/z' title='One. Two'>", "{{ name }}", "word",
    "A sentence.",
]), min_size=1, max_size=30))  # fmt: skip
def test_no_mark_is_cut(parts: list[str]) -> None:
    text = " ".join(parts)
    chunks = split(text, 5, words).chunks
    assert [m.text for m in find_marks(text)] == [
        m.text for chunk in chunks for m in find_marks(chunk.text)
    ]


@pytest.mark.parametrize("family", ["👨‍👩‍👧", "🇰🇷", "e\u0301\u0302", "ᄒ\u1161\u11ab"])
def test_graphemes_are_kept_whole(family: str) -> None:
    chunks = split(family * 20, 2 * len(family) + 1, len).chunks
    assert {chunk.text for chunk in chunks} == {family * 2}


# --- code ------------------------------------------------------------------------------------


def test_a_code_block_over_the_budget_is_cut_between_lines_and_apart_from_prose() -> None:
    code = "```py\n" + "".join(f"x{i} = {i}\n" for i in range(6)) + "```"
    cut = split(f"Before it.\n\n{code}\n\nBehind it.", 8, words)
    assert not cut.chunks[0].is_verbatim
    assert not cut.chunks[-1].is_verbatim
    inside = cut.chunks[1:-1]
    assert len(inside) > 1
    assert all(chunk.is_verbatim for chunk in inside)
    assert "".join("".join(chunk.text.split()) for chunk in inside) == "".join(code.split())


def test_a_code_block_that_fits_a_chunk_is_verbatim() -> None:
    cut = split("a b c d e\n\n```\nf g\n```\n\nh i j k l", 5, words)
    assert [chunk.is_verbatim for chunk in cut.chunks] == [False, True, False]


@pytest.mark.parametrize("text", ["```\nnever closed\n\nprose. " * 9, "    indented verse\n" * 20])
def test_what_may_be_prose_is_not_taken_for_code(text: str) -> None:
    assert not any(chunk.is_verbatim for chunk in split(text, 8, words).chunks)


def test_what_has_no_letter_is_verbatim() -> None:
    cut = split("a b c d\n\n***\n\ne f g h", 4, words)
    assert [(chunk.text, chunk.is_verbatim) for chunk in cut.chunks] == [
        ("a b c d", False), ("***", True), ("e f g h", False)
    ]  # fmt: skip
    assert [chunk.is_verbatim for chunk in whole("😂 …").chunks] == [True]
    smaller = cut_smaller("One two.\n\n***")
    assert smaller and [chunk.is_verbatim for chunk in smaller.chunks] == [False, True]


# --- join, cut_smaller, keep -----------------------------------------------------------------


def test_join_puts_other_texts_between_the_same_separators() -> None:
    cut = split("  a b\n\n\tc d\r\n", 2, words)
    assert cut == Split((Chunk("a b"), Chunk("c d")), ("  ", "\n\n\t", "\r\n"))
    assert cut.join(["가", "나"]) == "  가\n\n\t나\r\n"
    with pytest.raises(ValueError, match="argument"):
        cut.join(["가"])


@given(texts)
def test_smaller_pieces_are_the_text(text: str) -> None:
    smaller = cut_smaller(text)
    if smaller is not None:
        assert smaller.join() == text
        assert all(chunk.text and chunk.text == chunk.text.strip() for chunk in smaller.chunks)
        assert max(len(chunk.text) for chunk in smaller.chunks) < len(text)
        assert not "".join(smaller.separators).strip()


def test_code_blocks_are_cut_from_the_prose_around_them() -> None:
    smaller = cut_smaller("  One. Two:\n\n```\na. B\n```\nThree.\n\n~~~\nc\n~~~\n")
    assert smaller == Split(
        (Chunk("One. Two:"), Chunk("```\na. B\n```", True), Chunk("Three."),
         Chunk("~~~\nc\n~~~", True)),
        ("  ", "\n\n", "\n", "\n\n", "\n"),
    )  # fmt: skip
    assert cut_smaller("```\nOne. Two.\n```\n") is None


def test_a_text_is_halved_between_sentences_near_its_middle() -> None:
    smaller = cut_smaller("One. Two is short.\nThree is a bit longer. Four.")
    assert smaller
    assert [chunk.text for chunk in smaller.chunks] == [
        "One. Two is short.", "Three is a bit longer. Four."
    ]  # fmt: skip
    assert cut_smaller("It was on May 13. Dr. J. Kim came.") == Split(
        (Chunk("It was on May 13."), Chunk("Dr. J. Kim came.")), ("", " ", "")
    )
    assert cut_smaller("A single sentence, however long it may be") is None
    assert cut_smaller(" \n ") is None


@given(texts, st.integers(4, 60))
def test_what_is_kept_is_one_end_of_the_text_within_the_budget(text: str, budget: int) -> None:
    head, tail = (keep(side, text, budget, utf8) for side in ("head", "tail"))
    assert text.strip().startswith(head)
    assert text.strip().endswith(tail)
    assert utf8(head) <= budget
    assert utf8(tail) <= budget
    if utf8(text.strip()) <= budget:
        assert head == text.strip()


def test_what_is_kept_nearly_fills_the_budget_and_is_cut_between_sentences() -> None:
    text = " ".join(f"Sentence number {i} is here." for i in range(100))
    assert keep("head", text, 24, words).endswith("Sentence number 3 is here.")
    assert keep("tail", text, 44, words).startswith("Sentence number 92 is here.")


# --- long documents --------------------------------------------------------------------------


async def test_long_texts_are_cut_aside_just_like_short_ones() -> None:
    text = f"{PARAGRAPH}\n\n" * (LONG // len(PARAGRAPH) + 1)
    assert len(text) > LONG
    assert await split_aside(text, 50, words) == split(text, 50, words)
    assert await split_aside(PARAGRAPH, 5, words) == split(PARAGRAPH, 5, words)


@pytest.mark.skipif(not LONG_DOCS, reason="the long documents are not beside the checkout")
@pytest.mark.parametrize("path", LONG_DOCS, ids=lambda path: path.stem)
@pytest.mark.parametrize("budget", [512, 8192])
def test_long_documents_lose_nothing_and_are_counted_three_times_at_most(
    path: Path, budget: int
) -> None:
    count, characters = tokenizer("A.X-3.1"), 0

    def metered(text: str) -> int:
        nonlocal characters
        characters += len(text)
        return count(text)

    text = path.read_text(encoding="utf-8")
    cut = split(text, budget, metered, path.parent.name)
    assert characters < 4 * len(text)
    assert cut.join() == text
    sizes = [count(chunk.text) for chunk in cut.chunks]
    assert max(sizes) <= budget
    assert sum(sizes) / len(sizes) > 0.8 * budget


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "\u0301",
        "你好。",
        "word ",
        "- a\n",
        "a\r\n",
        "`a ",
        "<a b=c ",
        "``` x\n",
        ")",
        "👨‍👩‍👧",
    ],
)
def test_work_grows_with_the_length_of_the_text_alone(unit: str) -> None:
    def work(repeats: int) -> int:
        counted = 0

        def count(text: str) -> int:
            nonlocal counted
            counted += len(text)
            return len(text)

        split(unit * repeats, 100, count)
        return counted

    assert work(8000) < 9 * work(1000)
