"""What several test files share: a job, an input file, a committed part, a real S3 server."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio
import s3fs
from hypothesis import settings

from jobs import load_task
from pipeline.accounting import Usage
from pipeline.config import JobConfig, ModelConfig, identity_fields, identity_hash
from pipeline.model import DEMO_MODEL
from pipeline.parts import Stamp, commit_part, result_table
from pipeline.plan import Plan, make_plan
from pipeline.records import Counts, Output, Unit
from pipeline.storage import Folder

settings.register_profile("axbatch", deadline=None, database=None, max_examples=50)
settings.load_profile("axbatch")

START_S3 = Path(__file__).with_name("start_s3.sh")
CPU_OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 64}
"""Options of vLLM engines in tests."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two cores hold one engine at a time, and one other Ray cluster beside it: each kind keeps to
    one worker of pytest-xdist. They take longest, so they start first. `make test` leaves the slow
    ones to `make faults`."""
    order = {"engine": 0, "ray": 1, "": 2}

    def group(item: pytest.Item) -> str:
        return next((name for name in ("engine", "ray") if item.get_closest_marker(name)), "")

    for item in items:
        if group(item):
            item.add_marker(pytest.mark.xdist_group(group(item)))
        if item.get_closest_marker("slow") and os.environ.get("AXBATCH_FAULTS") != "all":
            item.add_marker(pytest.mark.skip(reason="takes minutes; see `make faults`"))
    items.sort(key=lambda item: order[group(item)])


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def demo() -> AsyncIterator[Any]:
    """The one engine that tests of answers share: the demo model, with tool calls."""
    from pipeline.engine.vllm import VllmEngine

    options = {**CPU_OPTIONS, "enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    engine = VllmEngine(ModelConfig(id=str(DEMO_MODEL), engine=options), cpus=2)
    yield engine
    engine.close()


def make_job(folder: Path, **changes: dict[str, Any]) -> JobConfig:
    """Translates folder/in/*.parquet into folder/out without a model; `changes` by section."""
    sections: dict[str, dict[str, Any]] = {
        "task": {"kind": "translate", "text": "text", "source": "en", "target": "ko"},
        "input": {"path": str(folder / "in")},
        "output": {"path": str(folder / "out"), "column": "ko"},
        "model": {"id": "echo", "backend": "echo"},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return JobConfig.model_validate({"name": "test", **sections})


def make_plan_of(job: JobConfig) -> Plan:
    """The plan that the command line would make."""
    task = load_task(job)
    return make_plan(job, task, identity_hash(identity_fields(job, task.identity())))


def write_table(path: Path, data: pa.Table | dict[str, Any], **options: Any) -> Path:
    """A Parquet file of `data`, a table or columns by name; `options` are Arrow's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(data) if isinstance(data, dict) else data
    pq.write_table(table, path, **options)
    return path


def some_outputs(shard: str, start: int, stop: int) -> list[Output]:
    """An output per row that names its row; every seventh row is rejected, some failed."""
    outputs = []
    for row in range(start, stop):
        usage = Usage(1, row, 0, 1)
        if row % 7 == 3:
            outputs.append(Output(None, "rejected", "too_long: 9 tokens of 8", usage))
        elif row % 11 == 5:
            outputs.append(Output(None, "failed", "engine_error", usage))
        else:
            outputs.append(Output(f"{shard}:{row}", usage=usage))
    return outputs


def commit_unit(
    output: Folder,
    unit: Unit,
    identity: str,
    fingerprint: str,
    outputs: Sequence[Output] | None = None,
) -> bool:
    """Commit the part of `unit` as a worker does, with `some_outputs` if none are given."""
    counts = Counts()
    outputs = outputs or some_outputs(unit.shard, unit.start, unit.stop)
    for row in outputs:
        counts.count(row)
    stamp = Stamp(identity, unit.shard, fingerprint, unit.start, unit.stop, counts, "run")
    return commit_part(output, stamp, result_table(outputs, "ko", pa.string()))


@pytest.fixture(scope="session")
def job() -> Callable[..., JobConfig]:
    return make_job


@pytest.fixture(scope="session")
def plan() -> Callable[[JobConfig], Plan]:
    return make_plan_of


@pytest.fixture(scope="session")
def write_parquet() -> Callable[..., Path]:
    return write_table


@pytest.fixture(scope="session")
def outputs() -> Callable[[str, int, int], list[Output]]:
    return some_outputs


@pytest.fixture(scope="session")
def commit() -> Callable[..., bool]:
    return commit_unit


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket on a real S3 server, which all xdist workers share: the first one starts it, the
    last one stops it."""
    if shutil.which("radosgw") is None:
        pytest.skip("no S3 server: Ceph's radosgw is not installed")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "s3"
    lock = folder.with_suffix(".users")

    def use(change: int) -> str:
        """Count the users under the lock; start before the first, stop after the last."""
        with lock.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before, _, endpoint = file.read().partition(" ")
            users = int(before or 0) + change
            if not before or before == "0":
                shutil.rmtree(folder, ignore_errors=True)
                endpoint = _run("start", folder)
            elif users == 0:
                _run("stop", folder)
            file.truncate(0)
            file.write(f"{users} {endpoint}")
        return endpoint

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", use(+1))
        environment.setenv("AWS_ACCESS_KEY_ID", "testkey")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            bucket = f"axbatch-{os.getpid()}"
            s3fs.S3FileSystem().mkdir(bucket)
            yield f"s3://{bucket}"
        finally:
            use(-1)


def _run(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", START_S3, command, folder],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
