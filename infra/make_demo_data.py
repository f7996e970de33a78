"""Writes the sample input of the demo job: the English sentences of the demo model's pairs.

Run `python infra/make_demo_data.py` after changing `pipeline/demo/pairs.tsv`. The same pairs give
the same files, byte for byte with the same pyarrow.
"""

import sys
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
DATA_DIR = ROOT / "configs" / "data"
PAIRS_FILE = ROOT / "pipeline" / "demo" / "pairs.tsv"

# Uneven on purpose: 128, 75, 60, 30 and 7 rows.
FILES = {
    "1-shop": ("order", "delivery", "return"),
    "2-catalogue": ("product", "notice"),
    "3-software": ("software",),
    "4-office": ("travel", "meeting"),
    "5-weather": ("weather",),
}
COLUMNS: dict[str, pa.DataType] = {
    "id": pa.int64(),
    "topic": pa.string(),
    "en": pa.string(),
    "tags": pa.list_(pa.string()),
    "created": pa.timestamp("ms"),
}
FIRST_DAY = datetime(2026, 1, 5, 9, 0)


def read_rows() -> list[dict[str, object]]:
    """One row for each pair, in file order; ids count from 1."""
    lines = PAIRS_FILE.read_text(encoding="utf-8").splitlines()[1:]
    return [make_row(number, *line.split("\t")) for number, line in enumerate(lines, start=1)]


def make_row(number: int, topic: str, en: str, ko: str) -> dict[str, object]:
    """The columns of one sentence, without its translation; one was created every 97 minutes."""
    return {
        "id": number,
        "topic": topic,
        "en": en,
        "tags": tags_of(topic, en),
        "created": FIRST_DAY + number * timedelta(minutes=97),
    }


def tags_of(topic: str, en: str) -> list[str]:
    """The topic, and what is special about the sentence."""
    marks = {
        "question": en.endswith("?"),
        "number": any(char.isdigit() for char in en),
        "placeholder": any(mark in en for mark in ("{", "%s", "%d")),
    }
    return [topic, *(name for name, present in marks.items() if present)]


def main() -> None:
    """Write every file of `FILES`."""
    rows = read_rows()
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    for name, topics in FILES.items():
        chosen = [row for row in rows if row["topic"] in topics]
        table = pa.Table.from_pylist(chosen, pa.schema(COLUMNS))
        pq.write_table(table, DATA_DIR / f"{name}.parquet")
        print(f"{name}.parquet: {table.num_rows} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
