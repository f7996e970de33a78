"""Fixtures of the fault tests, and which of them `make test` leaves to `make faults`."""

from __future__ import annotations

import os

import pytest

from tests.faults.asking import asking_job, server
from tests.faults.ceph import ceph
from tests.faults.observed import observe

__all__ = ["asking_job", "ceph", "observe", "server"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("AXBATCH_FAULTS") == "all":
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; see `make faults`"))
