"""The job file: every key, typed, with its meaning beneath it. Unknown keys are errors."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from pipeline.config.costs import AccountingConfig, ReportConfig
from pipeline.config.data import InputConfig, OutputConfig
from pipeline.config.model import ModelConfig, SamplingConfig
from pipeline.config.running import ClusterConfig, LimitsConfig, ScheduleConfig
from pipeline.config.section import Section


class JobConfig(Section):
    """One job file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Names the job on a cluster: letters, digits, dot, dash, underscore."""

    task: dict[str, Any]
    """What is done to a row: `kind` and that kind's own keys."""

    input: InputConfig
    output: OutputConfig
    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    cluster: ClusterConfig = ClusterConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    limits: LimitsConfig = LimitsConfig()
    accounting: AccountingConfig = AccountingConfig()
    report: ReportConfig = ReportConfig()

    @field_validator("task")
    @classmethod
    def _task_has_a_kind(cls, task: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(task.get("kind"), str):
            raise ValueError("needs a `kind`, for instance `kind: translate`")
        return task
