"""Staging: what is not Parquet becomes Parquet once, with all of its rows and under its name."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import JobConfig
from pipeline.errors import AxbatchError, InputError, RefusedError
from pipeline.plan import Plan
from pipeline.staging import STAGED, staged_name
from pipeline.storage import Folder

MakeJob = Callable[..., JobConfig]
MakePlan = Callable[[JobConfig], Plan]

TEXTS = ["first", "두 번째, 줄", 'quote " and \\ slash', "emoji 🚀"]
WRITTEN = {
    "news.jsonl": "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)),
    "news.ndjson": "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS),
    "news.json": json.dumps([{"text": t} for t in TEXTS]),
    "news.csv": "id,text\n"
    + "".join(f'{i},"{t.replace(chr(34), chr(34) * 2)}"\n' for i, t in enumerate(TEXTS)),
    "news.txt": "".join(f"{text}\n" for text in TEXTS),
}


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def staged_files(folder: Path) -> dict[str, int]:
    """Modification times: a file that is staged again has another one."""
    files = (folder / "out" / STAGED).rglob("*.parquet")
    return {path.name: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize("name", WRITTEN)
def test_file_becomes_parquet_once_with_all_its_rows(
    tmp_path: Path, job: MakeJob, plan: MakePlan, name: str
) -> None:
    write(tmp_path / "in/sub" / name, WRITTEN[name])
    first = plan(job(tmp_path))
    [shard] = [planned.shard for planned in first.shards]
    assert (shard.name, shard.rows) == ("sub/news.parquet", len(TEXTS))
    with shard.source.open(shard.path) as file:
        assert pq.read_table(file)["text"].to_pylist() == TEXTS
    before = staged_files(tmp_path)
    assert len(before) == 1
    second = plan(job(tmp_path))
    assert staged_files(tmp_path) == before
    assert second.shards[0].shard.fingerprint == shard.fingerprint


def test_staged_and_parquet_files_make_one_plan(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Callable[..., Path]
) -> None:
    write(tmp_path / "in/b.jsonl", WRITTEN["news.jsonl"])
    write(tmp_path / "in/c.txt", WRITTEN["news.txt"])
    write_parquet(tmp_path / "in/a.parquet", {"text": TEXTS})
    made = plan(job(tmp_path))
    names = [planned.shard.name for planned in made.shards]
    assert names == ["a.parquet", "b.parquet", "c.parquet"]
    assert made.rows == 3 * len(TEXTS)


@pytest.mark.parametrize("name", ["broken.jsonl", "broken.json"])
def test_broken_json_is_an_input_error_that_names_the_file(
    tmp_path: Path, job: MakeJob, plan: MakePlan, name: str
) -> None:
    write(tmp_path / "in" / name, '{"text": "fine"}\n{"text": bro')
    with pytest.raises(InputError, match=name):
        plan(job(tmp_path))
    assert staged_files(tmp_path) == {}


@pytest.mark.parametrize("name", ["empty.jsonl"])
def test_empty_file_is_no_internal_error(
    tmp_path: Path, job: MakeJob, plan: MakePlan, name: str
) -> None:
    write(tmp_path / "in" / name, "")
    with pytest.raises(InputError, match=name):
        plan(job(tmp_path))


def test_name_with_brackets_is_no_pattern(tmp_path: Path, job: MakeJob, plan: MakePlan) -> None:
    write(tmp_path / "in/news 1.jsonl", '{"text": "one"}\n')
    write(tmp_path / "in/news [1].jsonl", '{"text": "two"}\n{"text": "three"}\n')
    rows = {planned.shard.name: planned.shard.rows for planned in plan(job(tmp_path)).shards}
    assert rows == {"news 1.parquet": 1, "news [1].parquet": 2}


def test_words_that_look_like_missing_values_stay_text(
    tmp_path: Path, job: MakeJob, plan: MakePlan
) -> None:
    write(tmp_path / "in/a.csv", "text\nNA\nNone\nnull\n")
    staged = plan(job(tmp_path)).shards[0].shard
    table = pq.read_table(f"{staged.source.url}/{staged.path}")
    assert table["text"].to_pylist() == ["NA", "None", "null"]


def test_file_mended_after_an_error_is_staged(tmp_path: Path, job: MakeJob, plan: MakePlan) -> None:
    path = write(tmp_path / "in/news.jsonl", "{")
    with pytest.raises(InputError):
        plan(job(tmp_path))
    write(path, WRITTEN["news.jsonl"])
    assert plan(job(tmp_path)).rows == len(TEXTS)


def test_changed_source_is_refused_once_rows_of_it_are_committed(
    tmp_path: Path, job: MakeJob, plan: MakePlan, commit: Callable[..., bool]
) -> None:
    config = job(tmp_path, input={"rows_per_unit": 2})
    path = write(tmp_path / "in/news.jsonl", WRITTEN["news.jsonl"])
    made = plan(config)
    unit, *_ = made.shards[0].units()
    commit(Folder(config.output.path), unit, made.identity, made.shards[0].shard.fingerprint)
    assert plan(config).pending_rows == len(TEXTS) - 2
    write(path, WRITTEN["news.jsonl"].replace("first", "FIRST"))
    with pytest.raises(RefusedError, match=r"news\.parquet.*: its input file has changed"):
        plan(config)


def test_changed_source_is_staged_again_while_nothing_is_committed(
    tmp_path: Path, job: MakeJob, plan: MakePlan
) -> None:
    path = write(tmp_path / "in/news.txt", "one\n")
    assert plan(job(tmp_path)).rows == 1
    write(path, "one\ntwo\n")
    assert plan(job(tmp_path)).rows == 2


def test_local_dataset_becomes_parquet_once(tmp_path: Path, job: MakeJob, plan: MakePlan) -> None:
    write(tmp_path / "corpus/train.jsonl", WRITTEN["news.jsonl"])
    write(tmp_path / "corpus/test.jsonl", '{"id": 9, "text": "test"}\n')
    config = job(tmp_path, input={"path": None, "dataset": str(tmp_path / "corpus")})
    first = plan(config)
    [shard] = [planned.shard for planned in first.shards]
    assert (shard.name, shard.rows) == ("corpus-train.parquet", len(TEXTS))
    with shard.source.open(shard.path) as file:
        assert pq.read_table(file)["text"].to_pylist() == TEXTS
    before = staged_files(tmp_path)
    plan(config)
    assert staged_files(tmp_path) == before


def test_other_split_of_a_dataset_is_another_file(
    tmp_path: Path, job: MakeJob, plan: MakePlan
) -> None:
    write(tmp_path / "corpus/train.jsonl", WRITTEN["news.jsonl"])
    write(tmp_path / "corpus/test.jsonl", '{"id": 9, "text": "test"}\n')
    source = {"path": None, "dataset": str(tmp_path / "corpus")}
    plan(job(tmp_path, input=source))
    [other] = plan(job(tmp_path, input={**source, "split": "test"})).shards
    assert (other.shard.name, other.shard.rows) == ("corpus-test.parquet", 1)


def test_other_dataset_of_the_same_last_name_is_never_taken_for_the_first(
    tmp_path: Path, job: MakeJob, plan: MakePlan
) -> None:
    write(tmp_path / "one/corpus/train.jsonl", WRITTEN["news.jsonl"])
    write(tmp_path / "two/corpus/train.jsonl", '{"text": "other"}\n')
    plan(job(tmp_path, input={"path": None, "dataset": str(tmp_path / "one/corpus")}))
    try:
        other = plan(job(tmp_path, input={"path": None, "dataset": str(tmp_path / "two/corpus")}))
    except AxbatchError:
        return  # a refusal is right as well
    assert other.rows == 1


def test_dataset_that_is_not_there_is_an_input_error_that_names_it(
    tmp_path: Path, job: MakeJob, plan: MakePlan
) -> None:
    with pytest.raises(InputError, match="no-such-corpus"):
        plan(job(tmp_path, input={"path": None, "dataset": str(tmp_path / "no-such-corpus")}))


@pytest.mark.parametrize(
    ("path", "name"),
    [("a.jsonl", "a.parquet"), ("a/b.c.csv", "a/b.c.parquet"), ("A.TXT", "A.parquet")],
)
def test_staged_file_keeps_folder_and_stem(path: str, name: str) -> None:
    assert staged_name(path) == name
