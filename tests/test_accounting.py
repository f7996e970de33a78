"""Accounting: units add up to the whole, intervals hold the truth, no row counts twice."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.accounting import (
    NOTHING_USED,
    SCRIPTS,
    Account,
    Interval,
    Sample,
    Script,
    TextCounts,
    Usage,
    bucket_of,
    bucket_start,
)
from pipeline.merging import publish, republish
from pipeline.parts import (
    FOOTER_KEY,
    Overlay,
    Stamp,
    commit_part,
    missing_ranges,
    overlay_key,
    read_stamp,
    result_fields,
    result_table,
    retry_key,
)
from pipeline.records import DEFERRED, Counts, Output, Unit
from pipeline.storage import Folder
from tests.conftest import PreparedJob

# --- sums ------------------------------------------------------------------------------------

Size = tuple[int, int, int, int, int]
"""Of a text: characters, Hangul, Latin, the model's and the baseline's tokens."""

sizes: st.SearchStrategy[Size] = st.just((0, 0, 0, 0, 0)) | st.tuples(
    st.integers(1, 10**6), *[st.integers(0, 10**6)] * 4
)
texts = st.lists(st.tuples(st.sampled_from(SCRIPTS), sizes, st.booleans()), max_size=12)
"""By script, and whether it is counted."""


def counts_of(given: Iterable[tuple[Script, Size, bool]]) -> TextCounts:
    counts = TextCounts()
    for script, size, is_counted in given:
        counts.texts += 1
        counts.characters += size[0]
        if is_counted:
            counts.samples.setdefault(script, Sample()).count(*size)
    return counts


usages = st.builds(Usage, *[st.integers(0, 10**12)] * 4)
outputs = st.builds(
    Output,
    st.none(),
    st.sampled_from(["ok", "rejected", "failed", "deferred"]),
    st.none() | st.just("null"),
    usages,
    st.integers(0, 100),
    usages,
    st.integers(0, 10**6),
)


def account_of(rows: Iterable[Output], given: Iterable[tuple[Script, Size, bool]]) -> Account:
    counts = Counts()
    for row in rows:
        counts.count(row)
    counts.account.texts = {"text": counts_of(given)}
    return counts.account


accounts = st.tuples(st.lists(outputs, max_size=8), texts)


@given(st.lists(texts, max_size=5))
def test_texts_of_units_add_up_to_all_texts(
    units: list[list[tuple[Script, Size, bool]]],
) -> None:
    total, parts = TextCounts(), [counts_of(unit) for unit in units]
    before = deepcopy(parts)
    for part in parts:
        total.add(part)
    assert total == counts_of(text for unit in units for text in unit)
    assert parts == before, "what is added to another stays what it was"


@given(st.lists(accounts, min_size=1, max_size=4))
def test_accounts_of_units_add_up_to_that_of_all_rows(units: list[tuple[Any, Any]]) -> None:
    total, parts = Account(), [account_of(*unit) for unit in units]
    before = deepcopy(parts)
    for part in parts:
        total.add(part)
    rows = [row for unit, _ in units for row in unit]
    assert total == account_of(rows, [text for _, unit in units for text in unit])
    assert parts == before
    assert total.wasted == sum(
        (row.usage for row in rows if row.status in ("rejected", "failed")), NOTHING_USED
    )
    assert total.cut == sum((row.cut for row in rows), NOTHING_USED)
    assert total.reasoning_tokens == sum(row.reasoning_tokens for row in rows)
    finished = sum(row.status != DEFERRED for row in rows)
    assert total.prompts.total() == total.completions.total() == finished


@given(accounts)
def test_account_survives_json(unit: tuple[Any, Any]) -> None:
    account = account_of(*unit)
    again = Account.from_json(json.loads(json.dumps(account.to_json())))
    assert again == account
    assert again.texts["text"].sample == account.texts["text"].sample


@given(st.integers(1, 10**9))
def test_bucket_holds_its_tokens(tokens: int) -> None:
    bucket = bucket_of(tokens)
    assert bucket_start(bucket) <= tokens < bucket_start(bucket + 1)
    if tokens > 16:  # its width: a quarter of an octave
        assert bucket_start(bucket + 1) / bucket_start(bucket) == pytest.approx(2**0.25, rel=0.1)


def test_no_tokens_have_a_bucket_of_their_own() -> None:
    assert (bucket_of(0), bucket_start(-1), bucket_of(1), bucket_start(0)) == (-1, 0, 0, 1)


# --- intervals -------------------------------------------------------------------------------


@given(texts.map(lambda given: [(script, size, True) for script, size, _ in given]))
def test_what_is_counted_whole_is_known_exactly(given: list[tuple[Script, Size, bool]]) -> None:
    counts = counts_of(given)
    model, baseline = (sum(size[which] for _, size, _ in given) for which in (3, 4))
    assert counts.model_tokens() == (model, model, model)
    assert counts.baseline_tokens() == (baseline, baseline, baseline)
    share = 1 - model / baseline if model and baseline else None
    assert counts.saving() == (None if share is None else (share, share, share))


def test_nothing_counted_says_nothing() -> None:
    for counts in (TextCounts(), TextCounts(7, 900)):
        assert counts.model_tokens() == counts.baseline_tokens() == (0, 0, 0)
        assert [counts.saving(script) for script in (None, *SCRIPTS)] == [None] * 4


@pytest.mark.parametrize(("model", "baseline"), [(5, 0), (0, 5)])
def test_one_tokenizer_alone_saves_nothing(model: int, baseline: int) -> None:
    counts = counts_of([("latin", (9, 0, 9, model, baseline), True)] * 3)
    assert counts.saving() is None and counts.saving("latin") is None
    assert (counts.model_tokens().mid, counts.baseline_tokens().mid) == (3 * model, 3 * baseline)


def skewed_corpus() -> list[tuple[Script, Size, bool]]:
    """As documents are: a few long ones hold most of the text; two scripts, each with its own
    tokens per character, some texts far from it."""
    random_ = random.Random(31)
    corpus: list[tuple[Script, Size, bool]] = []
    for _ in range(3000):
        characters = 1 + int(random_.lognormvariate(4.5, 1.1))
        script: Script = "hangul" if random_.random() < 0.4 else "latin"
        model = characters * (0.36 if script == "hangul" else 0.24) * random_.lognormvariate(0, 0.2)
        baseline = model * (1.4 if script == "hangul" else 0.94) * random_.lognormvariate(0, 0.15)
        corpus.append((script, (characters, 0, 0, 1 + int(model), 1 + int(baseline)), True))
    return corpus


def drawn(corpus: list[tuple[Script, Size, bool]], many: int, seed: int) -> TextCounts:
    """All texts of a corpus, so many of them counted."""
    counts = counts_of(random.Random(seed).sample(corpus, many))
    counts.texts, counts.characters = len(corpus), sum(size[0] for _, size, _ in corpus)
    return counts


@pytest.mark.parametrize("many", [150, 1800])
def test_interval_holds_the_truth_about_nine_times_in_ten(many: int) -> None:
    """Of a small sample, and of one that is most of the whole: then it must be narrower."""
    corpus = skewed_corpus()
    whole, draws = counts_of(corpus), [drawn(corpus, many, seed) for seed in range(200)]
    questions: dict[str, Callable[[TextCounts], Interval | None]] = {
        "model": TextCounts.model_tokens,
        "baseline": TextCounts.baseline_tokens,
        "saving": TextCounts.saving,
        "saving of one script": lambda counts: counts.saving("hangul"),
    }
    for name, ask in questions.items():
        truth = ask(whole)
        assert truth is not None and truth.low == truth.mid == truth.high
        found = [interval for counts in draws if (interval := ask(counts))]
        held = sum(interval.low <= truth.mid <= interval.high for interval in found)
        assert len(found) == 200 and 160 <= held <= 188, f"{name}: {held} of 200"
        mean = sum(interval.mid for interval in found) / 200
        assert mean == pytest.approx(truth.mid, rel=0.02), f"{name} is biased"


# --- parts and published files ---------------------------------------------------------------

SHARD, ROWS = "a.parquet", 24
FIELDS = result_fields("ko", pa.string())


def row_texts(rows: Iterable[int]) -> TextCounts:
    """Row N has 2**N characters: the sum tells which rows were counted, and each once or not."""
    return counts_of([("latin", (1 << row, 0, 1, row, row), True) for row in rows])


def rows_in(counts: TextCounts) -> list[int]:
    """The rows that were counted. Fails if one was twice."""
    rows = [row for row in range(ROWS) if counts.characters >> row & 1]
    assert counts == row_texts(rows), "a row counts twice"
    return rows


class Shard:
    """A file of ROWS rows, and parts whose accounts say which rows they are of."""

    def __init__(self, folder: Path) -> None:
        self.source, self.output = Folder(str(folder / "in")), Folder(str(folder / "out"))
        (folder / "in").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": range(ROWS)}), folder / "in" / SHARD)
        self._stamp = Stamp("job", SHARD, "1:a", 0, ROWS, Counts(), "run")

    def commit(self, unit: Unit, rows: Sequence[Output], given: Iterable[int]) -> Counts:
        """As a worker does, with the texts of the input's rows `given`. Returns its counts."""
        counts = Counts()
        for row in rows:
            counts.count(row)
        done = [unit.start + at for at, row in enumerate(rows) if row.value is not None]
        counts.account.texts = {"text": row_texts(given), "ko": row_texts(done)}
        stamp = replace(self._stamp, shard=unit.shard, start=unit.start, stop=unit.stop)
        table = result_table(rows, "ko", pa.string())
        assert commit_part(self.output, replace(stamp, counts=counts), table)
        return counts

    def commit_range(self, start: int, stop: int) -> Counts:
        rows = [output_of(row) for row in range(start, stop)]
        return self.commit(Unit(SHARD, start, stop), rows, range(start, stop))

    def publish(self, overlay: Overlay | None = None) -> Account:
        publish(self.source, SHARD, self.output, self._stamp, SHARD, FIELDS, lambda: None, overlay)
        return self.account()

    def account(self) -> Account:
        """What the published file's footer says."""
        stamp = read_stamp(self.output, SHARD)
        assert stamp is not None
        return stamp.counts.account

    def retry(self, rows: list[int], results: list[Output]) -> Account:
        """Do these rows again in a later run."""
        selected, before = array("q", rows), read_stamp(self.output, SHARD)
        assert before is not None
        key = retry_key(before, selected)
        self.commit(Unit(key, 0, len(rows)), results, [])
        republish(self.output, SHARD, selected, key, f"{before.run}+")
        return self.account()


def output_of(row: int) -> Output:
    usage = Usage(1, 10 + row, 2, 3)
    made = Output("a", usage=usage, cut=usage, reasoning_tokens=1)
    return made if row % 5 != 4 else made._replace(value=None, status="rejected", reason="x")


ranges = st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).filter(lambda r: r[0] < r[1])


@pytest.fixture(scope="session")
def new_shard(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Shard]:
    return lambda: Shard(tmp_path_factory.mktemp("accounted"))


@settings(max_examples=20)
@given(st.sets(st.integers(1, ROWS - 1)))
def test_published_account_is_the_sum_of_the_parts(
    new_shard: Callable[[], Shard], cuts: set[int]
) -> None:
    shard, total = new_shard(), Account()
    edges = [0, *sorted(cuts), ROWS]
    for start, stop in pairwise(edges):
        total.add(shard.commit_range(start, stop).account)
    published = shard.publish()
    assert published == total
    assert rows_in(published.texts["text"]) == [*range(ROWS)]
    assert published.wasted.requests == len(range(4, ROWS, 5))


@settings(max_examples=40)
@given(st.lists(ranges, max_size=8, unique=True))
def test_no_row_counts_twice_where_parts_of_two_runs_overlap(
    new_shard: Callable[[], Shard], parts: list[tuple[int, int]]
) -> None:
    shard = new_shard()
    parts += missing_ranges(ROWS, [Unit(SHARD, *part) for part in parts])
    for part in parts:
        shard.commit_range(*part)
    published = shard.publish()
    counted = rows_in(published.texts["text"])
    alone = [
        row for start, stop in parts for row in range(start, stop)
        if all((start, stop) == other or other[1] <= start or stop <= other[0] for other in parts)
    ]  # fmt: skip
    assert {*alone} <= {*counted}, "a part that overlaps with none counts whole"
    assert published.reasoning_tokens == len(counted)
    assert published.prompts.total() == published.completions.total() == ROWS


@settings(max_examples=20)
@given(st.sets(st.integers(0, ROWS - 1), min_size=1), st.integers(1, ROWS))
def test_rows_of_two_lanes_count_once(
    new_shard: Callable[[], Shard], waiting: set[int], size: int
) -> None:
    shard, total = new_shard(), Account()
    for start in range(0, ROWS, size):
        rows = range(start, min(start + size, ROWS))
        made = [Output(None, "deferred", "deferred", needs=9) if row in waiting else output_of(row)
                for row in rows]  # fmt: skip
        given = [row for row in rows if row not in waiting]
        total.add(shard.commit(Unit(SHARD, rows.start, rows.stop), made, given).account)
    later = Overlay(overlay_key(SHARD, array("q", sorted(waiting))), array("q", sorted(waiting)))
    made = [output_of(row) for row in later.rows]
    total.add(shard.commit(Unit(later.key, 0, len(made)), made, later.rows).account)
    published = shard.publish(later)
    assert published == total
    assert rows_in(published.texts["text"]) == [*range(ROWS)]
    assert published.prompts.total() == ROWS


def test_retry_adds_what_it_took_and_keeps_what_was_in_vain(tmp_path: Path) -> None:
    shard = Shard(tmp_path)
    shard.commit_range(0, ROWS)
    first = shard.publish()
    vain = sum((output_of(row).usage for row in (4, 9, 14, 19)), NOTHING_USED)
    assert first.wasted == vain

    spent = Usage(1, 5, 0, 5)
    mended = shard.retry([4, 9, 19], [Output("b", usage=spent)] * 2 + [output_of(4)])
    assert mended.wasted == vain + output_of(4).usage, "two are mended, one was in vain again"
    assert mended.texts["text"] == first.texts["text"], "the input's texts count once"
    assert mended.texts["ko"].texts == first.texts["ko"].texts + 2
    took = {row: 10 + row for row in range(ROWS)} | {4: 14 + 5, 9: 19 + 5, 19: 29 + 14}
    assert mended.prompts == Counter(map(bucket_of, took.values())), "each row once, all its tries"
    assert mended.completions.total() == ROWS
    assert mended.cut == first.cut + output_of(4).cut

    again = shard.retry([14, 19], [Output("b", usage=spent)] * 2)
    assert again.wasted == mended.wasted
    assert again.texts["text"] == first.texts["text"]
    assert again.texts["ko"].texts == ROWS


def test_files_made_before_there_was_accounting_are_read_and_retried(
    published: Callable[[], PreparedJob],
) -> None:
    made = published()
    path = made.path("a.parquet")
    table = pq.read_table(path)
    footer = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY.encode()])
    assert footer["counts"].pop("account")["wasted"]["requests"] > 0
    pq.write_table(table.replace_schema_metadata({FOOTER_KEY: json.dumps(footer)}), path)

    old = read_stamp(made.output, "a.parquet")
    assert old is not None and old.counts.account == Account()
    assert old.counts.rows == footer["counts"]["rows"] == 60
    retry = made.plan_retry("failed")
    for shard in retry.shards:
        for unit in shard.units():
            made.redo(retry, unit)
    made.republish(retry)
    new = read_stamp(made.output, "a.parquet")
    assert new is not None and new.counts.account.prompts.total() == 60
