"""Texts of rows in a report: only where samples are asked for, and as text."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import pipeline.cluster
import pipeline.report.reporter
from pipeline.errors import Interrupted
from pipeline.report.document import _quoted
from pipeline.report.tables import _shown
from pipeline.retry import Retry
from tests.faults.without_ray import receipts_here
from tests.reporting.conftest import Job, fail_on, in_one_thread, stop_after


def own_files(job: Job) -> dict[str, str]:
    """All beside the output files, but for the run's log."""
    entries = [entry.path for entry in job.output.list("_axbatch")]
    return {path: job.output.read(path).decode() for path in entries if "/logs/" not in path}


@pytest.mark.parametrize("samples", [0, 3])
def test_row_text_is_in_the_report_only_where_samples_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    job = Job(tmp_path, report={"samples": samples})
    for name in "ab":
        job.write(
            f"{name}.parquet",
            [f"text quoxel-{name}{n}-end {'word ' * (n % 5)}" if n else None for n in range(30)],
        )
    fail_on(monkeypatch, lambda text: "5-end" in text)
    monkeypatch.setattr(pipeline.report.reporter, "EVERY_S", 0.0)
    in_one_thread(monkeypatch)
    stop_after(monkeypatch, 12, Interrupted())
    with pytest.raises(Interrupted):
        job.run()
    monkeypatch.setattr(pipeline.cluster, "receipts", receipts_here)
    job.run()
    job.run(Retry("failed", None))
    files = own_files(job)
    quoting = {path for path, text in files.items() if "quoxel" in text}
    assert {"_axbatch/report.json", "_axbatch/report.html", "_axbatch/plan.json"} <= {*files}
    assert len(job.records()) == 3
    if not samples:
        assert not quoting and not job.report["samples"]
        return
    assert quoting == {"_axbatch/report.json", "_axbatch/report.html"}
    shown = job.report["samples"]
    assert [(each["file"], each["row"]) for each in shown] == [
        ("a.parquet", 0), ("a.parquet", 1), ("b.parquet", 0),
    ]  # fmt: skip
    texts = shown[1]["texts"]
    assert texts[0] == ["text", "text quoxel-a1-end word "]
    assert texts[1][0] == "ko" and "quoxel-a1-end" in texts[1][1]
    markers = {word for word in job.text("report.html").split() if word.startswith("quoxel-")}
    assert markers == {"quoxel-a1-end"}, "the others' texts are null"


def test_names_with_html_in_them_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, report={"samples": 2})
    name = "<script>alert('1')<&\">.parquet"
    job.write(name, ["<script>alert(2)", None, "</script> x"])
    fail_on(monkeypatch, lambda text: text.endswith("x"))
    job.run()
    job.check(job.report)
    examples = {row["file"] for each in job.report["reasons"] for row in each["examples"]}
    assert examples == {name}
    page = job.text("report.html")
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;1&#39;)" in page and "&lt;script&gt;alert(2)" in page


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (pa.scalar(9_999_999, pa.date32()), "(no value in Python)"),
        (pa.array([b"\xff"]).view(pa.string())[0], "(not UTF-8)"),
    ],
)
def test_what_python_cannot_hold_is_said_so(value: pa.Scalar, shown: str) -> None:
    assert _quoted(value) == _shown(value) == shown
