"""Whole runs, without Ray: the report counts what is in the files, each text once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.accounting import Usage
from pipeline.model import DEMO_MODEL
from pipeline.parts import read_stamp
from pipeline.storage import Folder
from tests.lanes_job import LanesJob
from tests.openai_server import Body, OpenAIServer, Reply, answer, serving, text_of
from tests.runs import Job


def report_of(job: Job) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((job.output / "_axbatch/report.json").read_bytes())
    return report


def sides(report: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What it says of the input's texts, and of the output's."""
    given, made = report["texts"]
    assert (given["role"], made["role"]) == ("input", "output")
    return given, made


def used(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    return {
        name: sum(row["_usage"][name] for row in rows) for name in Usage.__dataclass_fields__
    }  # fmt: skip


def test_each_text_of_two_lanes_counts_once_and_a_retry_counts_what_was_in_vain_again(
    tmp_path: Path,
) -> None:
    """Answers end at 200 words, so that some rows of both lanes are in vain."""
    job = LanesJob(tmp_path)
    limit = ("--set", "sampling.max_tokens=200", "--set", "accounting.sample=1.0")
    job.run(*limit)
    words = [len(row["en"].split()) for row in job.rows() if row["en"] is not None]
    for attempt in (1, 2):
        rows, report = job.rows(), report_of(job)
        vain = [row for row in rows if row["_status"] != "ok" and row["_usage"]["requests"]]
        given, made = sides(report)
        assert (given["texts"], given["counted"]) == (len(words), len(words))
        assert given["characters"] == sum(2 * count for count in words)
        assert given["model"] == dict.fromkeys(["low", "mid", "high"], sum(words))
        results = [row["ko"] for row in rows if row["_status"] == "ok"]
        assert (made["texts"], made["characters"]) == (len(results), sum(map(len, results)))
        assert report["tokens"]["wasted"]["not_ok"] == used(vain)
        assert report["tokens"]["wasted"]["cut"] == used(vain), "all of these were cut"
        assert {row["_usage"]["requests"] for row in vain} == {attempt} and len(vain) >= 3
        if attempt == 1:
            assert job.start("retry", "--status", "rejected", *limit).wait() == 0


def cut_bad(body: Body) -> Reply:
    code, content = answer(f"[{text_of(body)}]")
    assert isinstance(content, dict)
    if "bad" in text_of(body):
        content["choices"][0]["finish_reason"] = "length"
    return code, content


def test_mended_rows_keep_what_their_first_attempt_took(tmp_path: Path) -> None:
    with serving(OpenAIServer(cut_bad)) as server:
        model = {"id": "served", "backend": "http", "base_url": server.url}
        accounting = {"tokenizer": str(DEMO_MODEL), "sample": 1.0}
        job = Job(tmp_path, model=model, accounting=accounting, limits={"max_failed_fraction": 0.5})
        job.module = "tests.faults.without_ray"
        bad, good = [f"bad {row}" for row in range(3)], [f"good {row}" for row in range(7)]
        texts = [None, "", *bad, *good]
        job.write_input("a.parquet", pa.table({"en": texts}))
        job.run()
        before = report_of(job)
        server.respond = lambda body: answer(f"[{text_of(body)}]")
        retry = job.start("retry", "--reason", "truncated")
        assert retry.wait() == 0, retry.errors
    after, rows = report_of(job), pq.read_table(job.output / "a.parquet").to_pylist()
    assert [row["ko"] for row in rows[2:]] == [f"[{text}]" for text in texts[2:]]
    wasted = before["tokens"]["wasted"]
    assert wasted["not_ok"] == wasted["cut"] and wasted["cut"]["requests"] >= 3
    assert {**after["tokens"]["wasted"], "lost": None} == {**wasted, "lost": None}
    assert sides(after)[0] == sides(before)[0]
    assert (sides(before)[0]["texts"], sides(before)[0]["counted"]) == (11, 11)
    assert (sides(before)[1]["texts"], sides(after)[1]["texts"]) == (7, 10)
    assert after["tokens"]["requests"] == used(rows)["requests"] == before["tokens"]["requests"] + 3
    engine = after["tokens"]["engine"]
    assert engine["completion_tokens"] == used(rows)["completion_tokens"]
    assert sides(after)[1]["saving"] is not None


SHARED = Path(__file__).parents[2] / "shared" / "data"
MEASURED = SHARED / "o200k" / "token_efficiency_measured.json"
CORPORA = ("django_docs_ko", "ntrex128_en_ko", "openstack_ko")


def column_of(corpus: str, language: str) -> list[str]:
    text = (SHARED / "parallel" / f"{corpus}.tsv").read_text("utf-8")
    head, *lines = text.removesuffix("\n").split("\n")
    return [line.split("\t")[head.split("\t").index(language)] for line in lines]


@pytest.mark.skipif(not MEASURED.is_file(), reason="the corpora are not beside the checkout")
@pytest.mark.parametrize(("language", "other"), [("en", "ko"), ("ko", "en")])
def test_corpora_have_the_tokens_that_were_measured(
    tmp_path: Path, language: str, other: str
) -> None:
    """By tiktoken and transformers, see the folder's notes."""
    job = Job(
        tmp_path,
        task={"kind": "translate", "text": "text", "source": language, "target": other},
        output={"path": str(tmp_path / "out"), "column": "answer"},
        model={"id": "echo", "backend": "echo"},
        accounting={"tokenizer": str(SHARED / "ax31" / "A.X-3.1"), "sample": 1.0},
    )
    job.module = "tests.faults.without_ray"
    for corpus in CORPORA:
        job.write_input(f"{corpus}.parquet", pa.table({"text": column_of(corpus, language)}))
    job.run()

    measured = json.loads(MEASURED.read_bytes())
    expected = {corpus: measured[f"{corpus}/{language}"] for corpus in CORPORA}
    for corpus, numbers in expected.items():
        stamp = read_stamp(Folder(str(job.output)), f"{corpus}.parquet")
        assert stamp is not None
        for column in ("text", "answer"):
            counts = stamp.counts.account.texts[column]
            sample = counts.sample
            assert (counts.texts, counts.characters) == (numbers["rows"], numbers["chars"])
            assert (sample.baseline, sample.model) == (numbers["o200k"], numbers["ax31"])
    total = {
        name: sum(numbers[name] for numbers in expected.values())
        for name in ("rows", "chars", "ax31", "o200k")
    }
    for side in sides(report_of(job)):
        assert side["texts"] == side["counted"] == total["rows"]
        assert side["characters"] == total["chars"]
        assert side["model"] == dict.fromkeys(("low", "mid", "high"), total["ax31"])
        assert side["baseline"] == dict.fromkeys(("low", "mid", "high"), total["o200k"])
        assert side["saving"]["mid"] == 1 - total["ax31"] / total["o200k"]
        assert sum(script["texts"] for script in side["scripts"]) == total["rows"]
