"""What a prepared job is expected to take, and texts as they are met."""

from __future__ import annotations

import random

from jobs import load_task
from pipeline.forecast.estimate import estimate_job
from pipeline.forecast.figures import Estimate
from pipeline.task import Task
from tests.conftest import PreparedJob


def estimate(job: PreparedJob, task: Task | None = None) -> Estimate:
    return estimate_job(job.config, task or load_task(job.config), job.plan(), job.output)


def words(rng: random.Random, rows: int, mean: float = 3.0, spread: float = 0.8) -> list[str]:
    """Texts of log-normally many words."""
    return [" ".join(["word"] * max(1, int(rng.lognormvariate(mean, spread)))) for _ in range(rows)]
