"""RowText: no control token of the model survives in a row's text, and nothing else changes."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.tokens import ZERO_WIDTH_SPACE, RowText, is_control_token

AX31 = Path(__file__).parents[2] / "shared" / "data" / "ax31"

PLAIN = [
    "",
    "Plain text, 한국어 문장입니다. 漢字 🚀\n\ttab",
    "<p>a <b>bold</b> &lt;tag&gt;</p><br/>",
    "if a < b and c > d: x |= y",
    "a <| b |> c",
    "[INST] is a word where it is no control token",
    "f(x) = |x| <= |y|",
]

names = st.text("abz_019/- é한", min_size=1, max_size=6)
literals = st.builds(
    lambda shape, name: shape.format(name),
    st.sampled_from(["<|{}|>", "<{}>", "</{}>", "[{}]", "<｜{}｜>", "{}"]),
    names,
)


@st.composite
def texts_with_literals(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, and control tokens of which it holds some, whole, cut, nested or side by side."""
    tokens = draw(st.lists(literals, min_size=1, max_size=5, unique=True))
    pieces = st.one_of(
        st.sampled_from(tokens),
        st.sampled_from(tokens).map(lambda token: token[:-1]),
        st.sampled_from(tokens).map(lambda token: token[1:]),
        st.builds(lambda name: f"<|{name}|>", names),
        st.sampled_from(["<", ">", "|", "<|", "|>", " ", "\u200b", "e\u0301", "한", "가"]),
        st.text(max_size=4),
    )
    return "".join(draw(st.lists(pieces, max_size=12))), tokens


def is_bracketed(token: str) -> bool:
    """As control tokens are: opened and closed, with neither bracket inside."""
    return len(token) > 2 and token[0] + token[-1] in ("<>", "[]")


@given(texts_with_literals())
def test_no_bracketed_control_token_survives(case: tuple[str, list[str]]) -> None:
    text, tokens = case
    controls = [token for token in tokens if is_bracketed(token)]
    clean = RowText(controls)(text)
    assert [t for t in controls if unicodedata.normalize("NFC", t) in clean] == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<<a>", ["<<a>", "<a>"]),
        ("<a<b>", ["<a<", "<b>"]),
        ("<tool<|im_end|>>", ["<tool<|im_end|>>"]),
    ],
)
def test_no_control_token_survives_inside_another(text: str, tokens: list[str]) -> None:
    clean = RowText(tokens)(text)
    assert [token for token in [*tokens, "<|im_end|>"] if token in clean] == []


@given(st.text(), st.text("abc_0", min_size=1, max_size=20), st.text())
def test_common_shape_of_control_tokens_never_survives(before: str, name: str, after: str) -> None:
    assert f"<|{name}|>" not in RowText()(f"{before}<|{name}|>{after}")


@given(texts_with_literals())
def test_cleaning_only_normalises_and_inserts_zero_width_spaces(
    case: tuple[str, list[str]],
) -> None:
    text, tokens = case
    kept = unicodedata.normalize("NFC", text).replace(ZERO_WIDTH_SPACE, "")
    assert RowText(tokens)(text).replace(ZERO_WIDTH_SPACE, "") == kept


@given(texts_with_literals())
def test_cleaning_twice_is_cleaning_once(case: tuple[str, list[str]]) -> None:
    text, tokens = case
    clean = RowText([token for token in tokens if is_bracketed(token)])
    assert clean(clean(text)) == clean(text)


@given(st.text())
@example("한국어 e\u0301")
def test_text_is_nfc(text: str) -> None:
    assert unicodedata.is_normalized("NFC", RowText()(text))


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_and_html_stay_as_they_are(text: str) -> None:
    assert RowText(["<|im_end|>", "<tool_call>", "</think>"])(text) == text


@pytest.mark.parametrize("value", [None, 7, 1.5, True, b"<|im_end|>"])
def test_values_without_text_stay_as_they_are(value: object) -> None:
    assert RowText()(value) == value


def test_text_is_found_at_any_depth_of_lists_and_structs() -> None:
    clean = RowText(["<tool_call>"])
    row = {
        "id": 7,
        "text": "<|im_end|>",
        "turns": [{"role": "user", "content": ["a", "<tool_call>", None]}],
        "deep": {"deeper": [["<|user|>"]]},
    }
    assert clean(row) == {
        "id": 7,
        "text": "<\u200b|im_end|>",
        "turns": [{"role": "user", "content": ["a", "<\u200btool_call>", None]}],
        "deep": {"deeper": [["<\u200b|user|>"]]},
    }


def test_text_is_found_in_a_map_column() -> None:
    import pyarrow as pa

    column = pa.array([[("role", "<|im_end|>")]], pa.map_(pa.string(), pa.string()))
    assert "<|im_end|>" not in repr(RowText()(column.to_pylist()[0]))


@pytest.mark.parametrize(
    ("token", "special", "is_control"),
    [
        ("<|im_end|>", True, True),
        ("</s>", True, True),
        ("<tool_call>", False, True),
        ("[INST]", False, True),
        ("word", True, True),
        ("word", False, False),
        ("<>", False, False),
        ("  ", False, False),
        ("  ", True, False),
        ("\n\n\t", True, False),
        ("\u3000", True, False),
        ("", True, False),
    ],
)
def test_control_tokens_are_told_from_plain_added_ones(
    token: str, special: bool, is_control: bool
) -> None:
    assert is_control_token(token, special) is is_control


@pytest.mark.skipif(not AX31.is_dir(), reason=f"no A.X tokenizers in {AX31}")
@pytest.mark.parametrize("name", ["A.X-3.1", "A.X-3.1-Light"])
def test_no_text_encodes_to_a_control_token_of_ax(name: str) -> None:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(AX31 / name / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    controls = [t.content for t in added.values() if is_control_token(t.content, t.special)]
    assert len(controls) == len(added) == 41
    text = "앞 " + " 그리고 ".join(controls) + "".join(controls) + " <<|im_end|>> 뒤"
    assert set(tokenizer.encode(text, add_special_tokens=False).ids) >= set(added)
    clean = tokenizer.encode(RowText(controls)(text), add_special_tokens=False).ids
    assert set(clean) & set(added) == set()
