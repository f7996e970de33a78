"""`cluster`, `schedule` and `limits`: where a job runs, in which order, and when that is bad."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section

Accelerator = Literal["H100", "H200", "A100", "L40S", "B200"]


class ReplicaRange(Section):
    """An elastic number of replicas."""

    min: int = Field(1, ge=1)
    """Start with so many."""

    max: int = Field(ge=1)
    """Grow to so many while there is work."""

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError("`min` is larger than `max`")
        return self


class ClusterConfig(Section):
    """Where it runs. Nothing here changes the output."""

    replicas: int | ReplicaRange = 1
    """Engines, each on tensor_parallel_size x pipeline_parallel_size GPUs: a number, or min/max."""

    address: str | None = None
    """A running Ray cluster; null: the environment's RAY_ADDRESS, else Ray on this machine."""

    grace_s: float = Field(20.0, ge=0)
    """After SIGTERM no unit begins, and those that have begun have so many seconds to end. Less
    than what the machine leaves: Kubernetes 30, a spot notice 120."""

    wait_s: float = Field(0.0, ge=0)
    """On a cluster that grows by itself: so many seconds for the GPUs of the fewest replicas, which
    it is asked for. 0: those that are there must do."""

    accelerator: Accelerator | None = None
    """The GPUs' type, for what `axbatch plan` says of room, time and cost."""

    cpus_per_replica: int | None = Field(None, ge=1)
    """CPUs of an engine without GPU; null: this machine's cores shared among the replicas."""

    @field_validator("replicas")
    @classmethod
    def _at_least_one(cls, replicas: int | ReplicaRange) -> int | ReplicaRange:
        if isinstance(replicas, int) and replicas < 1:
            raise ValueError("must be at least 1")
        return replicas

    @property
    def range(self) -> ReplicaRange:
        if isinstance(self.replicas, ReplicaRange):
            return self.replicas
        return ReplicaRange(min=self.replicas, max=self.replicas)


class ScheduleConfig(Section):
    """In which order a replica computes, and what it need not. Changes no answer."""

    longest_first: bool = True
    """Of the requests that wait for a replica's engine, the longest goes first: a long one that
    comes last is computed alone."""

    reuse_answers: bool = True
    """A request that a replica has had before, letter for letter, is not computed again, if it is
    greedy or has a seed. The copy's `_usage` is 0."""


class LimitsConfig(Section):
    """When the outcome counts as bad, and when an engine does."""

    max_failed_fraction: float = Field(0.01, ge=0, le=1)
    """Most rows that may end not ok, as a share of all; above it the exit code is 3."""

    max_engine_silence_s: float = Field(600.0, gt=0)
    """vllm: an engine that has work and makes no token for so long hangs, and is replaced."""
