"""The longer engine: which models are stretched with YaRN, how far, and with which options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config import JobConfig
from pipeline.config.model import ModelConfig
from pipeline.errors import ModelError
from pipeline.identity import identity_fields
from pipeline.lanes import first_lane, own_context, yarn_lane

AX = {"max_position_embeddings": 32_768, "num_attention_heads": 64}


def model_with(folder: Path, config: dict[str, Any], **keys: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig.model_validate({"id": str(folder), "context": "auto"} | keys)


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
@given(st.integers(32_769, 131_072))
def test_yarn_has_the_least_factor_that_holds_the_longest_row(
    tmp_path_factory: pytest.TempPathFactory, rope: dict[str, Any], tokens: int
) -> None:
    model = model_with(tmp_path_factory.mktemp("model"), AX | rope)
    lane = yarn_lane(model, tokens)
    overrides = lane.model.engine["hf_overrides"]
    assert lane.model.engine["max_model_len"] == tokens
    assert lane.factor - 0.001 < tokens / 32_768 <= lane.factor <= 4
    assert overrides["rope_parameters"] == {
        "rope_type": "yarn",
        "factor": lane.factor,
        "original_max_position_embeddings": 32_768,
        "rope_theta": 5e5,
    }
    assert tokens <= overrides["max_position_embeddings"] <= tokens + 33


def test_lanes_of_each_context(tmp_path: Path) -> None:
    config = AX | {"rope_theta": 1e4}
    native = first_lane(model_with(tmp_path, config, context="native"))
    auto = first_lane(model_with(tmp_path, config, yarn={"factor": 3.0}))
    yarn = first_lane(model_with(tmp_path, config, context="yarn"))
    assert (native.name, native.longest, native.factor) == ("native", 0, 1)
    assert (auto.name, auto.longest, auto.model.engine) == ("native", 98_304, {})
    assert (yarn.name, yarn.longest, yarn.factor) == ("yarn", 0, 4)
    assert yarn.model.engine["max_model_len"] == 131_072


def test_options_of_the_yarn_lane_are_its_own(tmp_path: Path) -> None:
    model = model_with(
        tmp_path,
        AX,
        engine={"max_num_seqs": 512, "dtype": "bfloat16"},
        yarn={"engine": {"max_num_seqs": 8, "tensor_parallel_size": 2}},
    )
    assert first_lane(model).model.max_num_seqs == 512
    lane = yarn_lane(model, 40_000).model
    assert (lane.max_num_seqs, lane.world_size, lane.engine["dtype"]) == (8, 2, "bfloat16")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_position_embeddings": "many"},
        AX | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        AX | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
    ],
)
def test_model_that_cannot_be_stretched_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"model\.context: native"):
        first_lane(model_with(tmp_path, config))


def test_demo_model_is_made_for_2048() -> None:
    assert own_context(ModelConfig(id="demo")) == 2048


@pytest.mark.parametrize(
    "keys",
    [
        {"yarn": {"factor": 2.0}},
        {"context": "auto", "backend": "http", "base_url": "http://a/v1"},
        {"context": "auto", "engine": {"hf_overrides": {}}},
        {"context": "yarn", "engine": {"max_model_len": "64k"}},
        {"context": "auto", "yarn": {"factor": 1.0}},
        {"context": "auto", "yarn": {"engine": {"max_model_len": 9}}},
        {"context": "longer"},
    ],
)
def test_context_that_makes_no_sense_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelConfig.model_validate({"id": "a/b"} | keys)


def test_native_job_has_the_identity_it_had() -> None:
    job = JobConfig.model_validate({
        "name": "a", "task": {"kind": "translate"}, "input": {"path": "in"},
        "output": {"path": "out", "column": "ko"}, "model": {"id": "a/b"},
    })  # fmt: skip
    assert not [key for key in identity_fields(job, {}) if "context" in key or "yarn" in key]
