"""Records: what is counted adds up, and what is written as JSON comes back as it was."""

import json
import pickle
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting import SCRIPTS, Sample, TextCounts, Usage
from pipeline.errors import RefusedError, RowRejected
from pipeline.receipt import decode_receipt, encode_receipt
from pipeline.records import Completion, Counts, Output, Receipt, Unit

tokens = st.integers(0, 10**12)
usages = st.builds(Usage, tokens, tokens, tokens, tokens)
rows = st.tuples(
    st.sampled_from(["ok", "rejected", "failed"]),
    st.none() | st.sampled_from(["null", "too_long: 9 of 8", "a: b: c", "잘림: 3"]),
    usages,
)
units = st.builds(
    lambda shard, start, size: Unit(shard, start, start + size),
    st.text(min_size=1),
    st.integers(0, 10**11),
    st.integers(0, 10**6),
)


def counted(outputs: Sequence[tuple[str, str | None, Usage]]) -> Counts:
    counts = Counts()
    for status, reason, usage in outputs:
        counts.count(Output(None, status, reason, usage))
    return counts


@given(units)
def test_unit_comes_back_from_its_id(unit: Unit) -> None:
    assert Unit.from_id(unit.shard, unit.id) == unit


@given(st.lists(units, max_size=20))
def test_unit_ids_sort_like_units_of_one_shard(many: list[Unit]) -> None:
    one_shard = [Unit("a.parquet", unit.start, unit.stop) for unit in many]
    assert [u.id for u in sorted(one_shard)] == sorted(u.id for u in one_shard)


@pytest.mark.parametrize("name", ["", "7", "a-b", "1-2-3", "000000000001_000000000002"])
def test_unit_id_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        Unit.from_id("a.parquet", name)


@given(usages, usages, usages)
def test_usages_add_up_in_any_order(a: Usage, b: Usage, c: Usage) -> None:
    assert (a + b) + c == a + (b + c) == c + b + a
    assert a + Usage() == a
    assert (a + b).prompt_tokens == a.prompt_tokens + b.prompt_tokens
    assert (a + b).cached_tokens == a.cached_tokens + b.cached_tokens


@given(st.lists(rows, max_size=20))
def test_counts_survive_json(outputs: list[tuple[str, str | None, Usage]]) -> None:
    counts = counted(outputs)
    again = Counts.from_json(json.loads(json.dumps(counts.to_json())))
    assert again == counts
    assert again.to_json() == counts.to_json()
    assert counts.rows == len(outputs)
    assert counts.not_ok == sum(status != "ok" for status, _, _ in outputs)


@given(st.lists(st.lists(rows, max_size=8), max_size=6))
def test_counts_of_units_add_up_to_the_counts_of_all_rows(
    parts: list[list[tuple[str, str | None, Usage]]],
) -> None:
    total = Counts()
    for part in parts:
        total.add(counted(part))
    assert total == counted([row for part in parts for row in part])


def test_reasons_are_counted_by_status_and_code() -> None:
    counts = counted([
        ("rejected", "too_long: 9 of 8", Usage()),
        ("rejected", "too_long: 7 of 6", Usage()),
        ("failed", "too_long", Usage()),
        ("ok", None, Usage()),
    ])  # fmt: skip
    assert counts.reasons == {"rejected: too_long": 2, "failed: too_long": 1}


@given(units, st.lists(rows, max_size=20), st.text(), st.floats(0, 1e9))
def test_receipt_survives_its_encoding(
    unit: Unit, outputs: list[tuple[str, str | None, Usage]], worker: str, seconds: float
) -> None:
    receipt = Receipt(unit, counted(outputs), worker, seconds)
    assert decode_receipt(encode_receipt(receipt)) == receipt


def test_receipt_takes_few_kilobytes() -> None:
    unit = Unit("2024/news-0001.parquet", 10**9, 10**9 + 256)
    many = [(s, f"{code}: detail", Usage(9, 10**9, 10**9, 10**9))
            for s in ("rejected", "failed") for code in ("null", "too_long", "engine_error")
            for _ in range(50)]  # fmt: skip
    counts = counted(many)
    big = Sample(*[10**12] * 12)
    counts.account.texts = {
        name: TextCounts(10**6, 10**9, dict.fromkeys(SCRIPTS, big)) for name in ("text", "ko")
    }
    assert len(encode_receipt(Receipt(unit, counts, "node-17:12345", 12.5))) < 4096


def test_completion_without_content_has_empty_text() -> None:
    assert Completion({"role": "assistant", "content": None}, "stop", Usage()).text == ""
    assert Completion({"role": "assistant"}, "stop", Usage()).text == ""


@pytest.mark.parametrize("error", [RefusedError("what", "what next"), RowRejected("null")])
def test_errors_survive_the_way_between_processes(error: RefusedError | RowRejected) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    assert (type(again), str(again), again.hint) == (type(error), str(error), error.hint)
