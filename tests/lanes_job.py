"""A job of two lanes, and what is long in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.runs import Job

WORDS = {
    "a.parquet": [10, 300, 20, 1000, 5, None, 700, 3000],
    "b.parquet": [12, 14, 500],
    "c.parquet": [3, 4, 5, 6],
}
"""Words of each row. The first lane holds 119, the second 719."""
LONG = [300, 700, 500]
TOO_LONG = [1000, 3000]


class LanesJob(Job):
    """Two lanes of echo engines, without Ray."""

    module = "tests.faults.without_ray"

    def __init__(self, folder: Path, **keys: Any) -> None:
        model = {"id": "echo", "backend": "echo", "context": "auto"}
        super().__init__(
            folder,
            task={
                "kind": "translate", "text": "en", "source": "en", "target": "ko",
                "overflow": "reject",
            },
            input={"path": str(folder / "in"), "rows_per_unit": 2},
            model=model | {"engine": {"max_model_len": 400}} | keys,
            limits={"max_failed_fraction": 1.0},
        )  # fmt: skip
        for name, words in WORDS.items():
            texts = [None if count is None else "w " * count for count in words]
            self.write_input(name, pa.table({"en": texts, "n": range(len(texts))}))

    def rows(self) -> list[dict[str, Any]]:
        return [row for name in WORDS for row in pq.read_table(self.output / name).to_pylist()]
