"""The task kinds, one file each. They touch neither Ray nor vLLM nor storage."""

from __future__ import annotations

import difflib
from importlib import import_module

from pipeline.config import JobConfig
from pipeline.errors import JobFileError
from pipeline.job_file import parse_section
from pipeline.task import Task

KINDS = {"translate": "jobs.translate:Translate"}
"""`task.kind` -> module:class; modules load when their kind is asked for."""


def load_task(job: JobConfig, where: str = "job file") -> Task:
    """The task that `job` asks for. Raises JobFileError for an unknown kind or wrong keys."""
    kind = job.task["kind"]
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known kinds: {', '.join(KINDS)}."
        raise JobFileError(f"{where}: task.kind: unknown kind `{kind}`", hint)
    module, _, name = KINDS[kind].partition(":")
    task_class: type[Task] = getattr(import_module(module), name)
    return parse_section(task_class, job.task, where, prefix="task.")
