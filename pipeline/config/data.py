"""`input` and `output`: what is read, and where the result goes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section, without_credentials

OnChange = Literal["refuse", "reprocess"]
InputFormat = Literal["auto", "openai-batch"]


class InputConfig(Section):
    """What is read. Exactly one of `path` and `dataset`."""

    path: str | list[str] | None = None
    """File, folder, glob, or a list of them; local, s3:// or hf://. Parquet is read in place;
    .jsonl, .json, .ndjson, .csv and .txt files are staged to Parquet once."""

    dataset: str | None = None
    """A `datasets` hub id or a local dataset folder; staged to Parquet once."""

    subset: str | None = None
    """The dataset's configuration name, where it has several."""

    split: str = "train"
    """The dataset's split."""

    format: InputFormat = "auto"
    """auto: what a file's suffix says. openai-batch: each file is one of Batch API requests
    (JSONL), whatever its suffix, and its answers are also written as such files."""

    on_change: OnChange = "refuse"
    """What to do about an input file that has changed, or is gone, since rows of it were done.
    refuse: nothing. reprocess: do a changed file again, keep what was made of one that is gone."""

    rows_per_unit: int = Field(256, ge=1, le=65_536)
    """Rows that are committed together, at most; fewer where rows are long."""

    @field_validator("path", "dataset")
    @classmethod
    def _no_credentials(cls, path: str | list[str] | None) -> str | list[str] | None:
        for url in [path] if isinstance(path, str) else path or []:
            without_credentials(url)
            if url.startswith(("http://", "https://")):
                raise ValueError("must be a local path, s3:// or hf://; download it first")
        if path == []:
            raise ValueError("names no file or folder")
        return path

    @model_validator(mode="after")
    def _one_source(self) -> InputConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` or `dataset`")
        if self.format != "auto" and self.dataset is not None:
            raise ValueError("`format` goes with `path`; a `dataset` has a format of its own")
        return self

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path or [])


class OutputConfig(Section):
    """Where the result goes."""

    path: str
    """Folder; local or s3://. One output file per input file, of the same name."""

    column: str = Field(min_length=1)
    """The result column; null unless the row's `_status` is ok."""

    @field_validator("path")
    @classmethod
    def _path_can_be_written(cls, path: str) -> str:
        if "://" in path and not path.startswith(("s3://", "s3a://")):
            raise ValueError("must be a local path or s3://")
        return without_credentials(path)

    @field_validator("column")
    @classmethod
    def _not_a_status_column(cls, column: str) -> str:
        if column in ("_status", "_reason", "_usage", "_texts"):
            raise ValueError("is a column of axbatch's own; choose another name")
        return column
