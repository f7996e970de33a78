"""`accounting` and `report`: what is counted, what it costs, what is shown of it."""

from __future__ import annotations

import datetime
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config.section import Section


class Prices(Section):
    """What the work costs, by the hour or by the token."""

    currency: str = "USD"
    """As it is to be shown; nothing is converted."""

    gpu_hour: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of one GPU."""

    input: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of a million prompt tokens; with `output`, in the place of `gpu_hour`."""

    output: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Of a million completion tokens."""

    @model_validator(mode="after")
    def _by_hour_or_by_token(self) -> Prices:
        by_token = [self.input, self.output]
        if by_token.count(None) == 1:
            raise ValueError("give `input` and `output` together")
        if (self.gpu_hour is None) == (self.input is None):
            raise ValueError("give either `gpu_hour`, or `input` and `output`")
        return self


class ComparedPrices(Section):
    """Another model's price list; its tokens are counted by `accounting.baseline`."""

    name: str = Field(min_length=1)
    """As it is to be shown."""

    currency: str = "USD"
    """Compared with what the job costs only where both are in the same one."""

    date: str | None = None
    """When these prices were seen."""

    @field_validator("date", mode="before")
    @classmethod
    def _date_as_it_is_written(cls, date: Any) -> Any:
        """YAML makes a date of 2025-07-15, but not of 2025-07."""
        return date.isoformat() if isinstance(date, datetime.date) else date

    input: float = Field(ge=0, allow_inf_nan=False)
    """Of a million prompt tokens."""

    output: float = Field(ge=0, allow_inf_nan=False)
    """Of a million completion tokens."""


class AccountingConfig(Section):
    """What is counted beside the engine's own tokens, and what it costs. But for `rows`, changes no
    output."""

    baseline: str | None = Field("o200k_base", min_length=1)
    """The tokenizer to compare with: o200k_base (GPT-4o), cl100k_base (GPT-4), or a folder with a
    tokenizer.json; null: none."""

    tokenizer: str | None = Field(None, min_length=1)
    """The model's tokenizer, where the engine does not show it (backend http and echo): a folder
    with a tokenizer.json, or a hub id."""

    rows: bool = False
    """Whether output rows have a column `_texts`: characters, the model's and the baseline's tokens
    of their own input and output text. All rows are counted then, however long that takes."""

    sample: Literal["auto"] | float = "auto"
    """Share of the rows whose texts are counted; auto: all, unless that takes more than 1% of the
    time of one core. With `rows: true` all."""

    prices: Prices | None = None
    """Of this job."""

    compare: list[ComparedPrices] = Field(default_factory=list)
    """Price lists to compare with."""

    @field_validator("sample")
    @classmethod
    def _is_a_share(cls, sample: str | float, info: ValidationInfo) -> str | float:
        if isinstance(sample, float) and not 0 <= sample <= 1:
            raise ValueError("must be `auto`, or a share from 0 to 1")
        if sample not in ("auto", 1) and info.data.get("rows"):
            raise ValueError("`rows: true` counts all rows; leave `sample` out")
        return sample


class ReportConfig(Section):
    """What the report shows."""

    samples: int = Field(0, ge=0, le=100)
    """Rows that it quotes, with their text; without it, the report holds no row text."""
