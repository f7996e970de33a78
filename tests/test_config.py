"""The job file: defaults, overrides, errors that name the nearest key, and the job's identity."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import load_task
from pipeline.config import JobConfig
from pipeline.config.running import ReplicaRange
from pipeline.errors import JobFileError
from pipeline.identity import EXECUTION_OPTIONS, identity_fields, identity_hash
from pipeline.job_file import load_job

MINIMAL: dict[str, Any] = {
    "name": "news",
    "task": {"kind": "translate", "text": "en", "source": "en", "target": "ko"},
    "input": {"path": "in"},
    "output": {"path": "out", "column": "ko"},
    "model": {"id": "skt/A.X-3.1"},
}


def changed(key: str, value: Any, tree: dict[str, Any] | None = None) -> dict[str, Any]:
    """A copy of `tree` (default MINIMAL) with the dotted `key` set."""
    whole = copy.deepcopy(MINIMAL if tree is None else tree)
    *parents, leaf = key.split(".")
    section = whole
    for parent in parents:
        section = section.setdefault(parent, {})
    section[leaf] = value
    return whole


def identity(tree: dict[str, Any]) -> str:
    job = JobConfig.model_validate(tree)
    return identity_hash(identity_fields(job, load_task(job).identity()))


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return path


def test_defaults(job_file: Path) -> None:
    job = load_job(job_file)
    assert job.input.rows_per_unit == 256
    assert job.input.paths == ["in"]
    assert job.model.backend == "vllm"
    assert job.model.revision is None
    assert (job.model.world_size, job.model.max_num_seqs) == (1, 256)
    assert job.sampling.body() == {"temperature": 0.0, "max_tokens": 1024}
    assert job.cluster.range == ReplicaRange(min=1, max=1)
    assert job.cluster.address is None
    assert job.schedule.longest_first and job.schedule.reuse_answers
    assert job.limits.max_failed_fraction == 0.01


def test_a_job_is_immutable(job_file: Path) -> None:
    job = load_job(job_file)
    with pytest.raises(ValueError, match="frozen"):
        job.name = "other"  # type: ignore[misc]


def test_two_jobs_share_no_default() -> None:
    one, two = (JobConfig.model_validate(MINIMAL) for _ in range(2))
    assert one.model.engine is not two.model.engine


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=daily", "name", "daily"),
        ("sampling.max_tokens=64", "sampling.max_tokens", 64),
        ("sampling.temperature=0.5", "sampling.temperature", 0.5),
        ("sampling.temperature=1", "sampling.temperature", 1.0),
        ("sampling.stop=[END, '###']", "sampling.stop", ["END", "###"]),
        ("sampling.top_p=null", "sampling.top_p", None),
        ("model.revision=null", "model.revision", None),
        ("model.revision='0123'", "model.revision", "0123"),
        ("model.engine.max_num_seqs=8", "model.engine", {"max_num_seqs": 8}),
        ("model.engine={dtype: float32, enforce_eager: true}", "model.engine",
         {"dtype": "float32", "enforce_eager": True}),
        ("input.path=[a, b/*.parquet]", "input.path", ["a", "b/*.parquet"]),
        ("input.path=s3://b/k=v/x", "input.path", "s3://b/k=v/x"),
        ("cluster.replicas=4", "cluster.replicas", 4),
        ("cluster.replicas={min: 2, max: 8}", "cluster.replicas", ReplicaRange(min=2, max=8)),
    ],
)  # fmt: skip
def test_override(override: str, key: str, value: Any, job_file: Path) -> None:
    found: Any = load_job(job_file, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_apply_in_order_and_make_sections(job_file: Path) -> None:
    job = load_job(
        job_file, ["sampling.seed=1", "sampling.seed=2", "cluster={replicas: 2}",
                   "cluster.cpus_per_replica=3"],
    )  # fmt: skip
    assert job.sampling.seed == 2
    assert (job.cluster.range.max, job.cluster.cpus_per_replica) == (2, 3)


def test_an_override_can_mend_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(changed("output.column", 3)), encoding="utf-8")
    assert load_job(path, ["output.column=ko"]).output.column == "ko"


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", ".a=1", "a.=1", "name.x=1", "name=[1"])
def test_wrong_override(override: str, job_file: Path) -> None:
    with pytest.raises(JobFileError, match=r"^--set "):
        load_job(job_file, [override])


@pytest.mark.parametrize(
    ("key", "message", "hint"),
    [
        ("modle", "job.yaml: modle: unknown key", "Did you mean `model`?"),
        ("outputs", "job.yaml: outputs: unknown key", "Did you mean `output`?"),
        ("input.paths", "input.paths: unknown key", "Did you mean `path`?"),
        ("input.row_per_unit", "input.row_per_unit: unknown key", "Did you mean `rows_per_unit`?"),
        ("model.base-url", "model.base-url: unknown key", "Did you mean `base_url`?"),
        ("sampling.max_token", "sampling.max_token: unknown key", "Did you mean `max_tokens`?"),
        ("limits.max_failed", "limits.max_failed: unknown key",
         "Did you mean `max_failed_fraction`?"),
        ("cluster.replica", "cluster.replica: unknown key", "Did you mean `replicas`?"),
        ("schedule.longest", "schedule.longest: unknown key", "Did you mean `longest_first`?"),
        ("schedule.reuse_answer", "schedule.reuse_answer: unknown key",
         "Did you mean `reuse_answers`?"),
        ("output.zzz", "output.zzz: unknown key", "Known keys here: column, path."),
    ],
)  # fmt: skip
def test_unknown_key_names_the_nearest(
    key: str, message: str, hint: str, tmp_path: Path
) -> None:  # fmt: skip
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(changed(key, "x")), encoding="utf-8")
    with pytest.raises(JobFileError) as caught:
        load_job(path)
    assert message in caught.value.args[0]
    assert caught.value.hint == hint
    assert caught.value.exit_code == 2


def test_merged_keys_are_taken_and_may_be_overridden(tmp_path: Path) -> None:
    tree = yaml.safe_dump(MINIMAL)
    path = tmp_path / "job.yaml"
    path.write_text(f"{tree}sampling: &s {{seed: 1, top_k: 2}}\n", encoding="utf-8")
    plain = load_job(path)
    path.write_text(
        f"{tree}sampling:\n  <<: [{{seed: 1, top_k: 3}}]\n  top_k: 2\n", encoding="utf-8"
    )
    assert load_job(path) == plain


def test_unknown_key_comes_before_the_missing_one(tmp_path: Path) -> None:
    tree = copy.deepcopy(MINIMAL)
    tree["output"] = {"path": "out", "colum": "ko"}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(JobFileError, match=r"output\.colum: unknown key \(and 1 more\)") as caught:
        load_job(path)
    assert caught.value.hint == "Did you mean `column`?"


def test_unknown_key_below_a_range() -> None:
    with pytest.raises(ValueError, match="mim"):
        JobConfig.model_validate(changed("cluster.replicas", {"mim": 1, "max": 2}))


@pytest.mark.parametrize(
    ("replicas", "least", "most"), [(1, 1, 1), (8, 8, 8), ({"max": 4}, 1, 4),
                                    ({"min": 2, "max": 4}, 2, 4), ({"min": 3, "max": 3}, 3, 3)],
)  # fmt: skip
def test_replicas(replicas: Any, least: int, most: int) -> None:
    found = JobConfig.model_validate(changed("cluster.replicas", replicas)).cluster.range
    assert (found.min, found.max) == (least, most)


@pytest.mark.parametrize(
    "replicas", [0, -1, 1.5, "2", True, None, [], {}, {"min": 2}, {"min": 2, "max": 1},
                 {"min": 0, "max": 1}],
)  # fmt: skip
def test_wrong_replicas(replicas: Any) -> None:
    with pytest.raises(ValueError, match="replicas"):
        JobConfig.model_validate(changed("cluster.replicas", replicas))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "two words"), ("name", ""), ("name", 7),
        ("input.path", 7), ("input", {}), ("input.dataset", "and/path"),
        ("input.rows_per_unit", 0), ("input.rows_per_unit", "many"),
        ("output.column", ""), ("output.path", "s3://user:word@bucket/x"),
        ("model.id", ""), ("model.backend", "tgi"), ("model.base_url", "http://h/v1"),
        ("model.api_key_env", "sk-1234"), ("model.engine", []),
        ("sampling.temperature", -1), ("sampling.temperature", "0.5"), ("sampling.top_p", 0),
        ("sampling.max_tokens", 0), ("sampling.stop", "END"),
        ("limits.max_failed_fraction", 1.5), ("task.kind", 3),
    ],
)  # fmt: skip
def test_wrong_value_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key.partition(".")[0]):
        JobConfig.model_validate(changed(key, value))


# Identity: what decides the output changes it, what only decides how and where does not.

BASE = {
    **MINIMAL,
    "sampling": {"temperature": 0.0, "max_tokens": 1024},
    "model": {"id": "skt/A.X-3.1", "engine": {"tensor_parallel_size": 4, "dtype": "bfloat16"}},
}


def test_identity_is_stable() -> None:
    """A change of this value makes every output folder in the world refuse to resume. Change it
    only with the prompts or the meaning of a key, and say so in the release notes."""
    assert identity(BASE) == "ee8d125e24ad7b8a"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task.text", "body"), ("task.source", "de"), ("task.target", "ja"),
        ("task.instructions", "Keep names in English."),
        ("output.column", "ko2"),
        ("model.id", "skt/A.X-3.1-Light"), ("model.revision", "a1b2c3"),
        ("model.backend", "echo"),
        ("model.engine.dtype", "float32"), ("model.engine.max_model_len", 4096),
        ("model.engine.quantization", "fp8"),
        ("sampling.temperature", 0.7), ("sampling.max_tokens", 512), ("sampling.top_p", 0.9),
        ("sampling.seed", 1), ("sampling.stop", ["END"]), ("sampling.repetition_penalty", 1.1),
    ],
)  # fmt: skip
def test_identity_changes_with(key: str, value: Any) -> None:
    assert identity(changed(key, value, BASE)) != identity(BASE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"), ("input.path", "s3://elsewhere/*.parquet"), ("input.path", ["a", "b"]),
        ("input.rows_per_unit", 32), ("output.path", "elsewhere"),
        ("cluster.replicas", 8), ("cluster.replicas", {"min": 1, "max": 8}),
        ("cluster.address", "auto"), ("cluster.cpus_per_replica", 4),
        ("schedule.longest_first", False), ("schedule.reuse_answers", False),
        ("limits.max_failed_fraction", 0.5),
        ("model.engine.tensor_parallel_size", 8), ("model.engine.pipeline_parallel_size", 2),
        ("model.engine.max_num_seqs", 16), ("model.engine.max_num_batched_tokens", 4096),
        ("model.engine.gpu_memory_utilization", 0.8), ("model.engine.enforce_eager", True),
        ("model.api_key_env", "OTHER_KEY"),
    ],
)  # fmt: skip
def test_identity_does_not_change_with(key: str, value: Any) -> None:
    assert identity(changed(key, value, BASE)) == identity(BASE)


def test_identity_sees_what_a_template_file_holds_not_where_it_is(tmp_path: Path) -> None:
    def with_template(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return identity(changed("model.engine.chat_template", str(tmp_path / name), BASE))

    one = with_template("a.jinja", "{{ messages }}")
    assert with_template("b.jinja", "{{ messages }}") == one
    assert with_template("a.jinja", "{{ messages[0] }}") != one
    assert one != identity(BASE)


def test_identity_does_not_depend_on_the_server() -> None:
    """Moving a server, or its port, is no other model."""
    urls = ["http://one:8000/v1", "http://two:9000/v1"]
    jobs = [
        {**BASE, "model": {"id": "m", "backend": "http", "base_url": url}} for url in urls
    ]  # fmt: skip
    assert identity(jobs[0]) == identity(jobs[1])


def test_random_weights_are_another_model() -> None:
    """As a trial of the speed may use; faster loading is none."""
    formats = ["auto", "runai_streamer", "dummy"]
    auto, streamed, dummy = (
        identity(changed("model.engine.load_format", each, BASE)) for each in formats
    )
    assert identity(BASE) == auto == streamed != dummy


@pytest.mark.parametrize("value", ["\\ud83d\\ude00 \\uac00", "😀 가"])
def test_characters_mean_the_same_escaped_as_json_does(tmp_path: Path, value: str) -> None:
    """Job files are made by programs too."""
    file = tmp_path / "job.yaml"
    text = json.dumps(changed("task.instructions", "X", BASE)).replace('"X"', f'"{value}"')
    file.write_text(text, encoding="utf-8")
    assert load_job(file).task["instructions"] == "😀 가"


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps({**BASE, "name": "\ud83d"}), encoding="utf-8")
    with pytest.raises(JobFileError, match="half a character"):
        load_job(file)


def test_identity_does_not_depend_on_spelled_out_defaults() -> None:
    spelled = changed("task.instructions", "", changed("model.backend", "vllm", BASE))
    assert identity(changed("sampling.top_p", None, spelled)) == identity(BASE)


def test_identity_names_its_fields() -> None:
    job = JobConfig.model_validate(BASE)
    fields = identity_fields(job, load_task(job).identity())
    assert fields["task.system_prompt"].startswith("You are an expert who translates")
    assert fields["model.engine.dtype"] == "bfloat16"
    assert fields["output.column"] == "ko"
    assert not [name for name in fields if "parallel" in name or "path" in name]


engine_values = st.integers(min_value=1)
paths = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20)


@given(
    engine=st.dictionaries(st.sampled_from(sorted(EXECUTION_OPTIONS)), engine_values),
    replicas=st.integers(1, 1000),
    source=paths,
    target=paths,
    rows=st.integers(1, 65_536),
)
def test_identity_ignores_all_of_execution(
    engine: dict[str, Any], replicas: int, source: str, target: str, rows: int
) -> None:
    tree = changed("cluster.replicas", replicas, BASE)
    tree["model"]["engine"] = {**engine, "dtype": "bfloat16"}
    tree["input"] = {"path": source, "rows_per_unit": rows}
    tree["output"]["path"] = target
    assert identity(tree) == identity(BASE)


@given(st.text(min_size=1, max_size=40))
def test_identity_sees_every_instruction(instructions: str) -> None:
    assert identity(changed("task.instructions", instructions, BASE)) != identity(BASE)


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8))


@given(
    st.dictionaries(st.text(max_size=8), scalars, max_size=6),
    st.dictionaries(st.text(max_size=8), scalars, max_size=6),
    st.randoms(use_true_random=False),
)
def test_hash_sees_content_not_order(one: dict[str, Any], two: dict[str, Any], random: Any) -> None:
    items = list(one.items())
    random.shuffle(items)
    assert identity_hash(dict(items)) == identity_hash(one)
    # By type too: 1 and True are equal in Python, and different settings.
    same = repr(sorted(one.items(), key=str)) == repr(sorted(two.items(), key=str))
    assert (identity_hash(one) == identity_hash(two)) == same


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.text(max_size=4), inner, max_size=3), max_leaves=6)
)  # fmt: skip
def test_override_takes_any_yaml_value(value: Any, job_file: Path) -> None:
    text = yaml.safe_dump({"v": value}, default_flow_style=True, width=10_000).strip()
    inner = text.removeprefix("{v: ").removesuffix("}")
    job = load_job(job_file, [f"model.engine.option={inner}"])
    assert job.model.engine == {"option": value}
