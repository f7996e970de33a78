"""What a job costs, and what another model's price list would make of the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.accounting import TextCounts, Usage
from pipeline.config.costs import AccountingConfig, ComparedPrices, Prices

MILLION = 1_000_000
HOUR_S = 3600


def cost_of(prices: Prices, usage: Usage, gpu_s: float) -> float:
    """In `prices.currency`: of GPU-seconds, or of tokens."""
    if prices.gpu_hour is not None:
        return prices.gpu_hour * gpu_s / HOUR_S
    by_input, by_output = prices.input or 0.0, prices.output or 0.0
    return (by_input * usage.prompt_tokens + by_output * usage.completion_tokens) / MILLION


def basis_of(prices: Prices) -> str:
    """For people; every digit, as a price is given and not measured."""
    if prices.gpu_hour is not None:
        return f"{prices.gpu_hour:,.15g} {prices.currency} per GPU-hour"
    by_token = f"{prices.input:,.15g} in, {prices.output:,.15g} out"
    return f"{by_token} {prices.currency} per million tokens"


@dataclass(frozen=True)
class TokenRatios:
    """Baseline tokens for each of the model's, as counted on the rows' own texts."""

    input: float
    output: float

    @classmethod
    def of(cls, texts: Mapping[str, TextCounts], column: str) -> TokenRatios | None:
        """`column` is the result's. None if texts of either side were not counted by both."""
        result = texts.get(column, TextCounts())
        given = TextCounts()
        for name, counts in texts.items():
            if name != column:
                given.add(counts)
        ratios = [_ratio(side) for side in (given, result)]
        return None if None in ratios else cls(*(ratio or 0.0 for ratio in ratios))


def _ratio(texts: TextCounts) -> float | None:
    sample = texts.sample
    return sample.baseline / sample.model if sample.model and sample.baseline else None


def saving_of(texts: Mapping[str, TextCounts]) -> float | None:
    """Share of the baseline's tokens that the model needs not, of all texts; None if either did not
    count."""
    every = TextCounts()
    for counts in texts.values():
        every.add(counts)
    ratio = _ratio(every)
    return None if ratio is None else 1 - 1 / ratio


def compared_cost(prices: ComparedPrices, usage: Usage, ratios: TokenRatios) -> float:
    """In its currency: the same requests, with the baseline's tokens. Those of instructions and of
    the chat template are taken to be in the same ratio as those of the rows' texts."""
    prompt = usage.prompt_tokens * ratios.input
    completion = usage.completion_tokens * ratios.output
    return (prices.input * prompt + prices.output * completion) / MILLION


def money(
    accounting: AccountingConfig,
    usage: Usage,
    lost: Usage,
    gpu_s: float,
    texts: Mapping[str, TextCounts],
    column: str,
    rows: int,
) -> dict[str, Any] | None:
    """For the report: what `usage`, and with it what was `lost`, has cost, and what `usage` would
    have cost elsewhere. None without prices."""
    prices = accounting.prices
    if prices is None and not accounting.compare:
        return None
    cost = None if prices is None else cost_of(prices, usage + lost, gpu_s)
    if prices is not None and prices.gpu_hour is not None and not gpu_s:
        cost = None  # no GPU was there
    given = sum(counts.characters for name, counts in texts.items() if name != column)
    return {
        "currency": prices.currency if prices else None,
        "basis": basis_of(prices) if prices else None,
        "cost": cost,
        "per_thousand_rows": 1000 * cost / rows if cost is not None and rows else None,
        "per_million_characters": MILLION * cost / given if cost is not None and given else None,
        "compared": _compared(accounting.compare, usage, texts, column, prices, cost),
    }


def _compared(
    lists: Sequence[ComparedPrices],
    usage: Usage,
    texts: Mapping[str, TextCounts],
    column: str,
    prices: Prices | None,
    cost: float | None,
) -> list[dict[str, Any]]:
    ratios = TokenRatios.of(texts, column)
    if ratios is None:
        return []
    compared = []
    for each in lists:
        theirs = compared_cost(each, usage, ratios)
        same = prices is not None and cost is not None and prices.currency == each.currency
        difference = theirs - cost if same and cost is not None else None
        share = difference / theirs if difference is not None and theirs else None
        compared.append({
            **each.model_dump(), "cost": theirs, "difference": difference, "share": share,
        })  # fmt: skip
    return compared
