"""Fixtures of the fault tests."""

from __future__ import annotations

from tests.faults.asking import asking_job, server
from tests.faults.ceph import ceph
from tests.faults.observed import observe

__all__ = ["asking_job", "ceph", "observe", "server"]
