"""Counting texts: which are counted, what it may take, and that tokenizers count as they should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting import Sample, Script, TextCounts
from pipeline.config.costs import AccountingConfig
from pipeline.counting import (
    BUDGET,
    LEARNING_CHARACTERS,
    LEARNING_ROWS,
    CountTokens,
    TextCounter,
    check_accounting,
    load_baseline,
    load_tokenizer,
    texts_in,
)
from pipeline.errors import JobFileError
from pipeline.model import DEMO_MODEL

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROOT = Path(__file__).parents[1]

# --- which rows ------------------------------------------------------------------------------


def row_of(text: str) -> int:
    """As a tokenizer that counts row N's text as N tokens."""
    return int(text)


def counted_rows(counter: TextCounter, sizes: Sequence[int]) -> TextCounts:
    """Of consecutive units of so many rows each; row N has text N."""
    total, start = TextCounts(), 0
    for size in sizes:
        rows = [str(row) for row in range(start, start + size)]
        total.add(counter.count({"text": rows}, start)["text"])
        start += size
    return total


unit_sizes = st.lists(st.integers(0, 40), max_size=12)


@given(unit_sizes, st.sampled_from([(1.0, 1), (0.5, 2), (0.25, 4), (0.1, 10), (0.01, 100)]))
def test_a_share_is_every_nth_row_however_units_are_cut(
    sizes: list[int], share: tuple[float, int]
) -> None:
    sample, every = share
    asked: list[int] = []

    def count(text: str) -> int:
        asked.append(int(text))
        return 1

    total = counted_rows(TextCounter(count, None, sample), sizes)
    assert asked == [*range(0, sum(sizes), every)]
    assert total.texts == sum(sizes)
    assert total.sample.texts == total.sample.model == len(asked)
    assert total.characters == sum(len(str(row)) for row in range(sum(sizes)))


@given(unit_sizes, st.sampled_from([("0.3", 3, 10), ("0.66", 33, 50), ("0.999", 999, 1000)]))
def test_a_share_that_is_not_every_nth_row_is_that_share(
    sizes: list[int], share: tuple[str, int, int]
) -> None:
    given, counted, of = share
    sizes = [*sizes, 3 * of - sum(sizes) % of]
    total = counted_rows(TextCounter(row_of, None, float(given)), sizes)
    assert total.sample.texts == counted * sum(sizes) // of
    alike = counted_rows(TextCounter(row_of, None, float(given)), [sum(sizes)])
    assert total == alike, "however units are cut"


def never(text: str) -> int:
    raise AssertionError("counted")


@given(unit_sizes)
def test_share_of_nothing_still_knows_texts_and_characters(sizes: list[int]) -> None:
    total = counted_rows(TextCounter(never, never, 0.0), sizes)
    assert (total.texts, total.samples) == (sum(sizes), {})
    assert total.characters == sum(len(str(row)) for row in range(sum(sizes)))


def test_without_a_tokenizer_nothing_is_sampled() -> None:
    counts = TextCounter(None, None, 1.0).count({"text": ["a", "나"]})["text"]
    assert counts == TextCounts(2, 2)


def test_each_tokenizer_counts_alone() -> None:
    columns = {"text": ["1", "2", "3"]}
    model = TextCounter(row_of, None, 1.0).count(columns)["text"].sample
    baseline = TextCounter(None, row_of, 1.0).count(columns)["text"].sample
    assert (model.model, model.baseline) == (6, 0)
    assert (baseline.model, baseline.baseline) == (0, 6)


def test_columns_are_counted_row_by_row_together() -> None:
    counter = TextCounter(row_of, row_of, 0.5)
    counts = counter.count({"a": ["1", "2", "3", "4"], "b": ["10", None, None, "40"]}, offset=7)
    assert counts["a"].sample.model == 2 + 4, "rows 8 and 10"
    assert (counts["b"].texts, counts["b"].sample.texts, counts["b"].sample.model) == (2, 1, 40)


def test_no_columns_and_no_rows() -> None:
    counter = TextCounter(row_of, row_of, 1.0)
    assert counter.count({}) == {}
    assert counter.count({"a": []}) == {"a": TextCounts()}


def test_text_is_found_at_any_depth_and_only_text() -> None:
    value = {"en": "ab", "n": 3, "tags": ["c", None, {"deep": ("de", 1.5, b"x", True)}], "no": None}
    assert [*texts_in(value)] == ["ab", "c", "de"]
    counts = TextCounter(len, len, 1.0).count({"v": [value, None, "", [], {}, 7]})["v"]
    assert (counts.texts, counts.characters) == (5, 5), "null is no text"
    assert counts.sample.texts == 5
    assert counts.sample.model == counts.sample.baseline == counts.sample.characters == 5
    assert counts.samples["other"].texts == 4


# --- what it takes ---------------------------------------------------------------------------


class Clocks:
    """Time that passes, and time that this thread works, of a tokenizer that takes `cost` each."""

    def __init__(self, cost: float, sample: Any = "auto") -> None:
        self.cost, self.now, self.worked, self.rows = cost, 0.0, 0.0, 0
        self.counter = TextCounter(
            self.count, None, sample, clock=lambda: self.now, work_clock=lambda: self.worked
        )

    def count(self, text: str) -> int:
        self.now += self.cost
        self.worked += self.cost
        self.rows += 1
        return 1

    def unit(self, rows: int, passing: float) -> TextCounts:
        self.now += passing
        return self.counter.count({"text": ["a"] * rows})["text"]


@given(st.floats(1e-4, 1.0), st.integers(1, 300), st.floats(0.01, 100.0))
def test_auto_keeps_to_its_share_and_uses_it(cost: float, rows: int, passing: float) -> None:
    clocks, learned, budget, last = Clocks(cost), 0.0, 0.0, 0
    for _ in range(300):
        last = clocks.unit(rows, passing).sample.texts
        if not learned and clocks.rows >= LEARNING_ROWS:
            learned = clocks.worked
            assert clocks.rows < 2 * LEARNING_ROWS
        budget = BUDGET * clocks.now
        assert clocks.worked <= 1.001 * max(budget, learned or LEARNING_ROWS * cost)
    assert learned
    if budget > 2 * learned and last < rows:
        assert clocks.worked + 2 * cost > budget / 2, "far less than its share"


def test_auto_is_back_at_its_share_after_rows_that_took_longer_than_those_before() -> None:
    clocks = Clocks(1e-4)
    for _ in range(20):
        clocks.unit(100, 1.0)
    clocks.cost = 0.1
    shares = []
    for _ in range(2000):
        clocks.unit(100, 1.0)
        assert clocks.worked <= BUDGET * clocks.now + 100 * clocks.cost, "one unit too many"
        shares.append(clocks.worked / clocks.now)
    assert max(shares) > 2 * BUDGET and shares[-1] < 1.01 * BUDGET
    assert clocks.rows > 8 + 20 * 100, "it goes on counting"


def test_auto_counts_all_where_that_is_cheap() -> None:
    clocks = Clocks(1e-6)
    counted = [clocks.unit(256, 1.0) for _ in range(20)]
    assert [unit.sample.texts for unit in counted[1:]] == [256] * 19
    assert clocks.worked < BUDGET * clocks.now


@pytest.mark.parametrize(("rows", "units"), [(3, 3), (8, 1), (5, 2), (256, 1), (1, 8)])
def test_auto_first_counts_enough_to_know_what_a_row_takes(rows: int, units: int) -> None:
    clocks = Clocks(1000.0)
    for _ in range(units + 5):
        clocks.unit(rows, 1.0)
    assert clocks.rows == max(LEARNING_ROWS, rows * units if rows < LEARNING_ROWS else 0)


def test_auto_learns_from_no_more_text_than_a_commit_can_wait_for() -> None:
    asked: list[int] = []
    clocks = Clocks(0.0)

    def count(text: str) -> int:
        asked.append(len(text))
        return 1

    counter = TextCounter(count, None, "auto", lambda: clocks.now, lambda: clocks.worked)
    long, huge = "a" * (LEARNING_CHARACTERS // 2), "a" * (3 * LEARNING_CHARACTERS)
    counter.count({"text": [huge, *[long] * 7]})
    assert asked == [len(long)] * 2, "a huge one not, of the others what fits"
    clocks.now = 60.0
    counter.count({"text": [huge, *[long] * 7]})
    assert asked == [len(long)] * 4, "as much again in a minute"
    clocks.now = 240.0
    counter.count({"text": [huge]})
    assert asked[4:] == [len(huge)], "its time has come"


def test_auto_spreads_what_it_can_afford() -> None:
    asked: list[int] = []

    def count(text: str) -> int:
        asked.append(int(text))
        clocks.worked += 0.01
        return 1

    clocks = Clocks(0.0)
    counter = TextCounter(count, None, "auto", lambda: clocks.now, lambda: clocks.worked)
    counter.count({"text": [str(row) for row in range(80)]})
    assert asked == [*range(0, 80, 10)]
    clocks.now, asked[:] = 100.0, []
    counter.count({"text": [str(row) for row in range(920)]})  # 92 of them can be paid for
    assert asked == [*range(0, 920, 10)]


def test_a_share_that_was_asked_for_knows_no_budget() -> None:
    clocks = Clocks(1000.0, 0.5)
    for _ in range(5):
        clocks.unit(20, 1.0)
    assert clocks.rows == 50


# --- scripts ---------------------------------------------------------------------------------

KOREAN, ENGLISH = "동해물과 백두산이", "the quick brown fox"


@pytest.mark.parametrize(
    ("text", "script", "hangul", "latin"),
    [
        (KOREAN, "hangul", 8, 0),
        (ENGLISH, "latin", 0, 16),
        ("2026-11-25 10:30, 3.5% (漢字) 😀", "other", 0, 0),
        ("", "other", 0, 0),
        (f"GPU {KOREAN}", "hangul", 8, 3),
        (f"{ENGLISH} 김치", "latin", 2, 16),
        ("가a", "hangul", 1, 1),
        (unicodedata.normalize("NFD", KOREAN), "hangul", 20, 0),
        ("ㅋㅋㅋ ㅠㅠ", "hangul", 5, 0),
        ("Ünïcödé naïve ß œ ×÷", "latin", 0, 14),
        ("привет мир", "other", 0, 0),
    ],
)
def test_script_is_that_of_most_letters(text: str, script: Script, hangul: int, latin: int) -> None:
    counts = TextCounter(len, len, 1.0).count({"text": [text]})["text"]
    expected = Sample()
    expected.count(len(text), hangul, latin, len(text), len(text))
    assert counts.samples == {script: expected}


# --- tokenizers ------------------------------------------------------------------------------

NO_NETWORK = ("unshare", "--map-root-user", "--net")

COUNT_GOLDENS = """
import json, socket, sys
from pipeline.counting import load_baseline
try:
    socket.socket(type=socket.SOCK_DGRAM).connect(("192.0.2.1", 9))  # sends nothing
except OSError:
    count = load_baseline("o200k_base")
    print(json.dumps([count(json.loads(line)["text"]) for line in open(sys.argv[1])]))
else:
    sys.exit("there is a network")
"""


def test_o200k_counts_as_everyone_does_without_a_network(tmp_path: Path) -> None:
    """Six implementations agree on these counts, see the folder's notes."""
    goldens = SHARED / "o200k" / "goldens_1600.jsonl"
    if not goldens.is_file():
        pytest.skip("the golden counts are not beside the checkout")
    if not shutil.which("unshare") or subprocess.run([*NO_NETWORK, "true"]).returncode:
        pytest.skip("a process may not be without network here")
    done = subprocess.run(
        [*NO_NETWORK, sys.executable, "-c", COUNT_GOLDENS, goldens],
        cwd=ROOT, env={**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in goldens.read_text("utf-8").splitlines()]
    assert len(lines) == 1600
    assert json.loads(done.stdout) == [len(line["ids"]) for line in lines]


def test_cl100k_is_another_tokenizer() -> None:
    assert load_baseline("cl100k_base")("hello world") == 2
    korean = "안녕하세요, 만나서 반갑습니다."
    assert load_baseline("cl100k_base")(korean) > load_baseline("o200k_base")(korean) > 5


def test_folder_counts_the_text_alone(tmp_path: Path) -> None:
    """All of it, and nothing around it, whatever its file would have done to it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    start = "<|im_start|>"
    with_all = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    with_all.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
    )
    with_all.enable_truncation(8)
    with_all.enable_padding(length=8)
    with_all.save(str(tmp_path / "tokenizer.json"))
    for folder in (str(DEMO_MODEL), str(tmp_path)):
        for count in (load_tokenizer(folder), load_baseline(folder)):
            for text in (KOREAN, ENGLISH, "", " ", "a" * 5000):
                assert count(text) == len(tokenizer.encode(text, add_special_tokens=False).ids)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|endofprompt|>"]


@pytest.mark.parametrize("name", ["o200k_base", "cl100k_base", str(DEMO_MODEL), "A.X-3.1"])
@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_in_text_are_plain_text(name: str, token: str) -> None:
    """As they are to the model, which gets them with a character in between (see RowText)."""
    if name == "A.X-3.1":
        name = str(SHARED / "ax31" / name)
        if not Path(name).is_dir():
            pytest.skip(f"no tokenizer in {name}")
    count: CountTokens = load_baseline(name)
    assert count(token) > 2
    assert count(f"{KOREAN}\n{token}\n{ENGLISH}") > count(f"{KOREAN}\n\n{ENGLISH}") + 2


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked, and the answer is there at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("key", ["baseline", "tokenizer"])
@pytest.mark.parametrize(
    "name",
    ["o200k", "no/such", "a/b/c", "two words", "/nowhere", "./nowhere", "~/nowhere", "empty",
     "broken"],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused_by_its_key(
    tmp_path: Path, offline: None, key: str, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": {}}')
    name = str(tmp_path / name) if name in ("empty", "broken") else name
    with pytest.raises(JobFileError, match=rf"^accounting\.{key}: ") as refused:
        check_accounting(AccountingConfig.model_validate({key: name}))
    assert name in str(refused.value)
    hint = str(refused.value.hint)
    is_near = key == "baseline" and name == "o200k"
    assert hint == "Did you mean `o200k_base`?" if is_near else "o200k_base or cl100k_base" in hint


def test_tokenizers_that_are_there_pass(offline: None) -> None:
    for baseline in ("o200k_base", "cl100k_base", None, str(DEMO_MODEL)):
        check_accounting(AccountingConfig(baseline=baseline, tokenizer=str(DEMO_MODEL)))
