"""A job whose engine is a server in the test's process: it outlives every fault, and so it knows
which rows were asked for more than once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.s3 import PatientS3
from pipeline.storage import Folder
from tests.faults.observed import Observer
from tests.openai_server import Body, OpenAIServer, Reply, answer, serving, text_of
from tests.runs import TIMEOUT_S, Job, Run

ROWS = 600
AT_ONCE = 16
LATENCY_S = 0.1


def slowly(body: Body) -> Reply:
    time.sleep(LATENCY_S)  # as long as an engine takes
    return answer(f"<{text_of(body)}>")


class AskingJob(Job):
    """Has rows in two files answered by `server`, 16 at once, in units of 16."""

    def __init__(
        self,
        folder: Path,
        server: OpenAIServer,
        observe: Observer,
        rows: int = ROWS,
        **sections: Any,
    ) -> None:
        model = {
            "id": "served",
            "backend": "http",
            "base_url": server.url,
            "engine": {"max_num_seqs": AT_ONCE},
        }
        source = {"path": str(folder / "in"), "rows_per_unit": AT_ONCE}
        super().__init__(folder, **{"model": model, "input": source, **sections})
        self.server = server
        self._observe = observe
        self._rows = rows
        for name, start, stop in (("a", 0, rows // 3), ("b", rows // 3, rows)):
            ids = range(start, stop)
            texts = [f"text {row}" for row in ids]
            self.write_input(f"{name}.parquet", pa.table({"id": ids, "en": texts}))

    def start_and_do(self, rows: int) -> Run:
        """A run that has asked for so many rows."""
        run = self.start("run")
        self.wait_until_asked(rows, run)
        return run

    def see_end(self, run: Run, injected: str, promised: str, before: Run | None = None) -> None:
        """The run goes on, and all ends well. `before` has ended with what it says to the user."""
        recovered_s = self.wait_until_asked(len(self.server.bodies) + 1, run)
        assert run.wait() == 0, run.errors
        self.see_output(injected, promised, [before, run] if before else [run], recovered_s)

    def see_output(
        self, injected: str, promised: str, runs: Sequence[Run], recovered_s: float | None = None
    ) -> None:
        """Prove it, and note what was seen of these runs, which have ended."""
        assert self.verify()["rows"] == self._rows
        asked = self.server.asked
        said = [self._said(run) for run in runs if run.wait() != 0]
        self._observe(
            injected,
            promised,
            given=range(self._rows),
            made=self.ids(),
            redone=len(asked) - len(set(asked)),
            recovered_s=recovered_s,
            exits=[run.wait() for run in runs],
            said=said[0] if said else "",
        )

    def ids(self) -> list[int]:
        """Of all published rows, each of which has its own answer."""
        folder, ids = Folder(self.sections["output"]["path"]), list[int]()
        for entry in folder.list():
            if not entry.path.startswith("_axbatch/"):
                for row in pq.read_table(pa.BufferReader(folder.read(entry.path))).to_pylist():
                    assert row["ko"] == f"<{row['en']}>", row
                    ids.append(row["id"])
        return ids

    def _said(self, run: Run) -> str:
        line = run.errors.partition("\n")[0]
        return line.removeprefix("axbatch: ").replace(f"{self.folder}/", "")

    def wait_until_asked(self, count: int, run: Run) -> float:
        """Seconds until the server has been asked for so many rows in all."""
        began = time.monotonic()
        while len(self.server.bodies) < count:
            run.check_lives()
            passed = time.monotonic() - began
            assert passed < TIMEOUT_S, f"asked {len(self.server.bodies)}: {run.errors}"
            time.sleep(0.01)  # the server's threads count, and tell nobody
        return time.monotonic() - began


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with serving(OpenAIServer(slowly)) as running:
        yield running


@pytest.fixture
def asking_job(tmp_path: Path, server: OpenAIServer, observe: Observer) -> Callable[..., AskingJob]:
    """Makes the job, with these sections."""
    PatientS3.clear_instance_cache()  # which knows another test's server

    def make(**sections: Any) -> AskingJob:
        return AskingJob(tmp_path, server, observe, **sections)

    return make
