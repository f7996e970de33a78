"""What several test files share: jobs prepared on disk, their files and parts, a real S3 server."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio
import s3fs
from hypothesis import settings

from jobs import load_task
from pipeline.accounting import Usage
from pipeline.config import JobConfig
from pipeline.config.model import ModelConfig
from pipeline.engine import Engine
from pipeline.generate import Ask
from pipeline.identity import identity_fields, identity_hash
from pipeline.merging import republish
from pipeline.model import DEMO_MODEL
from pipeline.parts import Stamp, commit_part, result_table
from pipeline.plan import Plan, make_plan
from pipeline.publishing import Publisher
from pipeline.records import Completion, Counts, Output, Receipt, Unit
from pipeline.retry import Retry, plan_retry
from pipeline.storage import Folder
from tests.runs import Run
from tests.shards import Shard

if TYPE_CHECKING:
    from tests.batches import Batch

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


def asking(engine: Engine) -> Ask:
    """Whatever is asked, the engine computes it at once."""

    async def ask(body: Mapping[str, Any]) -> tuple[Completion, bool]:
        return await engine.chat(body), False

    return ask


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


class PreparedJob:
    """A job on disk whose rows are done without an engine; `sections` as for `make_job`."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        self.folder = folder
        self.config = make_job(folder, **sections)
        self.output = Folder(self.config.output.path)

    def changed(self, **sections: dict[str, Any]) -> PreparedJob:
        """Another job on the same files."""
        return PreparedJob(self.folder, **sections)

    def write(self, name: str, data: pa.Table | dict[str, Any], **options: Any) -> Path:
        """An input file, as `write_table` writes it."""
        return write_table(self.folder / "in" / name, data, **options)

    def path(self, name: str) -> Path:
        """Of an output file."""
        return Path(self.output.url) / name

    def table(self, name: str) -> pa.Table:
        return pq.read_table(self.path(name))

    def plan(self) -> Plan:
        return make_plan_of(self.config)

    def plan_retry(self, status: str | None = None, reason: str | None = None) -> Plan:
        return plan_retry(self.plan(), self.output, Retry(status, reason))

    def commit(self, plan: Plan, unit: Unit, outputs: Sequence[Output] | None = None) -> None:
        """A unit of the plan, with `some_outputs` if none are given."""
        planned = next(shard for shard in plan.shards if shard.key == unit.shard)
        commit_unit(self.output, unit, plan.identity, planned.shard.fingerprint, outputs)

    def redo(self, plan: Plan, unit: Unit, text: str = "again") -> None:
        """Commit a unit of a retry, in which no row fails."""
        usage = Usage(1, 1, 1, 1)
        self.commit(plan, unit, [Output(f"{text} {n}", usage=usage) for n in range(unit.rows)])

    def publisher(self, plan: Plan, run: str = "run") -> Publisher:
        return Publisher(plan, self.output, load_task(self.config), "ko", run)

    def run(self, run: str = "run") -> Counts:
        """Commit and publish all that is pending, as the driver does."""
        plan = self.plan()
        with self.publisher(plan, run) as publisher:
            for shard in plan.shards:
                for unit in shard.units():
                    self.commit(plan, unit)
                    receipt = Receipt(unit, Counts(), "worker", 1.0)
                    publisher.received(receipt)
                    publisher.received(receipt)  # a lost worker's unit may come twice
        return publisher.counts

    def republish(self, plan: Plan, run: str = "second") -> None:
        """What a retry has done again."""
        for planned in plan.shards:
            shard = planned.shard
            assert shard.selected is not None
            republish(self.output, shard.name, shard.selected, planned.key, run)


@pytest.fixture(autouse=True)
def runs_end_with_their_test() -> Iterator[None]:
    """One that goes on would slow the tests after it, until these fail too."""
    before = len(Run.started)
    yield
    for run in Run.started[before:]:
        run.end()


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
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PreparedJob]:
    """Makes a job in a folder of its own, with an input file of these texts if any are given."""

    def make(texts: Sequence[str | None] | None = None, **sections: dict[str, Any]) -> PreparedJob:
        job = PreparedJob(tmp_path_factory.mktemp("job"), **sections)
        if texts is not None:
            job.write("a.parquet", {"text": texts})
        return job

    return make


@pytest.fixture(scope="session")
def published(prepared: Callable[..., PreparedJob]) -> Callable[[], PreparedJob]:
    """Makes a job with two published files of 60 rows, every seventh row rejected, some failed."""

    def make() -> PreparedJob:
        job = prepared(input={"rows_per_unit": 4})
        for name in ("a", "b"):
            texts = {"text": [f"{name} {row}" for row in range(60)]}
            job.write(f"{name}.parquet", texts, row_group_size=13)
        job.run("first")
        return job

    return make


@pytest.fixture
def shard(
    tmp_path: Path, commit: Callable[..., bool], outputs: Callable[..., list[Output]]
) -> Shard:
    return Shard(tmp_path, commit, outputs)


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    """A job on Batch API files."""
    from tests.batches import Batch  # with Ray, which most tests do without

    return Batch(tmp_path)


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
