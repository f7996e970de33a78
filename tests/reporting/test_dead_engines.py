"""What a dead engine's worker leaves for the ledger is told in the run's record, then dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import pipeline.cluster
from pipeline.accounting import Usage
from pipeline.errors import StorageError
from pipeline.ledger import ENGINES, leave_reading
from pipeline.meter import Reading
from pipeline.plan import Plan
from pipeline.records import Receipt
from pipeline.storage import Folder
from tests.faults.without_ray import receipts_here
from tests.reporting.conftest import Job


@pytest.mark.parametrize("may_delete", [True, False])
def test_readings_are_dropped_once_the_record_is_written(
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    may_delete: bool,
) -> None:
    used = Usage(9, 900, 0, 90)

    def receipts(plan: Plan, columns: list[str], spec: Any) -> Iterator[Receipt]:
        leave_reading(spec.output, spec.run, "host:1", Reading(used, 0.0, 0.0))
        yield from receipts_here(plan, columns, spec)

    delete_folder = Folder.delete_folder

    def delete(self: Folder, path: str) -> None:
        if path.startswith(ENGINES):
            [record] = job.records()
            assert f'"requests": {used.requests}' in job.text(record.removeprefix("_axbatch/"))
            if not may_delete:
                raise StorageError("access denied")
        delete_folder(self, path)

    monkeypatch.setattr(pipeline.cluster, "receipts", receipts)
    monkeypatch.setattr(Folder, "delete_folder", delete)
    assert job.run().exit_code == 0
    assert job.report["tokens"]["wasted"]["lost"]["requests"] == used.requests
    assert [*map(bool, job.output.list(ENGINES))] == ([] if may_delete else [True])
    assert ("readings of dead engines stay: access denied" in capsys.readouterr().err) != may_delete
