"""Requests to measure with: chat bodies whose answers have given lengths."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Body = dict[str, Any]

WORDS = ("order", "parcel", "delivery", "address", "customer", "weather", "tomorrow", "meeting",
         "train", "ticket", "price", "window", "winter", "library", "station", "museum", "kitchen",
         "morning", "evening", "coffee", "notice", "server", "update")  # fmt: skip
PROMPT_WORDS = (8, 40)
"""Fewest and most words of a prompt."""
PREFIX_WORDS = 256
LENGTHS = Path(__file__).parents[3] / "shared/data/lengths/ax31_tokens_per_generation.csv"
REAL_SCALE = 8
"""Real lengths are divided by this, to suit a small model and two cores."""


def body(prompt: str, tokens: int) -> Body:
    """A request whose answer has just so many tokens, whatever the model would say."""
    return {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0.0,
        "max_tokens": tokens,
        "ignore_eos": True,
    }


def sentence(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(WORDS, k=words))


def log_normal_length(
    dice: random.Random, median: float = 40, sigma: float = 0.8, low: int = 8, high: int = 512
) -> int:
    return min(high, max(low, round(dice.lognormvariate(math.log(median), sigma))))


def uniform(dice: random.Random, rows: int) -> list[Body]:
    """Short prompts, answers of 16 tokens."""
    return [body(sentence(dice, 12), 16) for _ in range(rows)]


def log_normal(dice: random.Random, rows: int) -> list[Body]:
    """Answers of 8 to 512 tokens, half of them under 40."""
    return [
        body(sentence(dice, dice.randint(*PROMPT_WORDS)), log_normal_length(dice))
        for _ in range(rows)
    ]


def real(dice: random.Random, rows: int) -> list[Body]:
    """Lengths in and out of A.X 3.1's published generations, scaled to the machine."""
    lines = LENGTHS.read_text(encoding="utf-8").splitlines()[1:]
    made = []
    for _ in range(rows):
        _, given, answered = dice.choice(lines).split(",")
        words = max(4, min(700, int(given) // REAL_SCALE))
        made.append(body(sentence(dice, words), max(1, min(512, int(answered) // REAL_SCALE))))
    return made


def prefixes(count: int) -> Callable[[random.Random, int], list[Body]]:
    """One of `count` prefixes of 256 words, then 12 of its own; answers of 16 tokens. Shuffled."""

    def make(dice: random.Random, rows: int) -> list[Body]:
        heads = [sentence(dice, PREFIX_WORDS) for _ in range(count)]
        return [body(f"{dice.choice(heads)} {sentence(dice, 12)}", 16) for _ in range(rows)]

    return make


def duplicates(dice: random.Random, rows: int) -> list[Body]:
    """As log_normal, three of ten exactly as an earlier one."""
    made: list[Body] = []
    for one in log_normal(dice, rows):
        made.append(dice.choice(made) if made and dice.random() < 0.3 else one)
    return made


def long_rows(dice: random.Random, rows: int) -> list[Body]:
    """Answers of 16 tokens, and of 256 once in fifty rows."""
    return [body(sentence(dice, 12), 256 if row % 50 == 40 else 16) for row in range(rows)]


WORKLOADS: dict[str, Callable[[random.Random, int], list[Body]]] = {
    "uniform short": uniform,
    "log-normal": log_normal,
    "real lengths": real,
    "8 prefixes": prefixes(8),
    "64 prefixes": prefixes(64),
    "30% duplicates": duplicates,
    "few long": long_rows,
}


def requests(name: str, rows: int) -> list[Body]:
    """The first of these are the same whatever `rows` is."""
    return WORKLOADS[name](random.Random(31), rows)


def write(folder: Path, bodies: Sequence[Body]) -> None:
    """As Parquet (in/rows.parquet) and as a Batch API file (rows.jsonl)."""
    (folder / "in").mkdir(parents=True)
    texts = [json.dumps(each) for each in bodies]
    pq.write_table(pa.table({"body": texts}), folder / "in/rows.parquet")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as lines:
        for number, each in enumerate(bodies):
            line = {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "bench", **each},
            }
            lines.write(json.dumps(line) + "\n")
