"""The second lane's engine: its mistakes show before the first begins, and it fits the cluster."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.autoscaler.sdk

from pipeline import cluster
from pipeline.config import JobConfig
from pipeline.config.model import ModelConfig
from pipeline.config.running import ClusterConfig
from pipeline.engine import check_options
from pipeline.errors import ClusterError, JobFileError, ModelError, StorageError
from pipeline.lanes import Lane, check_lanes, first_lane, plan_deferred, yarn_lane
from pipeline.merging import publish
from pipeline.parts import Stamp, commit_part, result_fields, result_table
from pipeline.records import Counts, Output
from pipeline.shards import UNIT_BYTES
from pipeline.storage import Folder
from tests.conftest import make_job, make_plan_of, write_table

CONFIG = {"max_position_embeddings": 32_768, "num_attention_heads": 64, "rope_theta": 5e5}


def model_of(folder: Path, config: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    return ModelConfig.model_validate({"id": str(folder), "context": "auto"} | keys)


def test_heads_that_do_not_divide_in_the_second_lane(tmp_path: Path) -> None:
    check_lanes(model_of(tmp_path))
    with pytest.raises(ModelError, match="64 attention heads do not divide by 3"):
        check_lanes(model_of(tmp_path, yarn={"engine": {"tensor_parallel_size": 3}}))


def test_rope_that_is_stretched_already(tmp_path: Path) -> None:
    stretched = CONFIG | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(ModelError, match="llama3"):
        check_lanes(model_of(tmp_path, stretched))


def test_wrong_option_of_the_second_lane() -> None:
    echo = {"id": "echo", "backend": "echo", "context": "auto"}
    wrong = {"engine": {"seconds_per_requests": 1}}
    with pytest.raises(JobFileError, match="seconds_per_requests"):
        check_lanes(ModelConfig.model_validate(echo | {"yarn": wrong}))


def test_wrong_option_of_vllm_is_named_by_its_key(tmp_path: Path) -> None:
    model = yarn_lane(model_of(tmp_path, yarn={"engine": {"kv_cashe_dtype": "fp8"}}), 40_000).model
    with pytest.raises(ModelError, match=r"model\.yarn\.engine: .*kv-cashe-dtype") as error:
        check_options(model, "model.yarn.engine")
    assert "kv_cache_dtype" in error.value.hint


def test_other_rope_parameters_stay(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.5}
    config = {"max_position_embeddings": 32_768, "rope_parameters": rope}
    overrides = yarn_lane(model_of(tmp_path, config), 40_000).model.engine["hf_overrides"]
    assert overrides["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert overrides["rope_parameters"]["rope_type"] == "yarn"


def test_context_yarn_is_as_long_as_the_engine_says(tmp_path: Path) -> None:
    lane = first_lane(model_of(tmp_path, context="yarn", engine={"max_model_len": 65_536}))
    assert (lane.factor, lane.model.engine["max_model_len"]) == (2.0, 65_536)


# --- replicas --------------------------------------------------------------------------------


def job_of(tmp_path: Path, model: ModelConfig, replicas: Any) -> JobConfig:
    settings = ClusterConfig.model_validate({"replicas": replicas})
    return make_job(tmp_path).model_copy(update={"model": model, "cluster": settings})


def test_second_lane_takes_the_room_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight replicas of one GPU, and a second lane that takes four of them each."""
    node = {"Alive": True, "Resources": {"GPU": 8.0, "CPU": 64.0}}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node])
    model = model_of(tmp_path, yarn={"engine": {"tensor_parallel_size": 4}})
    job = job_of(tmp_path, model, 8)
    first = cluster.replica_resources(job, first_lane(model), units=1000)
    assert (first.gpus, first.replicas.min, first.replicas.max) == (1, 8, 8)
    second = Lane("yarn", yarn_lane(model, 40_000).model, is_second=True)
    share = cluster.replica_resources(job, second, units=1000)
    assert (share.gpus, share.replicas.min) == (4, 2)
    with pytest.raises(ClusterError, match="there is room for 2"):
        cluster.replica_resources(job, Lane("yarn", second.model), units=1000)


def test_replica_of_more_cpus_than_the_largest_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in (8.0, 32.0)]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)

    def share(cpus: int) -> cluster.Resources:
        job = make_job(tmp_path, cluster={"cpus_per_replica": cpus})
        return cluster.replica_resources(job, first_lane(job.model), units=1000)

    assert share(32).cpus == 32
    with pytest.raises(ClusterError, match="is 33, but the largest machine has 32 CPUs"):
        share(33)


@pytest.mark.parametrize(("asked_before_it_grows", "wait_s"), [(1, 60.0), (3, 60.0), (None, 0.05)])
def test_cluster_is_asked_for_gpus_where_they_may_take_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked_before_it_grows: int | None,
    wait_s: float,
) -> None:
    """Until they are there: others overwrite the one wish that a cluster knows."""
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": {"CPU": 4.0}}]
    asked: list[list[dict[str, int]]] = []

    def ask(bundles: list[dict[str, int]]) -> None:
        asked.append(bundles)
        if len(asked) == asked_before_it_grows:
            nodes.append({"Alive": True, "Resources": {"CPU": 8.0, "GPU": 16.0}})

    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", ask)
    monkeypatch.setattr(cluster, "LOOK_S", 0.01)
    model = model_of(tmp_path, engine={"tensor_parallel_size": 8})
    settings = {"replicas": {"min": 2, "max": 3}, "wait_s": wait_s, "address": "auto"}
    job = make_job(tmp_path, cluster=settings)
    if asked_before_it_grows:
        share = cluster.replica_resources(job, first_lane(model), units=1000)
        assert (share.gpus, share.replicas.min) == (8, 2)
        assert len(asked) == asked_before_it_grows + 1
    else:
        with pytest.raises(ModelError, match="no GPU"):
            cluster.replica_resources(job, first_lane(model), units=1000)
    assert asked[:-1] == [[{"GPU": 8}] * 2] * (len(asked) - 1)
    assert asked[-1] == [], "what it need not have any more"


@pytest.mark.parametrize(("units", "least", "most"), [(1, 1, 1), (3, 2, 3), (100, 2, 8)])
def test_no_more_replicas_than_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: int, least: int, most: int
) -> None:
    node = {"Alive": True, "Resources": {"GPU": 8.0, "CPU": 64.0}}
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node])
    model = model_of(tmp_path)
    job = job_of(tmp_path, model, {"min": 2, "max": 8})
    replicas = cluster.replica_resources(job, first_lane(model), units).replicas
    assert (replicas.min, replicas.max) == (least, most)


# --- units -----------------------------------------------------------------------------------


def test_units_of_long_rows_are_small(tmp_path: Path) -> None:
    """As large in bytes as others, so that losing one costs no more."""
    job = make_job(tmp_path, model={"context": "auto"})
    write_table(tmp_path / "in" / "a.parquet", {"text": ["short"] * 300})
    plan = make_plan_of(job)
    [shard] = plan.shards
    output, counts = Folder(job.output.path), Counts()
    outputs = [Output(None, "deferred", "deferred: 50000 tokens", needs=50_000)] * 300
    for row in outputs:
        counts.count(row)
    stamp = Stamp(plan.identity, shard.key, shard.shard.fingerprint, 0, 300, counts, "run")
    commit_part(output, stamp, result_table(outputs, "ko", pa.string()))
    [waiting] = make_plan_of(job).shards
    deferred = plan_deferred(plan.identity, [waiting], output, 50_000)
    units = [unit.rows for unit in deferred.shards[0].units()]
    assert set(units) == {UNIT_BYTES // 200_000}
    assert sum(units) == 300
    assert deferred.shards[0].overlay is not None
    assert deferred.shards[0].overlay.rows == array("q", range(300))


def test_a_shard_with_rows_that_wait_is_never_published(tmp_path: Path) -> None:
    """Another run's part may say that a row waits where this one's engine had died of it."""
    job = make_job(tmp_path, model={"context": "auto"})
    write_table(tmp_path / "in" / "a.parquet", {"text": ["a", "b"]})
    plan = make_plan_of(job)
    [shard] = plan.shards
    output = Folder(job.output.path)
    outputs = [Output("a"), Output(None, "deferred", "deferred: 9 tokens", needs=9)]
    stamp = Stamp(plan.identity, shard.key, shard.shard.fingerprint, 0, 2, Counts(), "run")
    commit_part(output, stamp, result_table(outputs, "ko", pa.string()))
    whole = replace(stamp, shard=shard.shard.name)
    fields = result_fields("ko", pa.string())
    source = shard.shard.source
    with pytest.raises(StorageError, match="1 rows wait for the next lane"):
        publish(source, "a.parquet", output, whole, shard.key, fields, lambda: None)
    assert not (tmp_path / "out" / "a.parquet").exists()
