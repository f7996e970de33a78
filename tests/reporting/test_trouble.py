"""Whatever happens to the report, the run goes on, and says what it would have said."""

from __future__ import annotations

from typing import Any

import pytest

import pipeline.report.reporter
from pipeline.errors import Interrupted, StorageError
from pipeline.storage import Folder
from tests.reporting.conftest import Job, stop_after

TROUBLES = {
    "storage": StorageError("s3://x: no answer", "Wait."),
    "a missing file": FileNotFoundError("gone"),
    "a bug": ZeroDivisionError("division by zero"),
}


@pytest.mark.parametrize(
    ("where", "trouble"),
    [*(("report", trouble) for trouble in TROUBLES), ("runs", "storage"), ("plan", "storage")],
)
def test_trouble_with_the_report_is_told_and_changes_no_run(
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: str,
    where: str,
) -> None:
    replace_file = Folder.replace

    def refuse(self: Folder, path: str, data: bytes) -> None:
        if path.startswith(f"_axbatch/{where}"):
            raise TROUBLES[trouble]
        replace_file(self, path, data)

    monkeypatch.setattr(Folder, "replace", refuse)
    monkeypatch.setattr(pipeline.report.reporter, "EVERY_S", 0.0)
    summary = job.run()
    assert (summary.exit_code, summary.state, summary.counts.rows) == (0, "done", 31)
    said = capsys.readouterr()
    assert "axbatch: the report" in said.err and "Traceback" not in said.err
    error = TROUBLES[trouble]
    is_ours = isinstance(error, StorageError)
    assert (str(error) in said.err) == is_ours, "another's message may quote a row"
    assert is_ours or f"{type(error).__name__} in test_trouble.py, line " in said.err
    assert "the report" not in said.out, "which may be a program's JSON"

    monkeypatch.setattr(Folder, "replace", replace_file)
    job.check(job.write_report())


def test_trouble_with_the_report_does_not_hide_what_ended_the_run(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(report: dict[str, Any]) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline.report.reporter, "render_page", bug)
    stop_after(monkeypatch, 2, Interrupted())
    with pytest.raises(Interrupted) as ended:
        job.run()
    assert ended.value.__context__ is None
    assert job.read("runs/run-001.json")["state"] == "interrupted"


def test_half_a_character_in_a_report_is_no_trouble(job: Job) -> None:
    job.run()
    report = {**job.report, "name": "caf\udce9"}  # as Python reads a file's name in Latin-1
    pipeline.report.reporter.store_report(report, job.output)
    assert job.report == report
    assert "caf\ufffd" in job.text("report.html")
