"""How long a plan takes answers to be: as the kind expects, or as rows that are done had them."""

import math
from collections.abc import Callable

import pytest

from pipeline.accounting import Usage
from pipeline.records import Output
from pipeline.task import ExpectedAnswer
from tests.conftest import PreparedJob
from tests.forecasts import estimate

Prepare = Callable[..., PreparedJob]


def test_expected_answers_are_bounded() -> None:
    assert ExpectedAnswer().is_unknown and ExpectedAnswer().bounds(9) == (1, math.inf)
    assert ExpectedAnswer((0.5, 2.0), (1.0, 3.0)).bounds(10) == (6, 23)


def test_rows_that_are_done_say_how_long_answers_are(prepared: Prepare) -> None:
    job = prepared(["one two three"] * 1_000, input={"rows_per_unit": 50})
    made = job.plan()
    for number, unit in enumerate(list(made.shards[0].units())[:8]):
        outputs = [Output("-", usage=Usage(1, 20, 0, 30 + number)) for _ in range(unit.rows)]
        job.commit(made, unit, outputs)
        if number == 2:
            assert (tokens := estimate(job).tokens) and tokens.answers == "expected"
    found = estimate(job)
    assert found.tokens and found.tokens.answers == "measured"
    low, mid, high = found.tokens.completion
    assert mid == pytest.approx(found.tokens.prompt.mid * 33.5 / 20)
    assert 0.9 * mid < low < mid < high < 1.1 * mid


def test_rows_whose_answers_were_cut_say_it_and_unasked_ones_nothing(prepared: Prepare) -> None:
    job = prepared(["one two three"] * 1_000, input={"rows_per_unit": 250})
    made = job.plan()
    first, second, *_ = made.shards[0].units()
    job.commit(made, first, [Output(None, "rejected", "null")] * first.rows)
    found = estimate(job)
    assert found.tokens and found.tokens.answers == "expected" and found.cut_answers is None
    used = Usage(1, 20, 0, 30)
    cut = [Output(None, "rejected", "truncated", usage=used, cut=used)] * second.rows
    job.commit(made, second, cut)
    found = estimate(job)
    assert found.tokens and found.tokens.answers == "measured" and found.cut_answers == 1
