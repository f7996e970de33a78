"""`model` and `sampling`: which model answers, through which engine, and how."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import SecretInJobFile, Section, check_json, without_credentials

DEMO = "demo"
"""The id of the embedded model."""

MAX_NUM_SEQS = 256
"""Requests that one replica computes at once, where the job file does not say."""
HTTP_MAX_NUM_SEQS = 64
"""That one replica has in flight to a server, which others may ask too."""


def sound_engine_options(engine: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for secrets, for numbers that are none, and for a command line's names."""
    check_json(engine)
    for name in engine:
        if "-" in name:
            raise ValueError(f"holds `{name}`; write `{name.strip('-').replace('-', '_')}`")
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
        if url is None:
            return None
        try:
            _ = urlsplit(without_credentials(url)).port
        except SecretInJobFile:
            raise
        except ValueError as error:
            raise ValueError(f"is no address: {error}") from None
        return url

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
        default = HTTP_MAX_NUM_SEQS if self.backend == "http" else MAX_NUM_SEQS
        return int(self.engine.get("max_num_seqs", default))


class SamplingConfig(Section):
    """Sampling parameters of every request, by their OpenAI and vLLM names."""

    temperature: float = Field(0.0, ge=0, le=2)
    """0 is greedy."""

    max_tokens: int = Field(1024, ge=1)
    """Most tokens of one answer; an answer cut off there is not ok, unless the result is the whole
    response."""

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
