"""submit: hand a job to a running Ray cluster, under an id that only this job has."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import jobs
import pipeline
from pipeline.config import JobConfig
from pipeline.errors import ClusterError, RefusedError
from pipeline.filesystems import absolute_url
from pipeline.identity import absolute_model_id, absolute_options
from pipeline.imports import modules_in
from pipeline.ray_settings import apply_ray_settings
from pipeline.storage import Folder

PACKAGES = [Path(module.__file__ or "").parent for module in (pipeline, jobs)]
AFTER_GRACE_S = 10
"""What a driver needs to end once its workers have."""


@dataclass(frozen=True)
class Submitted:
    """A job that Ray has taken."""

    id: str
    address: str

    @property
    def follow(self) -> str:
        return f"ray job logs --follow --address {self.address} {self.id}"

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "address": self.address}


def submission_id(job: JobConfig) -> str:
    """Name and output folder make the id: a second job on the same output is the same job."""
    digest = hashlib.sha256(Folder(job.output.path).url.encode()).hexdigest()[:8]
    return f"axbatch-{re.sub(r'[^A-Za-z0-9_-]', '-', job.name)}-{digest}"


def submit_job(job: JobConfig, address: str | None) -> Submitted:
    """Submit `axbatch run` of this job, with the modules of the current directory that its task has
    imported. One that has ended may be submitted again; it resumes.

    Raises:
        ClusterError: no cluster answers at `address`.
        RefusedError: this job is queued or runs there already.
    """
    apply_ray_settings(remote=True)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if address:  # Ray prefers what these variables say
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        client = JobSubmissionClient(address)
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # it announces every upload
        where = client.get_address()
    except AuthenticationError as error:
        raise ClusterError(
            f"Ray at {address or 'the default address'} wants a token",
            "Put the cluster's token into RAY_AUTH_TOKEN, or into ~/.ray/auth_token.",
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"Ray at {address or 'the default address'}: {' '.join(str(error).split())[:200]}",
            "Give the dashboard's address: --address http://HOST:8265.",
        ) from error
    identifier = next_id(client, submission_id(job), where)
    with tempfile.TemporaryDirectory(prefix="axbatch-submit-") as folder:
        resolved = with_absolute_paths(job)
        Path(folder, "job.yaml").write_text(
            yaml.safe_dump(resolved.model_dump(), sort_keys=False, allow_unicode=True)
        )
        copy_own_modules(Path(folder))
        # What `ray job stop` waits before it kills; Ray's own 3 s are not enough to drain.
        stop_s = math.ceil(job.cluster.grace_s) + AFTER_GRACE_S
        try:
            client.submit_job(
                entrypoint=_entrypoint(),
                submission_id=identifier,
                runtime_env={
                    "working_dir": folder,
                    "py_modules": [str(package) for package in PACKAGES],
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_s)},
                },
            )
        except RuntimeError as error:
            # Ray decides between two who submit at the same moment.
            if "already exists" not in str(error):
                raise ClusterError(
                    f"Ray at {where}: {' '.join(str(error).split())[:200]}",
                    "A cluster that has just started needs some seconds; then submit again.",
                ) from error
            raise _active(identifier, where) from error
    return Submitted(identifier, where)


def copy_own_modules(folder: Path) -> None:
    """Where the job finds them as it does here: in its current directory."""
    for place in modules_in(Path.cwd()):
        if place.is_dir() and place not in PACKAGES:
            shutil.copytree(
                place, folder / place.name, ignore=shutil.ignore_patterns("__pycache__", ".*")
            )
        elif place.is_file():
            shutil.copy(place, folder)


def _entrypoint() -> str:
    """This environment's Python where the cluster has it too, else the first on its PATH."""
    python = shlex.quote(sys.executable)
    run = "-m pipeline.cli run job.yaml"
    return f"if [ -x {python} ]; then exec {python} {run}; else exec python {run}; fi"


def next_id(client: Any, base: str, address: str) -> str:
    """`base`, `base-2`, …: Ray never takes an id twice, and this job may have ended before.

    Two who submit at the same moment come to the same id; Ray takes one of them.
    """
    latest = 0
    for details in client.list_jobs():
        own = re.fullmatch(rf"{re.escape(base)}(?:-(\d+))?", details.submission_id or "")
        if own and not details.status.is_terminal():
            raise _active(own[0], address)
        if own:
            latest = max(latest, int(own[1] or 1))
    return f"{base}-{latest + 1}" if latest else base


def _active(identifier: str, address: str) -> RefusedError:
    return RefusedError(
        f"{identifier} is queued or running at {address} already",
        f"Follow it: ray job logs --follow --address {address} {identifier}; "
        f"stop it: ray job stop --address {address} {identifier}",
    )


def with_absolute_paths(job: JobConfig) -> JobConfig:
    """The same job from any working directory. Local paths must be shared with the cluster."""
    paths = [absolute_url(path) for path in job.input.paths]
    dataset = job.input.dataset
    if dataset is not None and Path(absolute_url(dataset)).is_dir():
        dataset = absolute_url(dataset)
    model, accounting = job.model, job.accounting
    yarn = model.yarn.model_copy(update={"engine": absolute_options(model.yarn.engine)})
    counted = {
        key: name and absolute_model_id(name)
        for key, name in (("tokenizer", accounting.tokenizer), ("baseline", accounting.baseline))
    }
    resolved = {
        "id": absolute_model_id(model.id),
        "engine": absolute_options(model.engine),
        "yarn": yarn,
    }
    return job.model_copy(
        update={
            "input": job.input.model_copy(update={"path": paths or None, "dataset": dataset}),
            "output": job.output.model_copy(update={"path": absolute_url(job.output.path)}),
            "model": model.model_copy(update=resolved),
            "accounting": accounting.model_copy(update=counted),
        }
    )
