"""The job file: every key, typed, with its meaning beneath it. Unknown keys are errors."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

DEMO = "demo"
"""The id of the embedded model."""

MAX_NUM_SEQS = 256
"""Requests that one replica computes at once, where the job file does not say."""


class Section(BaseModel):
    """A part of the job file: immutable, and strict about names and types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


# user@host, key:secret@bucket (a secret may hold slashes), and signed or keyed queries.
CREDENTIALS = re.compile(
    r"://([^/]*@|[^/@]*:[^@]*@|.*\?.*(signature|token|key|secret)[^/]*=)", re.I
)


def _no_credentials(url: str) -> str:
    if CREDENTIALS.search(url):
        raise SecretInJobFile("holds credentials; take them out and use environment variables")
    return url


class SecretInJobFile(ValueError):
    """The value must not be shown in the message."""


Accelerator = Literal["H100", "H200", "A100", "L40S", "B200"]
OnChange = Literal["refuse", "reprocess"]
InputFormat = Literal["auto", "openai-batch"]


class InputConfig(Section):
    """What is read. Exactly one of `path` and `dataset`."""

    path: str | list[str] | None = None
    """File, folder, glob, or a list of them; local, s3:// or hf://. Parquet is read in place;
    .jsonl, .json, .csv and .txt files are staged to Parquet once."""

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
            _no_credentials(url)
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
        return _no_credentials(path)

    @field_validator("column")
    @classmethod
    def _not_a_status_column(cls, column: str) -> str:
        if column in ("_status", "_reason", "_usage", "_texts"):
            raise ValueError("is a column of axbatch's own; choose another name")
        return column


def sound_engine_options(engine: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for secrets, and for numbers that are none."""
    for secret in ("hf_token", "api_key"):
        if secret in engine:
            raise SecretInJobFile(f"holds `{secret}`; put it into the environment (HF_TOKEN)")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "max_num_seqs"):
        value = engine.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number, at least 1 (it is {value!r})")
    if engine.get("data_parallel_size", 1) != 1:
        raise ValueError("data_parallel_size is what `cluster.replicas` does; leave it out")
    return engine


class YarnConfig(Section):
    """The engine of rows that are too long for the model's own context (RoPE scaling by YaRN)."""

    factor: float = Field(4.0, gt=1)
    """Its context as a multiple of the model's own: with `context: yarn` just this, with `auto`
    this at most, and no more than the longest row needs. A.X 3.1 is made for up to 4."""

    engine: dict[str, Any] = Field(default_factory=dict)
    """Engine options that differ there, on top of `model.engine`."""

    @field_validator("engine")
    @classmethod
    def _engine_options_are_sound(cls, engine: dict[str, Any]) -> dict[str, Any]:
        if {"hf_overrides", "max_model_len"} & engine.keys():
            raise ValueError("`hf_overrides` and `max_model_len` follow from the rows' lengths")
        return sound_engine_options(engine)


class ModelConfig(Section):
    """Which model answers, and through which engine."""

    id: str = Field(min_length=1)
    """Hub id, local folder, or "demo" (embedded, tiny, for trying things out)."""

    revision: str | None = None
    """Branch, tag or commit of the hub id."""

    backend: Literal["vllm", "http", "echo"] = "vllm"
    """vllm: in process. http: an OpenAI-compatible server. echo: no model, answers its prompt."""

    base_url: str | None = None
    """backend http: the server's address up to and including /v1."""

    api_key_env: str = "OPENAI_API_KEY"
    """backend http: the environment variable that holds the key (the key never stands here)."""

    engine: dict[str, Any] = Field(default_factory=dict)
    """The engine's own options. vllm: `vllm serve` options with underscores, passed through.
    http: max_num_seqs, timeout. echo: see pipeline/engine/echo.py."""

    context: Literal["native", "yarn", "auto"] = "native"
    """native: the model's own. yarn: longer for all rows, which also changes short ones' answers.
    auto: rows that don't fit the model's own are left to a second engine, with YaRN; what is too
    long for that one as well is up to the task's `overflow`."""

    yarn: YarnConfig = YarnConfig()

    @field_validator("base_url")
    @classmethod
    def _base_url_has_no_credentials(cls, url: str | None) -> str | None:
        return url if url is None else _no_credentials(url)

    @field_validator("api_key_env")
    @classmethod
    def _api_key_env_is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise SecretInJobFile(
                "must be the name of an environment variable (A-Z, 0-9, _), not the key itself"
            )
        return name

    @field_validator("engine")
    @classmethod
    def _engine_options_are_sound(cls, engine: dict[str, Any]) -> dict[str, Any]:
        return sound_engine_options(engine)

    @model_validator(mode="after")
    def _base_url_goes_with_http(self) -> ModelConfig:
        if (self.backend == "http") != (self.base_url is not None):
            raise ValueError("`base_url` is needed with `backend: http`, and only there")
        return self

    @model_validator(mode="after")
    def _yarn_has_an_engine(self) -> ModelConfig:
        if self.context == "native":
            if self.yarn != YarnConfig():
                raise ValueError("`yarn` says something only with `context: auto` or `yarn`")
        elif self.backend == "http":
            raise ValueError(f"`context: {self.context}` is up to the server with `backend: http`")
        if self.context == "native":
            return self
        if not isinstance(self.engine.get("max_model_len", 1), int):
            raise ValueError("`max_model_len` must be a plain number, as other lengths follow it")
        if "hf_overrides" in self.engine:
            raise ValueError("`hf_overrides` and YaRN both change the model's configuration")
        return self

    @property
    def world_size(self) -> int:
        """GPUs (or CPU ranks) that one replica takes: tensor x pipeline parallel size."""
        tensor = int(self.engine.get("tensor_parallel_size", 1))
        return tensor * int(self.engine.get("pipeline_parallel_size", 1))

    @property
    def max_num_seqs(self) -> int:
        """Requests that one replica computes at once. vLLM's own default (128 when started
        from Python) starves a large GPU, so it is always set."""
        return int(self.engine.get("max_num_seqs", MAX_NUM_SEQS))


class SamplingConfig(Section):
    """Sampling parameters of every request, by their OpenAI and vLLM names."""

    temperature: float = Field(0.0, ge=0, le=2)
    """0 is greedy."""

    max_tokens: int = Field(1024, ge=1)
    """Most tokens of one answer; an answer cut off there is not ok."""

    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus sampling."""

    top_k: int | None = None
    """Only the k likeliest tokens (vLLM)."""

    seed: int | None = None
    """Makes sampling repeatable, within one engine version."""

    stop: list[str] | None = None
    """Strings that end an answer."""

    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Against tokens already seen."""

    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Against tokens seen often."""

    repetition_penalty: float | None = Field(None, gt=0)
    """Against repetition (vLLM); 1 is none."""

    def body(self) -> dict[str, Any]:
        """The keys of an OpenAI chat body that were set."""
        return self.model_dump(exclude_none=True)


class ReplicaRange(Section):
    """An elastic number of replicas."""

    min: int = Field(1, ge=1)
    """Start with so many."""

    max: int = Field(ge=1)
    """Grow to so many while there is work."""

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError("`min` is larger than `max`")
        return self


class ClusterConfig(Section):
    """Where it runs. Nothing here changes the output."""

    replicas: int | ReplicaRange = 1
    """Engines, each on tensor_parallel_size x pipeline_parallel_size GPUs: a number, or min/max."""

    address: str | None = None
    """A running Ray cluster; null: the environment's RAY_ADDRESS, else Ray on this machine."""

    grace_s: float = Field(20.0, ge=0)
    """After SIGTERM no unit begins, and those that have begun have so many seconds to end. Less
    than what the machine leaves: Kubernetes 30, a spot notice 120."""

    accelerator: Accelerator | None = None
    """The GPUs' type, for what `axbatch plan` says of room, time and cost."""

    cpus_per_replica: int | None = Field(None, ge=1)
    """CPUs of an engine without GPU; null: this machine's cores shared among the replicas."""

    @field_validator("replicas")
    @classmethod
    def _at_least_one(cls, replicas: int | ReplicaRange) -> int | ReplicaRange:
        if isinstance(replicas, int) and replicas < 1:
            raise ValueError("must be at least 1")
        return replicas

    @property
    def range(self) -> ReplicaRange:
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas
        return ReplicaRange(min=self.replicas, max=self.replicas)


class ScheduleConfig(Section):
    """In which order a replica computes, and what it need not. Changes no output."""

    longest_first: bool = True
    """Of the requests that wait for a replica's engine, the longest goes first: a long one that
    comes last is computed alone."""

    reuse_answers: bool = True
    """A request that a replica has had before, letter for letter, is not computed again, if it is
    greedy or has a seed. The copy's `_usage` is 0."""


class LimitsConfig(Section):
    """When the outcome counts as bad, and when an engine does."""

    max_failed_fraction: float = Field(0.01, ge=0, le=1)
    """Most rows that may end not ok, as a share of all; above it the exit code is 3."""

    max_engine_silence_s: float = Field(600.0, gt=0)
    """vllm: an engine that has work and makes no token for so long hangs, and is replaced."""


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

    compare: list[ComparedPrices] = []
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


class JobConfig(Section):
    """One job file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Names the job on a cluster: letters, digits, dot, dash, underscore."""

    task: dict[str, Any]
    """What is done to a row: `kind` and that kind's own keys."""

    input: InputConfig
    output: OutputConfig
    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    cluster: ClusterConfig = ClusterConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    limits: LimitsConfig = LimitsConfig()
    accounting: AccountingConfig = AccountingConfig()
    report: ReportConfig = ReportConfig()

    @field_validator("task")
    @classmethod
    def _task_has_a_kind(cls, task: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(task.get("kind"), str):
            raise ValueError("needs a `kind`, for instance `kind: translate`")
        return task


# Engine options that change speed or placement only. Every other option may change the output
# and is part of the job's identity.
EXECUTION_OPTIONS = frozenset({
    "tensor_parallel_size", "pipeline_parallel_size", "max_num_seqs",
    "max_num_batched_tokens", "gpu_memory_utilization", "kv_cache_memory_bytes", "enforce_eager",
    "enable_prefix_caching", "enable_chunked_prefill", "distributed_executor_backend",
    "disable_log_stats", "scheduling_policy", "swap_space", "load_format", "download_dir",
    "compilation_config", "timeout", "max_retries",
    "seconds_per_request", "seconds_per_prompt_token", "seconds_per_completion_token",
})  # fmt: skip


def identity_fields(job: JobConfig, task: dict[str, Any]) -> dict[str, Any]:
    """All that decides the output, by dotted name; `task` is the task's own account of itself."""
    model = {
        "id": absolute_model_id(job.model.id),
        "revision": job.model.revision,
        "backend": job.model.backend,
        "engine": _deciding(job.model.engine),
    }
    if job.model.context != "native":
        yarn = job.model.yarn
        longer = {"factor": yarn.factor, "engine": _deciding(yarn.engine)}
        model |= {"context": job.model.context, "yarn": longer}
    fields = {
        "task": task,
        "output": {"column": job.output.column},
        "model": model,
        "sampling": job.sampling.body(),
    }
    if job.accounting.rows:  # else whose tokens are counted changes the report alone
        tokenizers = (job.accounting.tokenizer, job.accounting.baseline)
        tokenizer, baseline = (name and absolute_model_id(name) for name in tokenizers)
        fields["accounting"] = {"rows": True, "tokenizer": tokenizer, "baseline": baseline}
    return _flatten(fields)


def _deciding(engine: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in engine.items() if name not in EXECUTION_OPTIONS}


def absolute_model_id(model_id: str) -> str:
    """A local folder as an absolute path, so that it means the same from everywhere; else as is."""
    folder = Path(model_id).expanduser()
    if model_id == DEMO:
        return model_id
    if model_id.startswith(("/", ".", "~")) or folder.is_dir():
        return str(folder.absolute())
    return model_id


def identity_hash(fields: dict[str, Any]) -> str:
    """16 hex digits of the SHA-256 over the canonical JSON of `fields`."""
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
