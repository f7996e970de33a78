"""What a plan refuses, by name: inputs, outputs and columns that cannot be used, and no others."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import AxbatchError, InputError, JobFileError, RefusedError
from pipeline.parts import key_of, part_path
from pipeline.records import Unit
from tests.plans import (
    Commit,
    MakeJob,
    MakePlan,
    Write,
    commit_all,
    output_of,
    publish_shard,
    ranges_of,
    texts,
)


@pytest.mark.parametrize("published", [False, True])
def test_output_of_another_job_is_refused_and_named(
    tmp_path: Path,
    job: MakeJob,
    plan: MakePlan,
    write_parquet: Write,
    commit: Commit,
    published: bool,
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(9))
    config = job(tmp_path)
    made = plan(config)
    commit_all(config, made, commit)
    if published:
        publish_shard(config, made, made.shards[0])
    with pytest.raises(RefusedError, match=r"a\.parquet.*identity"):
        plan(job(tmp_path, sampling={"temperature": 0.5}))
    plan(job(tmp_path, cluster={"replicas": 3}, limits={"max_failed_fraction": 0.5}))


@pytest.mark.parametrize("column", ["ko", "_status", "_reason", "_usage"])
def test_column_name_that_the_result_needs_is_refused(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, column: str
) -> None:
    write_parquet(tmp_path / "in/fine.parquet", texts(3))
    write_parquet(tmp_path / "in/taken.parquet", {**texts(3), column: ["x"] * 3})
    with pytest.raises(InputError, match=rf"taken\.parquet.*`{column}`"):
        plan(job(tmp_path))


def test_missing_column_is_named_with_those_that_are_there(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(3))
    write_parquet(tmp_path / "in/b.parquet", {"id": [1], "body": ["x"]})
    with pytest.raises(InputError, match=r"b\.parquet: has no column `text` \(it has id, body\)"):
        plan(job(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ["text", "id", "id"],
        pytest.param(
            ["text", "text", "id"],
        ),
    ],
)
def test_two_columns_of_one_name_are_refused(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, names: list[str]
) -> None:
    table = pa.table([["a"], ["b"], ["c"]], names=names)
    write_parquet(tmp_path / "in/a.parquet", table)
    with pytest.raises(InputError, match=r"a\.parquet: has two columns of the same name"):
        plan(job(tmp_path))


@pytest.mark.parametrize("column", ["_status", "_reason", "_usage"])
def test_result_column_named_like_a_status_column_is_refused(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, column: str
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(3))
    with pytest.raises((AxbatchError, ValueError), match=column):
        plan(job(tmp_path, output={"column": column}))


def test_foreign_file_in_the_output_is_refused_and_stays(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(3))
    foreign = write_parquet(tmp_path / "out/a.parquet", texts(1))
    before = foreign.read_bytes()
    with pytest.raises(RefusedError, match=r"a\.parquet: is there already"):
        plan(job(tmp_path))
    assert foreign.read_bytes() == before


def test_foreign_file_of_another_name_is_left_alone(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(3))
    write_parquet(tmp_path / "out/notes.parquet", texts(1))
    assert ranges_of(plan(job(tmp_path))) == [("a.parquet", 0, 3)]


@pytest.mark.parametrize("below", ["", "out", "out/deep", "_out"])
def test_output_inside_the_input_is_refused(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, below: str
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(3))
    with pytest.raises(InputError, match="inside the input folder"):
        plan(job(tmp_path, output={"path": str(tmp_path / "in" / below)}))


def test_output_beside_the_input_may_begin_with_its_name(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(3))
    assert plan(job(tmp_path, output={"path": str(tmp_path / "in-ko")})).rows == 3


@pytest.mark.parametrize("path", ["a.parquet", "*.parquet"])
def test_output_may_lie_beside_input_files_that_are_named_or_globbed(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, path: str
) -> None:
    write_parquet(tmp_path / "a.parquet", texts(3))
    assert plan(job(tmp_path, input={"path": str(tmp_path / path)})).rows == 3


@pytest.mark.parametrize(
    "names",
    [("one/a.parquet", "two/a.parquet"), ("one/a.jsonl", "two/a.parquet")],
)
def test_two_inputs_of_one_output_name_are_refused(
    tmp_path: Path,
    job: MakeJob,
    plan: MakePlan,
    write_parquet: Write,
    names: tuple[str, str],
) -> None:
    for name in names:
        write_parquet(tmp_path / name, texts(1))
        if name.endswith(".jsonl"):
            (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"become a\.parquet"):
        plan(job(tmp_path, input={"path": [str(tmp_path / "one"), str(tmp_path / "two")]}))


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" * 10])
def test_file_that_is_not_parquet_is_named(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, content: bytes
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(1))
    (tmp_path / "in/broken.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"in/broken\.parquet: not readable as Parquet"):
        plan(job(tmp_path))


def test_file_of_an_unknown_kind_is_named(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(1))
    (tmp_path / "in/README.md").write_text("hello")
    with pytest.raises(InputError, match=r"README\.md: not a kind of file"):
        plan(job(tmp_path))
    assert plan(job(tmp_path, input={"path": str(tmp_path / "in/*.parquet")})).rows == 1


def test_file_whose_name_is_not_utf8_is_named(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", texts(1))
    (tmp_path / "in/a.parquet").rename(tmp_path / os.fsdecode(b"in/\xb4\xba.parquet"))
    with pytest.raises(InputError, match=r"udcb4.*: its name is not UTF-8"):
        plan(job(tmp_path))


def test_missing_input_is_named(tmp_path: Path, job: MakeJob, plan: MakePlan) -> None:
    with pytest.raises(InputError, match=str(tmp_path / "in")):
        plan(job(tmp_path))


def test_input_files_may_differ_in_their_columns(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write
) -> None:
    write_parquet(tmp_path / "in/a.parquet", {"text": ["x"]})
    write_parquet(tmp_path / "in/b.parquet", {"n": [1.5, 2.5], "text": pa.array(["x", "y"])})
    assert plan(job(tmp_path)).rows == 3


def test_unknown_task_is_named_with_the_nearest_one(tmp_path: Path, job: MakeJob) -> None:
    from jobs import load_task

    with pytest.raises(JobFileError, match="translte") as raised:
        load_task(job(tmp_path, task={"kind": "translte"}))
    assert "`translate`" in raised.value.hint


def test_pickled_python_objects_are_refused(
    tmp_path: Path, job: MakeJob, write_parquet: Write
) -> None:
    # As Ray writes it; the extension's name stands in the field's metadata.
    metadata = {
        "ARROW:extension:name": "ray.data.arrow_pickled_object",
        "ARROW:extension:metadata": "",
    }
    field = pa.field("object", pa.large_binary(), metadata=metadata)
    schema = pa.schema([("text", pa.string()), field])
    write_parquet(tmp_path / "in/a.parquet", pa.table([["a"], [b"code"]], schema=schema))
    (tmp_path / "job.yaml").write_text(job(tmp_path).model_dump_json())
    # In a process of its own: pytest's may have imported Ray, which knows the type.
    command = [sys.executable, "-m", "pipeline.cli", "plan", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "a.parquet: column `object` holds pickled" in done.stderr


def test_part_outlives_a_plan_that_is_refused(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Write, commit: Commit
) -> None:
    write_parquet(tmp_path / "in/a.parquet", texts(9))
    config = job(tmp_path)
    unit = Unit(key_of("a.parquet", "another", "1:a"), 0, 9)
    commit(output_of(config), unit, "another", "1:a")
    with pytest.raises(RefusedError, match="identity another"):
        plan(config)
    assert output_of(config).exists(part_path(unit))
