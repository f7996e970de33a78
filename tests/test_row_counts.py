"""Text counts of each row: exact, null where there is none, and their sum is what the report says.

Runs are real but for Ray, which is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.accounting import RowTexts, TextSize
from pipeline.config import JobConfig
from pipeline.counting import TextCounter, load_baseline, load_tokenizer
from pipeline.errors import JobFileError, RefusedError
from pipeline.identity import identity_fields
from pipeline.job_file import parse_section
from pipeline.model import DEMO_MODEL
from pipeline.parts import FOOTER_KEY, TEXTS_TYPE, read_stamp
from pipeline.run import check_identity, record_job
from pipeline.storage import Folder
from tests.openai_server import Body, OpenAIServer, Reply, answer, error, serving, text_of
from tests.runs import Job

SIZES = ("characters", "model_tokens", "baseline_tokens")
ECHO = {"id": "echo", "backend": "echo"}
ROWS = {"rows": True, "tokenizer": str(DEMO_MODEL)}


def a_job(folder: Path, **sections: Any) -> Job:
    defaults: dict[str, Any] = {
        "model": ECHO,
        "accounting": ROWS,
        "limits": {"max_failed_fraction": 1.0},
        "input": {"path": str(folder / "in"), "rows_per_unit": 3},
    }
    job = Job(folder, **{**defaults, **sections})
    job.module = "tests.faults.without_ray"
    return job


def rows_of(job: Job) -> list[dict[str, Any]]:
    files = sorted(job.output.glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def sizes_of(rows: Iterable[dict[str, Any]], side: str) -> list[dict[str, int]]:
    return [row["_texts"][side] for row in rows if row["_texts"][side] is not None]


def summed(sizes: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(size[name] for size in sizes) for name in SIZES}


def check_sums(job: Job, result: str = "ko") -> None:
    """Rows add up to what each file's footer and the report say, and `verify` agrees."""
    for file in job.output.glob("*.parquet"):
        stamp, rows = read_stamp(Folder(str(job.output)), file.name), pq.read_table(file)
        assert stamp is not None and rows.schema.field("_texts").type == TEXTS_TYPE
        assert rows.column_names[-1] == "_texts"
        for side in ("input", "output"):
            counts = [
                counts for column, counts in stamp.counts.account.texts.items()
                if (column == result) == (side == "output")
            ]  # fmt: skip
            assert summed(sizes_of(rows.to_pylist(), side)) == {
                "characters": sum(each.characters for each in counts),
                "model_tokens": sum(each.sample.model for each in counts),
                "baseline_tokens": sum(each.sample.baseline for each in counts),
            }
    report = json.loads((job.output / "_axbatch/report.json").read_bytes())
    for side in ("input", "output"):
        texts = [text for text in report["texts"] if text["role"] == side]
        assert all(text["counted"] == text["texts"] for text in texts)
        assert summed(sizes_of(rows_of(job), side)) == {
            "characters": sum(text["characters"] for text in texts),
            "model_tokens": sum(text["model"]["mid"] for text in texts if text["model"]),
            "baseline_tokens": sum(text["baseline"]["mid"] for text in texts if text["baseline"]),
        }
    job.verify()


def size_by(
    tokenizer: Callable[[str], int], baseline: Callable[[str], int]
) -> Callable[[str | None], dict[str, int] | None]:
    """Counts a text as its row is to be counted."""

    def size(text: str | None) -> dict[str, int] | None:
        if text is None:
            return None
        return dict(zip(SIZES, (len(text), tokenizer(text), baseline(text)), strict=True))

    return size


@pytest.fixture(scope="module")
def size() -> Callable[[str | None], dict[str, int] | None]:
    return size_by(load_tokenizer(str(DEMO_MODEL)), load_baseline("o200k_base"))


def check_rows(job: Job, size: Callable[[str | None], dict[str, int] | None]) -> None:
    for row in rows_of(job):
        assert row["_texts"] == {"input": size(row["en"]), "output": size(row["ko"])}


# --- counting --------------------------------------------------------------------------------

values = st.none() | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2) | st.integers()
tables = st.integers(0, 6).flatmap(
    lambda rows: st.fixed_dictionaries({
        name: st.lists(values, min_size=rows, max_size=rows) for name in ("ko", "a", "b")
    })
)  # fmt: skip


def by_bytes(text: str) -> int:
    return len(text.encode())


@given(tables)
def test_rows_add_up_to_what_their_unit_counts(columns: dict[str, list[Any]]) -> None:
    counts, rows = TextCounter(by_bytes, len, 0.0).count_rows(columns, "ko")
    assert counts == TextCounter(by_bytes, len, 1.0).count(columns)
    given_, made = counts["a"].sample, counts["ko"].sample
    given_.add(counts["b"].sample)
    for side, sample in (("input", given_), ("output", made)):
        sizes = [size for row in rows if (size := getattr(row, side))]
        assert sum(size.characters for size in sizes) == sample.characters
        assert sum(size.model_tokens for size in sizes) == sample.model
        assert sum(size.baseline_tokens for size in sizes) == sample.baseline
    assert sum(row.output is not None for row in rows) == counts["ko"].texts


@pytest.mark.parametrize(
    ("model", "baseline", "tokens"),
    [(None, None, (None, None)), (len, None, (3, None)), (None, len, (None, 3))],
)
def test_tokens_that_nobody_counts_are_null(model: Any, baseline: Any, tokens: Any) -> None:
    counter = TextCounter(model, baseline, "auto")
    counts, rows = counter.count_rows({"ko": [None], "a": ["가"], "b": ["나다"]}, "ko")
    assert rows == [RowTexts(TextSize(3, *tokens), None)]
    assert counts["b"].characters == 2


def test_no_budget_stops_it() -> None:
    counter = TextCounter(len, len, "auto", clock=lambda: 0.0, work_clock=iter(range(999)).__next__)
    for _ in range(20):
        _, rows = counter.count_rows({"ko": ["a"] * 9, "en": ["b"] * 9}, "ko")
        assert rows == [RowTexts(TextSize(1, 1, 1), TextSize(1, 1, 1))] * 9


# --- runs ------------------------------------------------------------------------------------


def test_rows_of_two_lanes_done_twice_count_once(tmp_path: Path, size: Any) -> None:
    """Answers end at 60 words: of either lane some rows are rejected, and again in the retry."""
    job = a_job(
        tmp_path,
        task={
            "kind": "translate", "text": "en", "source": "en", "target": "ko",
            "overflow": "reject",
        },
        model={**ECHO, "context": "auto", "engine": {"max_model_len": 250}},
        sampling={"max_tokens": 60},
    )  # fmt: skip
    words = [3, None, 50, 90, 0, 130, 40, 300, 5000, 20]
    for name in ("a.parquet", "b.parquet"):
        texts = [None if count is None else f"{name} 안녕 " * count for count in words]
        job.write_input(name, pa.table({"en": texts}))
    lanes = job.run()["lanes"]
    assert [lane["name"] for lane in lanes] == ["native", "yarn"]
    check_rows(job, size)
    check_sums(job)
    before = rows_of(job)
    statuses = [row["_status"] for row in before]
    assert {"ok", "rejected"} == {*statuses}
    retry = job.start("retry", "--status", "rejected")
    assert retry.wait() == 0, retry.errors
    assert [row["_texts"] for row in rows_of(job)] == [row["_texts"] for row in before]
    assert [row["_usage"] for row in rows_of(job)] != [row["_usage"] for row in before]
    check_sums(job)


def fail_on_bad(body: Body) -> Reply:
    return error(500, "no") if "bad" in text_of(body) else answer(f"[{text_of(body)}]")


def test_a_mended_row_gets_its_output_and_keeps_its_input(tmp_path: Path, size: Any) -> None:
    with serving(OpenAIServer(fail_on_bad)) as server:
        model = {
            "id": "served", "backend": "http", "base_url": server.url,
            "engine": {"max_retries": 0},
        }  # fmt: skip
        job = a_job(tmp_path, model=model)
        texts = [None, "", "bad 나쁜 one", "good 좋은", "bad", "good", "bad", "안녕"]
        job.write_input("a.parquet", pa.table({"en": texts}))
        job.run()
        check_rows(job, size)
        check_sums(job)
        server.respond = lambda body: answer(f"[{text_of(body)}]")
        retry = job.start("retry")
        assert retry.wait() == 0, retry.errors
    assert [row["ko"] for row in rows_of(job)][2:] == [f"[{text}]" for text in texts[2:]]
    check_rows(job, size)
    check_sums(job)


def test_tokens_are_null_where_no_tokenizer_is_known(tmp_path: Path) -> None:
    with serving(OpenAIServer()) as server:
        model = {"id": "served", "backend": "http", "base_url": server.url}
        job = a_job(tmp_path, model=model, accounting={"rows": True, "baseline": None})
        job.write_input("a.parquet", pa.table({"en": ["안녕 you", None]}))
        job.run()
    unknown = {"model_tokens": None, "baseline_tokens": None}
    texts = [row["_texts"] for row in rows_of(job)]
    assert texts[0] == {
        "input": {"characters": 6, **unknown}, "output": {"characters": 4, **unknown},
    }  # fmt: skip
    assert texts[1] == {"input": None, "output": None}
    job.verify()


def test_input_is_all_that_the_task_reads(tmp_path: Path) -> None:
    prompt = "{{ a }}: {{ b | join(', ') }}"
    job = a_job(tmp_path, task={"kind": "prompt", "prompt": prompt})
    table = pa.table({"a": ["머리", None, "x"], "b": [["b", "cc"], ["d"], None], "c": ["not"] * 3})
    job.write_input("a.parquet", table)
    job.run()
    texts = [row["_texts"]["input"]["characters"] for row in rows_of(job)]
    assert texts == [2 + 3, 1, 1]
    check_sums(job)


def test_lines_of_a_batch_file_stay_as_its_format_has_them(tmp_path: Path) -> None:
    """Its rows' counts are in the Parquet file alone."""
    job = a_job(
        tmp_path,
        task={"kind": "openai-batch"},
        input={"path": str(tmp_path / "in"), "format": "openai-batch"},
    )
    body = {"model": "any", "messages": [{"role": "user", "content": "안녕"}]}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in").mkdir()
    (tmp_path / "in/r.jsonl").write_text(f"{json.dumps(line)}\n{{\n")
    job.run()
    check_sums(job)
    [done] = (job.output / "r_output.jsonl").read_text().splitlines()
    [failed] = (job.output / "r_error.jsonl").read_text().splitlines()
    for written in (done, failed):
        assert json.loads(written).keys() == {"id", "custom_id", "response", "error"}
    assert [row["_texts"]["output"] is None for row in rows_of(job)] == [False, True]


# --- what it may not be mixed with -----------------------------------------------------------


def test_files_with_and_without_counts_are_never_mixed(tmp_path: Path) -> None:
    a_job(tmp_path, accounting={}).write_input("a.parquet", pa.table({"en": ["a"]}))
    a_job(tmp_path, accounting={}).run()
    for command in ("run", "verify"):
        refused = a_job(tmp_path, accounting={"rows": True}).start(command)
        assert refused.wait() == 4
        assert "accounting.rows: was null, is true" in refused.errors.replace("\n", " ")
    assert "_texts" not in pq.read_table(tmp_path / "out/a.parquet").column_names


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"baseline": "cl100k_base"}, 'baseline: was "o200k_base", is "cl100k_base"'),
        ({"tokenizer": str(DEMO_MODEL)}, "tokenizer: was null, is "),
        ({"rows": False}, "rows: was true, is null"),
    ],
)
def test_other_tokenizers_make_other_columns(
    tmp_path: Path, job: Any, change: dict[str, Any], named: str
) -> None:
    output = Folder(str(tmp_path))
    before = job(tmp_path, accounting={"rows": True})
    record_job(output, before, identity_fields(before, {}))
    (tmp_path / "a.parquet").touch()
    after = job(tmp_path, accounting={"rows": True, **change})
    with pytest.raises(RefusedError) as refused:
        check_identity(output, identity_fields(after, {}))
    assert f"accounting.{named}" in str(refused.value.args[0])


def test_job_without_it_has_the_identity_it_had(job: Any, tmp_path: Path) -> None:
    plain: JobConfig = job(tmp_path)
    other: JobConfig = job(tmp_path, accounting={"baseline": None, "sample": 0.5})
    assert identity_fields(plain, {}) == identity_fields(other, {})
    assert not [name for name in identity_fields(plain, {}) if name.startswith("accounting")]


def job_from(**sections: Any) -> JobConfig:
    job = {
        "name": "test",
        "task": {"kind": "translate"},
        "input": {"path": "in"},
        "output": {"path": "out", "column": "ko"},
        "model": ECHO,
        **sections,
    }
    return parse_section(JobConfig, job, "job.yaml")


@pytest.mark.parametrize("sample", [0.0, 0.5])
def test_a_sample_of_every_row_is_refused(sample: float) -> None:
    for order in ({"rows": True, "sample": sample}, {"sample": sample, "rows": True}):
        with pytest.raises(JobFileError) as refused:
            job_from(accounting=order)
        assert str(refused.value.args[0]) == (
            "job.yaml: accounting.sample: `rows: true` counts all rows; leave `sample` out "
            f"(it is {sample})"
        )
    assert job_from(accounting={"rows": False, "sample": sample}).accounting.sample == sample


@pytest.mark.parametrize("sample", ["auto", 1, 1.0])
def test_all_rows_are_no_sample(sample: str | float) -> None:
    assert job_from(accounting={"rows": True, "sample": sample}).accounting.rows


def test_the_columns_name_is_taken_where_it_is_made(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    job.write_input("a.parquet", pa.table({"en": ["a"], "_texts": [1]}))
    refused = job.start("run")
    assert refused.wait() == 2 and "already has a column `_texts`" in refused.errors
    without = a_job(tmp_path, accounting={})
    without.run()
    assert rows_of(without)[0]["_texts"] == 1
    without.verify()
    with pytest.raises(JobFileError, match="a column of axbatch's own"):
        job_from(output={"path": "out", "column": "_texts"})


def test_verify_finds_counts_that_are_missing(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    job.write_input("a.parquet", pa.table({"en": ["a", "b"]}))
    job.run()
    path, stamp = job.output / "a.parquet", read_stamp(Folder(str(job.output)), "a.parquet")
    assert stamp is not None
    whole = pq.read_table(path).replace_schema_metadata({FOOTER_KEY: stamp.to_footer()})
    nothing = pa.array([{"input": None, "output": None}] * 2, TEXTS_TYPE)
    for spoilt, said in [
        (whole.drop_columns("_texts"), "has columns"),
        (whole.set_column(whole.num_columns - 1, "_texts", nothing), "`_texts` must count"),
    ]:
        pq.write_table(spoilt, path, write_page_checksum=True)
        rejected = job.start("verify")
        assert rejected.wait() != 0 and said in rejected.errors, rejected.errors
