"""Which Ray to talk to, and what Ray reads from the environment when it is imported."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config import JobConfig


def cluster_address(job: JobConfig) -> str | None:
    """The running cluster to use; None: start Ray on this machine."""
    return job.cluster.address or os.environ.get("RAY_ADDRESS")


def apply_ray_settings(remote: bool) -> None:
    """Call before ray is imported: it reads these once. What the user has set stays.

    `ray start` protects a cluster by a token, and its clients send theirs only in token mode.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # An actor without GPUs must not hide them from the engines of others.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    token_file = os.environ.get("RAY_AUTH_TOKEN_PATH", str(Path.home() / ".ray" / "auth_token"))
    if remote and ("RAY_AUTH_TOKEN" in os.environ or Path(token_file).is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
