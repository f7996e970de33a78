"""Staging: what is not Parquet becomes Parquet once, with all of its rows and under its name."""

import errno
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import plain_files, staging
from pipeline.batch_file import stage_requests
from pipeline.config import JobConfig
from pipeline.config.data import InputConfig
from pipeline.errors import AxbatchError, InputError, JobFileError, RefusedError, StorageError
from pipeline.plan import Plan
from pipeline.staging import STAGED, staged_name
from pipeline.storage import Folder, find_files

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


def staged_table(folder: Path, name: str, content: str) -> pa.Table:
    """What a file of this name and content is staged to."""
    path = write(folder / "in" / name, content)
    source, [entry] = find_files(str(path))
    staged = staging.stage_file(source, entry, Folder(str(folder / "out")))
    return pq.read_table(folder / "out" / staged.path)


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


# --- values stay what they are ---------------------------------------------------------------

SECRET = "row-text-that-no-message-quotes"
LOOK_LIKE_OTHERS = [
    "01012345678", "06236", "1.10", "9007199254740993", "2024-01-02T03:04:05+09:00", "2024-01-02",
    "true", "1e5", " spaced ", "-0", "NaN",
]  # fmt: skip


@pytest.mark.parametrize("text", LOOK_LIKE_OTHERS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "txt"])
def test_text_that_looks_like_something_else_stays_text(
    tmp_path: Path, kind: str, text: str
) -> None:
    content = {
        "csv": f"text,more\n{text},\n{text},x\n",
        "jsonl": lines({"text": text}, {"text": text}),
        "json": json.dumps([{"text": text}, {"text": text}]),
        "txt": f"{text}\n{text}\n",
    }[kind]
    column = staged_table(tmp_path, f"a.{kind}", content)["text"]
    assert (column.type, column.to_pylist()) == (pa.string(), [text, text])


def test_empty_cells_are_null_and_blank_lines_of_one_column_are_rows(tmp_path: Path) -> None:
    table = staged_table(tmp_path, "a.csv", 'text\na\n\n""\nb\n')
    assert table["text"].to_pylist() == ["a", None, None, "b"]
    table = staged_table(tmp_path, "b.csv", 'a,b\n,\n\n,"x\n\ny"\nz\n')
    assert table.to_pylist() == [
        {"a": None, "b": None}, {"a": None, "b": "x\n\ny"}, {"a": "z", "b": None},
    ]  # fmt: skip
    assert table.schema.types == [pa.string(), pa.string()]


def test_blank_lines_around_the_rows_are_none(tmp_path: Path) -> None:
    table = staged_table(tmp_path, "a.csv", "\n\ntext\na\n\nb\n\n\n")
    assert table["text"].to_pylist() == ["a", None, "b"]


def test_csv_of_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    table = staged_table(tmp_path, "a.csv", "a,b\n")
    assert (table.column_names, table.num_rows) == (["a", "b"], 0)


@pytest.mark.parametrize("between", [0, plain_files.ROW_GROUP_ROWS])
def test_a_key_that_an_object_lacks_is_null(tmp_path: Path, between: int) -> None:
    rows = [{"m": {"a": 1}}, *[{"m": None}] * between, {"m": {"b": ["x"], "a": None}}]
    first, *_, last = staged_table(tmp_path, "a.jsonl", lines(*rows))["m"].to_pylist()
    assert (first, last) == ({"a": 1, "b": None}, {"a": None, "b": ["x"]})


def test_csv_row_with_more_cells_than_the_header_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"a\.csv: line 3: has 3 cells, and the header 2"
    ) as caught:
        staged_table(tmp_path, "a.csv", f"a,b\n1,2\n1,2,{SECRET}\n")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("content", [f'a,b\n1,"{SECRET}\n2,3\n', f'a,b\n1,"x"{SECRET}\n'])
def test_csv_with_broken_quotes_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"a\.csv: line \d: not readable as CSV") as caught:
        staged_table(tmp_path, "a.csv", content)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("odd", [5, True, 1.5, ["x"], {"x": "나"}, 1 << 70])
@pytest.mark.parametrize("between", [0, plain_files.ROW_GROUP_ROWS])
def test_odd_value_among_texts_is_json_and_the_texts_are_as_they_were(
    tmp_path: Path, odd: Any, between: int
) -> None:
    """Whether it comes before them or behind."""
    texts = ["안녕\nhi", None, *["x"] * between]
    rows = [{"text": text} for text in texts]
    for name, given in (("a.jsonl", [*rows, {"text": odd}]), ("b.jsonl", [{"text": odd}, *rows])):
        found = staged_table(tmp_path / name, name, lines(*given))["text"].to_pylist()
        wanted = json.dumps(odd, ensure_ascii=False)
        assert found == ([*texts, wanted] if name == "a.jsonl" else [wanted, *texts])


@pytest.mark.parametrize("numbers", [[1 << 63], [1, -(1 << 63) - 1], [True, 1], [1 << 70, 0.5]])
def test_numbers_that_no_type_holds_are_text(tmp_path: Path, numbers: list[Any]) -> None:
    column = staged_table(tmp_path, "a.jsonl", lines(*({"n": n} for n in numbers)))["n"]
    assert column.to_pylist() == [json.dumps(n) for n in numbers]


def test_whole_numbers_too_large_to_stand_beside_fractions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl: a column has fractions"):
        staged_table(tmp_path, "a.jsonl", lines({"n": (1 << 53) + 1}, {"n": 0.5}))


def test_json_values_keep_their_kinds(tmp_path: Path) -> None:
    row = {
        "i": (1 << 63) - 1,
        "f": 1.5,
        "b": True,
        "l": [1, 2],
        "o": {"z": "2024-01-02", "a": None},
    }
    table = staged_table(tmp_path, "a.jsonl", lines({"n": 1}, row, {**row, "f": 2, "n": None}))
    assert table.to_pylist() == [
        {"n": 1, **dict.fromkeys(row)}, {"n": None, **row}, {"n": None, **row, "f": 2.0},
    ]  # fmt: skip
    assert table.schema.types[:4] == [pa.int64(), pa.int64(), pa.float64(), pa.bool_()]


@pytest.mark.parametrize(
    "values",
    [
        [[{"role": "user", "content": "hi"}], [{"role": "user", "content": [{"type": "text"}]}]],
        [{"a": "5"}, {"a": 5}],
        [{}, {}],
        [{str(n): n} for n in range(1_001)],
        [[1, "x"], {"a": 1}],
        [[1 << 70]],
    ],
)
@pytest.mark.parametrize("between", [0, plain_files.ROW_GROUP_ROWS])
def test_objects_without_a_common_type_are_json_text(
    tmp_path: Path, values: list[Any], between: int
) -> None:
    rows = [{"m": values[0]}, *[{"m": None}] * between, *({"m": value} for value in values[1:])]
    texts = staged_table(tmp_path, "a.jsonl", lines(*rows))["m"].to_pylist()
    assert [text and json.loads(text) for text in texts] == [row["m"] for row in rows]


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ('{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: .* key twice"),
        ('[{"a": 1},\n {"a": 2}', "line 2: .* array is not closed"),
        ('[{"a": 1}] {"a": 2}', "line 1: .* follows the array"),
        ('{"a": 1}\n5\n', "line 2: .* not a JSON object"),
        ('{"\\ud800": 1}', "holds half a character"),
        ('{"a": {"\\ud800": 1}}', "holds half a character"),
        ('{"a": "\\ud800"}', "holds half a character"),
    ],
)
def test_json_that_would_lose_something_is_refused(
    tmp_path: Path, content: str, wrong: str
) -> None:
    with pytest.raises(InputError, match=rf"a\.json: {wrong}"):
        staged_table(tmp_path, "a.json", content)


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", WRITTEN)
def test_rows_do_not_depend_on_how_a_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr(plain_files, "READ_CHARACTERS", size)
    monkeypatch.setattr(plain_files, "ROW_GROUP_BYTES", size)
    assert staged_table(tmp_path, name, WRITTEN[name])["text"].to_pylist() == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_staging_needs_no_more_memory_for_more_rows(tmp_path: Path, name: str) -> None:
    text = "word " * 400
    row = f"{text},1\n" if name == "a.csv" else json.dumps({"text": text}) + "\n"
    content = f"text,n\n{row * 40_000}"
    if name != "a.csv":
        content = row * 40_000 if name == "a.jsonl" else f"[{','.join([row] * 40_000)}]"
    write(tmp_path / "in" / name, content)
    source, [entry] = find_files(str(tmp_path / "in"))
    tracemalloc.start()
    try:
        staging.stage_file(source, entry, Folder(str(tmp_path / "out")))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 5 * plain_files.ROW_GROUP_BYTES < len(content)


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
