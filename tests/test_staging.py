"""Staging: what is not Parquet becomes Parquet once, with all of its rows and under its name."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import staging
from pipeline.batch_file import stage_requests
from pipeline.config import JobConfig
from pipeline.config.data import InputConfig
from pipeline.errors import AxbatchError, InputError, JobFileError, RefusedError, StorageError
from pipeline.plan import Plan
from pipeline.staging import STAGED, staged_name
from pipeline.storage import Folder, find_files

MakeJob = Callable[..., JobConfig]
MakePlan = Callable[[JobConfig], Plan]

SECRET = "row-text-that-no-message-quotes"
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


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


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


def test_file_that_is_renamed_to_another_kind_is_read_as_such(
    tmp_path: Path, job: MakeJob, plan: MakePlan, commit: Callable[..., bool]
) -> None:
    path = write(tmp_path / "in/news.txt", WRITTEN["news.jsonl"])
    config = job(tmp_path)
    plan(config)
    path = path.rename(path.with_suffix(".jsonl"))
    made = plan(config)
    [shard] = made.shards
    with shard.shard.source.open(shard.shard.path) as file:
        assert pq.read_table(file).column_names == ["id", "text"]
    commit(Folder(config.output.path), next(iter(shard.units())), made.identity,
           shard.shard.fingerprint)  # fmt: skip
    path.rename(path.with_suffix(".txt"))
    with pytest.raises(RefusedError, match=r"news\.parquet.*: its input file has changed"):
        plan(config)


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


# --- datasets --------------------------------------------------------------------------------

CARD = "---\ndataset_info:\n  features:\n  - name: text\n    dtype: float64\n{}---\n"


@pytest.mark.parametrize("split", ["train", "train[:1]"])
def test_odd_value_in_a_dataset_is_refused_with_its_column(
    tmp_path: Path, job: MakeJob, plan: MakePlan, split: str
) -> None:
    write(tmp_path / "corpus/train.jsonl", lines({"text": SECRET}, {"text": 5}))
    source = {"path": None, "dataset": str(tmp_path / "corpus"), "split": split}
    with pytest.raises(InputError, match=r"corpus: .*[Cc]olumn.*text") as caught:
        plan(job(tmp_path, input=source))
    assert SECRET not in str(caught.value)


def test_changed_local_dataset_is_refused_once_rows_of_it_are_committed(
    tmp_path: Path, job: MakeJob, plan: MakePlan, commit: Callable[..., bool]
) -> None:
    source = {"path": None, "dataset": str(tmp_path / "corpus"), "rows_per_unit": 2}
    config = job(tmp_path, input=source)
    path = write(tmp_path / "corpus/train.jsonl", WRITTEN["news.jsonl"])
    made = plan(config)
    unit, *_ = made.shards[0].units()
    commit(Folder(config.output.path), unit, made.identity, made.shards[0].shard.fingerprint)
    write(tmp_path / "corpus/.cache/lock", "not part of the dataset")
    assert plan(config).pending_rows == len(TEXTS) - 2
    time = path.stat().st_mtime_ns
    write(path, WRITTEN["news.jsonl"].replace("first", "FIRST"))
    os.utime(path, ns=(time + 10**9, time + 10**9))
    with pytest.raises(RefusedError, match=r"corpus-train\.parquet.*: its input file has changed"):
        plan(config)


def test_a_local_dataset_is_the_same_by_any_path(
    tmp_path: Path, job: MakeJob, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "corpus/train.jsonl", WRITTEN["news.jsonl"])
    monkeypatch.chdir(tmp_path)
    names = ["./corpus", "corpus/", str(tmp_path / "corpus")]
    plans = [plan(job(tmp_path, input={"path": None, "dataset": name})) for name in names]
    assert len({made.shards[0].shard.fingerprint for made in plans}) == 1
    assert len(staged_files(tmp_path)) == 1


def test_output_inside_the_dataset_folder_is_refused(
    tmp_path: Path, job: MakeJob, plan: MakePlan
) -> None:
    write(tmp_path / "corpus/train.jsonl", WRITTEN["news.jsonl"])
    source = {"path": None, "dataset": str(tmp_path / "corpus")}
    with pytest.raises(InputError, match="inside the dataset folder"):
        plan(job(tmp_path, input=source, output={"path": str(tmp_path / "corpus/out")}))


# --- errors ----------------------------------------------------------------------------------


def test_failing_cast_quotes_no_row(tmp_path: Path, job: MakeJob, plan: MakePlan) -> None:
    write(tmp_path / "corpus/train.jsonl", lines({"text": SECRET}))
    write(tmp_path / "corpus/README.md", CARD.format(""))
    with pytest.raises(InputError, match=r"corpus: .*cannot read its rows: ArrowInvalid") as caught:
        plan(job(tmp_path, input={"path": None, "dataset": str(tmp_path / "corpus")}))
    assert SECRET not in str(caught.value)


def test_dataset_made_by_a_script_is_no_internal_error(
    tmp_path: Path, job: MakeJob, plan: MakePlan
) -> None:
    write(tmp_path / "corpus/corpus.py", "")
    with pytest.raises(JobFileError, match="corpus: is made by a script"):
        plan(job(tmp_path, input={"path": None, "dataset": str(tmp_path / "corpus")}))


def test_dataset_that_is_not_what_its_card_says_is_no_internal_error(
    tmp_path: Path, job: MakeJob, plan: MakePlan, write_parquet: Callable[..., Path]
) -> None:
    write_parquet(tmp_path / "corpus/data/train.parquet", {"text": [1.0]})
    splits = "  splits:\n  - name: train\n    num_bytes: 8\n    num_examples: 7\n"
    write(tmp_path / "corpus/README.md", CARD.format(splits))
    with pytest.raises(InputError, match=r"corpus: `datasets` cannot load it: .*num_examples=7"):
        plan(job(tmp_path, input={"path": None, "dataset": str(tmp_path / "corpus")}))


@pytest.mark.parametrize("form", ["file", "dataset", "openai-batch"])
def test_full_disk_while_staging_says_to_free_some_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "in/a.jsonl", lines({"text": SECRET}))
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    output = Folder(str(tmp_path / "out"))
    with pytest.raises(StorageError, match=r"No space left on device[^$]*Free some space"):
        if form == "dataset":
            staging.stage_dataset(InputConfig(dataset=str(tmp_path / "in")), output)
        else:
            source, [entry] = find_files(str(tmp_path / "in"))
            stage = staging.stage_file if form == "file" else stage_requests
            stage(source, entry, output)
    assert staged_files(tmp_path) == {}
