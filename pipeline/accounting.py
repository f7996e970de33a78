"""What rows cost and hold, beyond their statuses: sums that add up from row to unit, shard and job.

Tokens of the engine are exact. Tokens of texts are counted on a sample of rows where counting all
would slow the job (see counting.py); the sums of squares here give the interval that goes with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from typing import Any, Literal, NamedTuple

Script = Literal["hangul", "latin", "other"]
SCRIPTS: tuple[Script, ...] = ("hangul", "latin", "other")

Z90 = 1.645
"""Standard deviations to either side that hold 90% of a normal distribution."""

STEPS_PER_OCTAVE = 4
"""Buckets of a histogram of lengths between a length and its double."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the engine counted. Tokens; `requests` counts calls that reached the engine."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        if self is NOTHING_USED:  # as before nearly every row's only request
            return other
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


NOTHING_USED = Usage()

numbers_of = attrgetter(*Usage.__dataclass_fields__)
"""A usage's fields as a tuple, in order."""


def total_of(usages: Iterable[Usage]) -> Usage:
    """Their sum, without an object for each."""
    return Usage(*map(sum, zip(*map(numbers_of, usages), strict=True)))


class Interval(NamedTuple):
    """An estimate and the 90% interval around it; all three are equal where all was counted."""

    low: float
    mid: float
    high: float

    @classmethod
    def around(cls, mid: float, deviation: float) -> Interval:
        return cls(max(0.0, mid - Z90 * deviation), mid, mid + Z90 * deviation)


@dataclass(frozen=True)
class TextSize:
    """Of texts of one row. Tokens are None where no tokenizer can count them."""

    characters: int
    model_tokens: int | None
    baseline_tokens: int | None

    def __add__(self, other: TextSize) -> TextSize:
        return TextSize(
            self.characters + other.characters,
            _sum_if_known(self.model_tokens, other.model_tokens),
            _sum_if_known(self.baseline_tokens, other.baseline_tokens),
        )


def _sum_if_known(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True)
class RowTexts:
    """What the report says of all texts, of one row; it is the sum of these. None: no text."""

    input: TextSize | None
    """Of all columns that the task reads. In the part of a retry None: it has counted before."""
    output: TextSize | None


@dataclass
class Sample:
    """Texts that were counted: how many, their characters, the letters of two scripts among these,
    their tokens by the model's and by the baseline's tokenizer, and the sums of products of the
    three sizes (c characters, m model, b baseline), of which the variances follow."""

    texts: int = 0
    characters: int = 0
    hangul: int = 0
    latin: int = 0
    model: int = 0
    baseline: int = 0
    cc: int = 0
    cm: int = 0
    cb: int = 0
    mm: int = 0
    mb: int = 0
    bb: int = 0

    def count(self, characters: int, hangul: int, latin: int, model: int, baseline: int) -> None:
        """One text."""
        c, m, b = characters, model, baseline
        one = (1, c, hangul, latin, m, b, c * c, c * m, c * b, m * m, m * b, b * b)
        for each, value in zip(fields(self), one, strict=True):
            setattr(self, each.name, getattr(self, each.name) + value)

    def add(self, other: Sample) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass
class TextCounts:
    """The texts of one column: all of them, and of each script (the one that most of a text's
    letters are of) those that were counted."""

    texts: int = 0
    characters: int = 0
    samples: dict[Script, Sample] = field(default_factory=dict)

    @property
    def sample(self) -> Sample:
        """Of all scripts."""
        total = Sample()
        for each in self.samples.values():
            total.add(each)
        return total

    def add(self, other: TextCounts) -> None:
        self.texts += other.texts
        self.characters += other.characters
        for script, sample in other.samples.items():
            self.samples.setdefault(script, Sample()).add(sample)

    def model_tokens(self) -> Interval:
        """Of all texts, by the model's tokenizer."""
        sample = self.sample
        return self._tokens(sample, sample.model, sample.cm, sample.mm)

    def baseline_tokens(self) -> Interval:
        """Of all texts, by the baseline's tokenizer."""
        sample = self.sample
        return self._tokens(sample, sample.baseline, sample.cb, sample.bb)

    def _tokens(self, sample: Sample, tokens: int, product: int, square: int) -> Interval:
        """The ratio estimator: all characters times the sample's tokens per character. Its variance
        is that of what the ratio leaves unexplained (Cochran, Sampling Techniques, ch. 6)."""
        if not sample.characters:
            return Interval(0.0, 0.0, 0.0)
        ratio = tokens / sample.characters
        rest = square - 2 * ratio * product + ratio**2 * sample.cc
        scale = self.characters / sample.characters
        every = tokens * self.characters / sample.characters  # exact where all was counted
        return Interval.around(every, scale * self._deviation(sample, rest))

    def saving(self, script: Script | None = None) -> Interval | None:
        """Share of the baseline's tokens that the model's tokenizer needs not (below 0: needs
        more); of one script or of all. None if either counted nothing."""
        sample = self.samples.get(script, Sample()) if script else self.sample
        if not sample.model or not sample.baseline:
            return None
        ratio = sample.model / sample.baseline
        rest = sample.mm - 2 * ratio * sample.mb + ratio**2 * sample.bb
        half = Z90 * self._deviation(sample, rest) / sample.baseline
        return Interval(1 - ratio - half, 1 - ratio, 1 - ratio + half)

    def _deviation(self, sample: Sample, rest: float) -> float:
        """Of a sum over the sample, whose texts' residuals have this sum of squares; with the
        correction for a sample that is much of the whole."""
        if sample.texts < 2:
            return 0.0
        share = min(1.0, self.sample.texts / max(1, self.texts))
        return math.sqrt(max(0.0, rest) * sample.texts / (sample.texts - 1) * (1 - share))

    def to_json(self) -> dict[str, Any]:
        samples = {script: list(asdict(sample).values()) for script, sample in self.samples.items()}
        return {"texts": self.texts, "characters": self.characters, "samples": samples}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextCounts:
        samples = {script: Sample(*numbers) for script, numbers in data["samples"].items()}
        return cls(data["texts"], data["characters"], samples)


@dataclass
class Account:
    """Of the rows of a unit, a shard or a job. A row counts where it first gets a status; one that
    is done again adds what the new attempt took, and its lengths become those of all attempts."""

    wasted: Usage = NOTHING_USED
    """What went into rows that came out not ok, each time they did."""
    cut: Usage = NOTHING_USED
    """What went into answers that ended at the limit of tokens."""
    reasoning_tokens: int = 0
    """Of the completion tokens, those that the answers do not show."""
    texts: dict[str, TextCounts] = field(default_factory=dict)
    """By column: those that the task reads, and the result's."""
    prompts: Counter[int] = field(default_factory=Counter)
    """Rows by their prompt tokens' `bucket_of`."""
    completions: Counter[int] = field(default_factory=Counter)
    """Rows by their completion tokens' `bucket_of`."""

    def add(self, other: Account) -> None:
        self.wasted += other.wasted
        self.cut += other.cut
        self.reasoning_tokens += other.reasoning_tokens
        for column, counts in other.texts.items():
            self.texts.setdefault(column, TextCounts()).add(counts)
        self.prompts.update(other.prompts)
        self.completions.update(other.completions)

    def to_json(self) -> dict[str, Any]:
        return {
            "wasted": asdict(self.wasted),
            "cut": asdict(self.cut),
            "reasoning_tokens": self.reasoning_tokens,
            "texts": {column: counts.to_json() for column, counts in self.texts.items()},
            "prompts": dict(sorted(self.prompts.items())),
            "completions": dict(sorted(self.completions.items())),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Account:
        return cls(
            Usage(**data["wasted"]),
            Usage(**data["cut"]),
            data["reasoning_tokens"],
            {column: TextCounts.from_json(counts) for column, counts in data["texts"].items()},
            Counter({int(bucket): rows for bucket, rows in data["prompts"].items()}),
            Counter({int(bucket): rows for bucket, rows in data["completions"].items()}),
        )


def bucket_of(tokens: int) -> int:
    """The bucket of a histogram of lengths, four to an octave; -1 for none."""
    return math.floor(STEPS_PER_OCTAVE * math.log2(tokens)) if tokens > 0 else -1


def bucket_start(bucket: int) -> int:
    """The fewest tokens that fall into a bucket."""
    return math.ceil(2 ** (bucket / STEPS_PER_OCTAVE)) if bucket >= 0 else 0
