"""The task kinds, one file each. They touch neither Ray nor vLLM nor storage."""

from __future__ import annotations

import difflib
import pkgutil
import traceback
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import get_args

from pipeline.config import JobConfig
from pipeline.errors import JobFileError
from pipeline.job_file import parse_section
from pipeline.task import Task


def kinds() -> dict[str, str]:
    """`task.kind` -> module. A file here is a kind: openai_batch.py is `openai-batch`."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name.replace("_", "-"): f"{__name__}.{name}" for name in names}


def load_task(job: JobConfig, where: str = "job file") -> Task:
    """The task that `job` asks for; only its module is loaded. Raises JobFileError for an unknown
    kind or wrong keys."""
    kind, known = job.task["kind"], kinds()
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known kinds: {', '.join(known)}."
        raise JobFileError(f"{where}: task.kind: unknown kind `{kind}`", hint)
    task = parse_section(_class_of(known[kind], kind), job.task, where, prefix="task.")
    if task.input_format != job.input.format:
        raise JobFileError(
            f"{where}: input.format: is `{job.input.format}`, which kind `{kind}` does not read",
            f"Set `input.format: {task.input_format}`, or another `task.kind`.",
        )
    return task


def _class_of(module_name: str, kind: str) -> type[Task]:
    try:
        module = import_module(module_name)
    except Exception as error:
        raise _broken(module_name, error) from error
    tasks = (t for t in vars(module).values() if isinstance(t, type) and issubclass(t, Task))
    for task in tasks:
        if get_args(task.model_fields["kind"].annotation) == (kind,):
            if isabstract(task):
                lacks = ", ".join(sorted(task.__abstractmethods__))
                raise JobFileError(f"{module.__file__}: {task.__name__} lacks {lacks}")
            return task
    raise JobFileError(
        f"{module.__file__}: has no class for the kind `{kind}`",
        f'Derive one from `Task`, with the field `kind: Literal["{kind}"]`.',
    )


def _broken(module_name: str, error: Exception) -> JobFileError:
    """A kind's file that can't be imported: where, and why."""
    file, line = f"{module_name.replace('.', '/')}.py", 0
    if isinstance(error, SyntaxError):
        line = error.lineno or 0
    else:
        for frame in traceback.extract_tb(error.__traceback__):
            if Path(frame.filename).name == Path(file).name:
                line = frame.lineno or 0
    return JobFileError(f"{file}, line {line}: {type(error).__name__}: {error}", "Mend the file.")
