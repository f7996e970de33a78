"""Settings of ray.data.llm, each once, fastest last; `contestants.BEST_RAY_DATA` is one of them.

python -m tests.bench.sweep
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.workloads import requests, write

ROWS = 512
BATCH_SIZES, CONCURRENT_BATCHES = (16, 64, 256), (4, 8, 16)

RUN = """
import json, sys
from pathlib import Path
from tests.bench.contestants import ray_data
ray_data(Path(sys.argv[1]), **json.loads(sys.argv[2]))
"""


def wall_s(settings: dict[str, Any]) -> float:
    with tempfile.TemporaryDirectory(prefix="axbatch-bench-") as folder:
        write(Path(folder), requests("log-normal", ROWS))
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-c", RUN, folder, json.dumps(settings)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        return time.monotonic() - began


if __name__ == "__main__":
    tried = [
        (wall_s(settings), settings)
        for batch_size, batches in itertools.product(BATCH_SIZES, CONCURRENT_BATCHES)
        for settings in [{"batch_size": batch_size, "max_concurrent_batches": batches}]
    ]
    for seconds, settings in sorted(tried, key=lambda each: each[0], reverse=True):
        print(f"{seconds:6.1f} s {settings}")
