"""A row that kills or hangs every engine, on real vLLM: it alone fails, and the job goes on."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.demo_model.exam import held_out_sentences
from tests.faults.poison import POISON
from tests.runs import Job, engines_among

pytestmark = [
    pytest.mark.engine,
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.environ.get("AXBATCH_FAULTS") != "all", reason="takes minutes; see `make faults`"
    ),
]


@pytest.mark.parametrize("fault", ["Killer", "Hanger"])
def test_row_that_always_strikes_down_its_engine_fails_alone(tmp_path: Path, fault: str) -> None:
    texts = [sentence.en for sentence in held_out_sentences(96)]
    texts[40] = f"Your order {POISON} has been shipped."
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 64,
        "logits_processors": [f"tests.faults.poison:{fault}"],
    }
    job = Job(
        tmp_path,
        model={"id": "demo", "engine": engine},
        input={"path": str(tmp_path / "in"), "rows_per_unit": 32},
        limits={"max_failed_fraction": 0.1, "max_engine_silence_s": 15},
        sampling={"temperature": 0.0, "max_tokens": 256},
    )
    job.write_input("a.parquet", pa.table({"en": texts}))

    run = job.start("run", "--json")
    assert run.wait(1100) == 0, run.errors

    rows = pq.read_table(job.output / "a.parquet").to_pylist()
    assert (rows[40]["_status"], rows[40]["_reason"]) == ("failed", "engine_crash")
    others = [row["_reason"] for number, row in enumerate(rows) if number != 40]
    assert not [reason for reason in others if reason and "engine" in reason]
    assert job.verify()["statuses"]["failed"] == 1
    [log] = job.output.glob("_axbatch/logs/*.log")
    engines = log.read_text().count("Initializing a V1 LLM engine")
    print(f"{fault}: {engines} engines started")
    assert 2 <= engines <= 5
    assert not engines_among(psutil.Process().children(recursive=True))
