"""Settings of ray.data.llm, each once, fastest last; `contestants.BEST_RAY_DATA` is one of them.

python -m tests.bench.sweep
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.contestants import ENVIRONMENT
from tests.bench.workloads import requests, write

ROWS = 512
NO_STAGES = {"tokenize_stage": False, "detokenize_stage": False}
"""The engine does this itself, in one process less for each."""
SETTINGS: list[dict[str, Any]] = [
    {},
    {"batch_size": 16, "max_concurrent_batches": 16},
    {"batch_size": 64, "max_concurrent_batches": 16},
    {"batch_size": 256, "max_concurrent_batches": 8},
    {"batch_size": 16, "max_concurrent_batches": 16, **NO_STAGES},
    {"batch_size": 64, "max_concurrent_batches": 16, **NO_STAGES},
]

RUN = """
import json, sys
from pathlib import Path
from tests.bench.contestants import ray_data
folder = Path(sys.argv[1])
(folder / "seconds").write_text(str(ray_data(folder, **json.loads(sys.argv[2]))))
"""


def running_s(settings: dict[str, Any]) -> float:
    """From the first request to the last answer."""
    with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as folder:
        write(Path(folder), requests("log-normal", ROWS))
        subprocess.run(
            [sys.executable, "-c", RUN, folder, json.dumps(settings)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
            env=os.environ | ENVIRONMENT,
        )  # fmt: skip
        return float((Path(folder) / "seconds").read_text())


if __name__ == "__main__":
    tried = [(running_s(settings), settings) for settings in SETTINGS]
    for seconds, settings in sorted(tried, key=lambda each: each[0], reverse=True):
        print(f"{seconds:6.1f} s {settings}")
