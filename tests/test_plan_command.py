"""What `axbatch plan` prints of what a job will take, and `validate` of one that is right."""

import json
import random
from collections.abc import Callable

import pytest

from pipeline.cli import main
from tests.conftest import PreparedJob
from tests.forecasts import words

Prepare = Callable[..., PreparedJob]


def job_file(job: PreparedJob) -> str:
    file = job.folder / "job.yaml"
    file.write_text(job.config.model_dump_json(exclude_none=True))
    return str(file)


def test_an_unreadable_model_leaves_what_rows_alone_say(
    prepared: Prepare, capfd: pytest.CaptureFixture[str]
) -> None:
    nowhere = {"id": "/nowhere/at/all", "backend": "vllm"}
    file = job_file(prepared(["one", "one", "three"], model=nowhere))
    assert main(["plan", "--json", file]) == 0
    found = json.loads(capfd.readouterr().out)["estimate"]
    assert found["prompt"] is None and found["characters"]["mid"] == 11
    assert found["duplicates_at_least"] == pytest.approx(1 / 3)
    [line] = found["missing"]
    assert line.startswith("tokens, time and cost: ") and "no such folder" in line
    assert main(["plan", file]) == 0
    assert "no such folder" in " ".join(capfd.readouterr().out.split())


def test_plan_is_shown_with_what_it_takes(
    prepared: Prepare, capfd: pytest.CaptureFixture[str]
) -> None:
    prices = {"input": 1.0, "output": 4.0}
    accounting = {"prices": prices, "compare": [{"name": "Other", **prices}]}
    texts = [None, *words(random.Random(2), 999)]
    job = prepared(texts, accounting=accounting, limits={"max_failed_fraction": 0.0})
    assert main(["plan", job_file(job)]) == 0
    out = capfd.readouterr().out
    for label in ("tokens in", "tokens out", "lanes", "cost", "compared", "Other"):
        assert label in out
    assert not (job.folder / "out").exists()


def test_validate_answers_programs_too(
    prepared: Prepare, capfd: pytest.CaptureFixture[str]
) -> None:
    file = job_file(prepared(["one", None]))
    assert main(["validate", file]) == 0
    assert "valid; 2 rows in 1 file(s)" in capfd.readouterr().out
    assert main(["validate", "--json", file]) == 0
    assert json.loads(capfd.readouterr().out) == {"valid": True, "rows": 2, "files": 1}
