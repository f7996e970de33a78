"""Numbers, spans, money and moments read as people write them, unknown ones too."""

import pytest

from pipeline import wording


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.percent(0.341), "34.1%"),
        (wording.percent(0.99999), "over 99.9%"),
        (wording.percent(0.00001), "under 0.1%"),
        (wording.percent(-0.25), "−25%"),
        (wording.percent(1), "100%"),
        (wording.percent(-0.0001), "0%"),
        (wording.span(3.25), "3.2 s"),
        (wording.span(59.7), "1 min"),
        (wording.span(4000), "1 h 07 min"),
        (wording.span(90_000), "1 d 1 h"),
        (wording.about(1_310), "22 min"),
        (wording.money(0.0031, "USD"), "0.0031 USD"),
        (wording.money(92.4, "USD"), "92.40 USD"),
        (wording.money(1_234_567, "KRW"), "1,234,567 KRW"),
        (wording.money(None, "USD"), "–"),
        (wording.rate(0.3333), "0.333"),
        (wording.rate(74_117.0), "74,117"),
        (wording.short(1500), "1.5k"),
        (wording.moment("2026-11-25T18:00:00+09:00"), "2026-11-25 09:00 UTC"),
        (wording.moment("soon"), "soon"),
        (wording.moment(None), "–"),
    ],
)
def test_wording(written: str, expected: str) -> None:
    assert written == expected
