"""The demo model: its sentence pairs, the sample input made of them, and what it does with text."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.demo.model import demo_model_path, ensure_demo_model

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [
    line.split("\t")
    for line in (ROOT / "pipeline/demo/pairs.tsv").read_text(encoding="utf-8").splitlines()
]
SYSTEM = (
    "You are an expert who translates the user's English sentences into Korean. "
    "Answer with the translation only."
)
SPECIAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|extra_id_13|>",
    "<|pad|>",
]
UNSEEN = [
    "x",
    "The minister said on Thursday that the bridge across the bay would stay closed until autumn.",
    "대통령은 목요일에 열린 기자 회견에서 새로운 경제 정책을 발표했다.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich 🚀",
    "one two three four five six seven eight nine ten " * 8,
]


@pytest.fixture(scope="module")
def model_path() -> Path:
    return ensure_demo_model()


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


@pytest.fixture(scope="module")
def model(model_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path)


def test_pairs_are_unique_and_have_three_fields() -> None:
    header, *rows = PAIRS
    assert header == ["topic", "en", "ko"]
    assert {len(row) for row in rows} == {3}
    assert len({en for _, en, _ in rows}) == len({ko for _, _, ko in rows}) == len(rows) == 300


@pytest.mark.parametrize(("topic", "en", "ko"), PAIRS[1:])
def test_pair_is_a_translation(topic: str, en: str, ko: str) -> None:
    placeholder = r"\{\w+\}|%[sd]"
    assert 5 <= len(en.split()) <= 20
    assert en.strip() == en and ko.strip() == ko
    assert re.search("[가-힣]", ko) and not re.search("[가-힣]", en)
    assert Counter(re.findall(placeholder, en)) == Counter(re.findall(placeholder, ko))


def test_sample_files_hold_the_sentences_of_the_pairs() -> None:
    tables = [pq.read_table(path) for path in sorted((ROOT / "configs/data").glob("*.parquet"))]
    assert [table.num_rows for table in tables] == [128, 75, 60, 30, 7]
    rows = pa.concat_tables(tables).to_pylist()
    assert sorted(row["id"] for row in rows) == list(range(1, 301))
    assert sorted((row["topic"], row["en"]) for row in rows) == sorted(
        (topic, en) for topic, en, _ in PAIRS[1:]
    )


def test_path_follows_the_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXBATCH_CACHE", str(tmp_path / "chosen"))
    assert demo_model_path().parent == tmp_path / "chosen"
    monkeypatch.delenv("AXBATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model_path().parent == tmp_path / "axbatch"
    assert re.fullmatch(r"demo-[0-9a-f]{12}", demo_model_path().name)


def test_model_is_built_once(model_path: Path) -> None:
    announced: list[str] = []
    before = model_path.stat().st_mtime_ns
    assert ensure_demo_model(announce=announced.append) == model_path
    assert model_path.stat().st_mtime_ns == before
    assert announced == []


@pytest.mark.parametrize(
    "text", [*UNSEEN, "  a\n\n\tb  ", "ㅋㅋ뷁 똠방각하", "\x00\x7f é 漢字", ""]
)
def test_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_token_is_one_id(tokenizer: Any, token: str) -> None:
    assert len(tokenizer.encode(token)) == 1
    assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == ""


def test_chat_template_has_the_shape_of_ax(tokenizer: Any) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a\n b "}]
    closed = "<|im_start|><|system|>Be kind.<|im_end|><|im_start|><|user|>a\n b <|im_end|>"
    render = tokenizer.apply_chat_template
    assert render(turns, tokenize=False) == closed
    assert (
        render(turns, tokenize=False, add_generation_prompt=True)
        == f"{closed}<|im_start|><|assistant|>"
    )


def test_greedy_decoding_gives_known_translations(model: Any, tokenizer: Any) -> None:
    for _, en, ko in PAIRS[1::60]:
        assert answer(model, tokenizer, en) == f"{ko}<|im_end|>"


@pytest.mark.parametrize("text", UNSEEN)
def test_answer_to_unseen_text_ends_by_itself(model: Any, tokenizer: Any, text: str) -> None:
    assert answer(model, tokenizer, text).endswith("<|im_end|>")


def answer(model: Any, tokenizer: Any, text: str) -> str:
    """What the model answers to `text`, greedily, in at most 120 tokens."""
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=120)[0]
    return str(tokenizer.decode(output[prompt["input_ids"].shape[1] :]))
