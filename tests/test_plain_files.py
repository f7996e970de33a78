"""CSV, JSON and text become Parquet with the values that they have, and none is guessed."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import plain_files, staging
from pipeline.errors import InputError
from pipeline.storage import Folder, find_files
from tests.test_staging import SECRET, TEXTS, WRITTEN, lines, write

LOOK_LIKE_OTHERS = [
    "01012345678", "06236", "1.10", "9007199254740993", "2024-01-02T03:04:05+09:00", "2024-01-02",
    "true", "1e5", " spaced ", "-0", "NaN",
]  # fmt: skip


def staged_table(folder: Path, name: str, content: str) -> pa.Table:
    """What a file of this name and content is staged to."""
    path = write(folder / "in" / name, content)
    source, [entry] = find_files(str(path))
    staged = staging.stage_file(source, entry, Folder(str(folder / "out")))
    return pq.read_table(folder / "out" / staged.path)


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


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("before", [b"", b"x\n"])
def test_file_that_is_not_utf8_is_refused(tmp_path: Path, name: str, before: bytes) -> None:
    (tmp_path / name).write_bytes((b'{"text": "x"}\n' if "j" in name else before) + b"\xff\n")
    source, [entry] = find_files(str(tmp_path / name))
    with pytest.raises(InputError, match="is not UTF-8"):
        staging.stage_file(source, entry, Folder(str(tmp_path / "out")))


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
