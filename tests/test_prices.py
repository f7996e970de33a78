"""Prices: what rows cost, and what another price list would make of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.accounting import Sample, TextCounts, Usage
from pipeline.config.costs import AccountingConfig
from pipeline.errors import JobFileError
from pipeline.job_file import load_job
from pipeline.prices import TokenRatios, cost_of, money, saving_of

USED = Usage(10, 2_000_000, 500_000, 1_000_000)
LOST = Usage(1, 200_000, 0, 100_000)
BY_HOUR = {"gpu_hour": 2.5}
BY_TOKEN = {"input": 0.5, "output": 2.0}
OTHER = {"name": "Other", "input": 1.0, "output": 4.0}


def counted(characters: int, model: int, baseline: int) -> TextCounts:
    counts = TextCounts(2, 2 * characters, {"latin": Sample()})
    for _ in range(2):
        counts.samples["latin"].count(characters, 0, 0, model, baseline)
    return counts


TEXTS = {"en": counted(100, 20, 30), "title": counted(50, 20, 30), "ko": counted(80, 40, 100)}
"""Input with 1.5 baseline tokens to the model's one, results with 2.5."""


def spent(
    gpu_s: float = 7200.0, texts: dict[str, TextCounts] = TEXTS, rows: int = 4, **keys: Any
) -> dict[str, Any]:
    accounting = AccountingConfig.model_validate(keys)
    made = money(accounting, USED, LOST, gpu_s, texts, "ko", rows)
    assert made is not None
    return made


def test_gpu_hours_cost_what_they_take_however_many_tokens() -> None:
    made = spent(prices=BY_HOUR)
    assert made["cost"] == 5.0
    assert made["per_thousand_rows"] == 1250.0
    assert made["per_million_characters"] == pytest.approx(5.0 * 1e6 / 300), "of the input's"
    assert (made["currency"], made["basis"]) == ("USD", "2.5 USD per GPU-hour")


def test_tokens_cost_the_same_whoever_computes_them_and_lost_ones_too() -> None:
    made = spent(0.0, prices=BY_TOKEN)
    assert made["cost"] == pytest.approx(0.5 * 2.2 + 2.0 * 1.1)
    assert spent(1e6, prices=BY_TOKEN)["cost"] == made["cost"]
    assert made["basis"] == "0.5 in, 2 out USD per million tokens"


@pytest.mark.parametrize(
    ("keys", "basis"),
    [
        ({"gpu_hour": 3_456_789.5, "currency": "KRW"}, "3,456,789.5 KRW per GPU-hour"),
        (
            {"input": 1_234_567.0, "output": 0.0375},
            "1,234,567 in, 0.0375 out USD per million tokens",
        ),
    ],
)
def test_no_digit_of_a_price_is_lost(keys: dict[str, Any], basis: str) -> None:
    assert spent(prices=keys)["basis"] == basis


def test_costs_add_up() -> None:
    for keys in (BY_HOUR, BY_TOKEN):
        prices = AccountingConfig.model_validate({"prices": keys}).prices
        assert prices is not None
        both = cost_of(prices, USED + LOST, 90.0)
        assert both == pytest.approx(cost_of(prices, USED, 60.0) + cost_of(prices, LOST, 30.0))


@pytest.mark.parametrize("date", ["2025-07", "2025-07-15"])
def test_the_date_of_a_list_is_as_it_is_written(date: str) -> None:
    written = yaml.safe_load(f"{{name: x, date: {date}, input: 1, output: 2}}")
    [other] = AccountingConfig.model_validate({"compare": [written]}).compare
    assert other.date == date


def test_nothing_without_prices() -> None:
    assert money(AccountingConfig(), USED, LOST, 1.0, TEXTS, "ko", 4) is None


def test_no_gpu_no_cost() -> None:
    made = spent(0.0, prices=BY_HOUR, compare=[OTHER])
    assert made["cost"] is made["per_thousand_rows"] is made["per_million_characters"] is None
    (other,) = made["compared"]
    assert other["cost"] > 0 and other["difference"] is other["share"] is None


def test_no_rows_yet_cost_nothing_each() -> None:
    made = spent(texts={}, rows=0, prices=BY_HOUR)
    assert made["cost"] == 5.0
    assert made["per_thousand_rows"] is made["per_million_characters"] is None


def test_other_list_charges_for_the_baselines_tokens_of_each_side() -> None:
    made = spent(prices=BY_HOUR, compare=[OTHER])
    (other,) = made["compared"]
    expected = 1.0 * 2.0 * 1.5 + 4.0 * 1.0 * 2.5  # what is lost here is not asked for there
    assert other["cost"] == pytest.approx(expected)
    assert other["difference"] == pytest.approx(expected - 5.0)
    assert other["share"] == pytest.approx((expected - 5.0) / expected)
    assert {name: other[name] for name in OTHER} == OTHER


def test_other_list_alone_is_told_without_a_difference() -> None:
    made = spent(compare=[OTHER])
    assert made["currency"] is made["cost"] is made["basis"] is None
    assert made["compared"][0]["cost"] > 0 and made["compared"][0]["difference"] is None


def test_currencies_are_not_mixed() -> None:
    lists = [{**OTHER, "currency": "KRW"}, OTHER]
    won, dollars = spent(prices=BY_HOUR, compare=lists)["compared"]
    assert won["difference"] is won["share"] is None
    assert won["cost"] == dollars["cost"] and dollars["difference"] is not None
    won, dollars = spent(prices={**BY_HOUR, "currency": "KRW"}, compare=lists)["compared"]
    assert won["difference"] is not None and dollars["difference"] is None


def test_list_without_a_price_leaves_no_share() -> None:
    free = {"name": "Free", "input": 0, "output": 0}
    (other,) = spent(prices=BY_HOUR, compare=[free])["compared"]
    assert (other["cost"], other["difference"], other["share"]) == (0, -5.0, None)


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"en": TEXTS["en"]},
        {"ko": TEXTS["ko"]},
        {**TEXTS, "ko": counted(80, 0, 100)},
        {"en": counted(100, 20, 0), "ko": TEXTS["ko"]},
    ],
)
def test_no_comparison_unless_both_counted_both_sides(texts: dict[str, TextCounts]) -> None:
    assert TokenRatios.of(texts, "ko") is None
    assert spent(texts=texts, prices=BY_HOUR, compare=[OTHER])["compared"] == []


def test_saving_is_of_all_texts_together() -> None:
    assert saving_of(TEXTS) == pytest.approx(1 - 80 / 160)
    assert saving_of({}) is None and saving_of({"en": counted(9, 3, 0)}) is None


@pytest.mark.parametrize(
    ("accounting", "said"),
    [
        ({"prices": {**BY_HOUR, **BY_TOKEN}}, "accounting.prices: give either `gpu_hour`, or "),
        ({"prices": {}}, "accounting.prices: give either `gpu_hour`, or "),
        ({"prices": {"input": 1.0}}, "accounting.prices: give `input` and `output` together"),
        ({"prices": {"output": 1.0}}, "accounting.prices: give `input` and `output` together"),
        (
            {"prices": {**BY_HOUR, "input": 1.0}},
            "accounting.prices: give `input` and `output` together",
        ),
        ({"prices": {"gpu_hour": -1.0}}, "accounting.prices.gpu_hour: "),
        ({"prices": {"input": -1.0, "output": 1.0}}, "accounting.prices.input: "),
        ({"prices": {"input": 1.0, "output": -1.0}}, "accounting.prices.output: "),
        ({"prices": {"gpu_hours": 1.0}}, "accounting.prices.gpu_hours: "),
        ({"compare": [{**OTHER, "output": -4.0}]}, "accounting.compare.0.output: "),
        ({"compare": [{"name": "Other", "input": 1.0}]}, "accounting.compare.0.output: is missing"),
        ({"sample": 1.5}, "accounting.sample: must be `auto`, or a share from 0 to 1"),
        ({"sample": -0.5}, "accounting.sample: must be `auto`, or a share from 0 to 1"),
    ],
)
def test_wrong_prices_are_refused_by_their_key(
    tmp_path: Path, accounting: dict[str, Any], said: str
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "test",
                "task": {"kind": "translate", "text": "en", "source": "en", "target": "ko"},
                "input": {"path": "in"},
                "output": {"path": "out", "column": "ko"},
                "model": {"id": "echo", "backend": "echo"},
                "accounting": accounting,
            }
        )
    )
    with pytest.raises(JobFileError) as refused:
        load_job(file)
    assert said in str(refused.value)
