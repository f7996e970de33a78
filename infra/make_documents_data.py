"""Writes the sample inputs of the configs that extract, summarise, ask and prompt.

Run `python -m infra.make_documents_data`. No sentence of the notices and questions was in the demo
model's training; the orders are new mixtures of what was; what is asked of countries it was taught.
The same code gives the same files, byte for byte with the same pyarrow.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.demo_model import grammar
from infra.demo_model.extraction import ORDER, make_case
from infra.demo_model.questions import READING, read_facts
from infra.demo_model.summaries import make_case as make_notice

DATA_DIR = Path(__file__).resolve().parent.parent / "configs" / "data" / "documents"
SEED = 11  # training and exam have others

ROWS = 60
LONG_NOTICES = 40

LONG_ROWS = 24
NOTICES_BEHIND = {3: 16, 10: 24, 20: 60}
"""Row -> how many."""

FIELDS = ("customer", "item", "quantity", "price", "city", "delivery_date")
"""What every order tells."""


def orders(dice: random.Random) -> list[dict[str, Any]]:
    """Messages that place an order, in both languages."""
    schema = {"properties": dict.fromkeys(FIELDS)}
    texts = [make_case(ORDER, schema, dice).text for _ in range(ROWS)]
    return [{"id": number, "text": text} for number, text in enumerate(texts, 1)]


def notices(dice: random.Random) -> list[dict[str, Any]]:
    """Notices of which one sentence is the point, and one far too long for the model."""
    texts = [make_notice(dice, held_out=True)[0] for _ in range(ROWS)]
    texts[20] = "\n\n".join(make_notice(dice, held_out=True)[0] for _ in range(LONG_NOTICES))
    return [{"id": number, "text": text} for number, text in enumerate(texts, 1)]


def long(dice: random.Random) -> list[dict[str, Any]]:
    """Orders, some of them with so many notices behind that the model's own context, or even four
    times as much, can't hold them."""
    rows = orders(dice)[:LONG_ROWS]
    for row, count in NOTICES_BEHIND.items():
        behind = [make_notice(dice, held_out=True)[0] for _ in range(count)]
        rows[row]["text"] = "\n\n".join([rows[row]["text"], *behind])
    return rows


def questions(dice: random.Random) -> list[dict[str, Any]]:
    """Short texts, each with a question about what it names."""
    asked = [*islice(_reading_questions(dice), ROWS)]
    return [{"id": number, **row} for number, row in enumerate(asked, 1)]


def countries(dice: random.Random) -> list[dict[str, Any]]:
    """Countries, and what to say of each: the demo model knows both."""
    facts = [
        (country.en, fact) for country, _, _ in read_facts() for fact in ("capital", "currency")
    ]
    dice.shuffle(facts)
    rows = enumerate(facts, 1)
    return [{"id": number, "country": country, "fact": fact} for number, (country, fact) in rows]


def _reading_questions(dice: random.Random) -> Iterator[dict[str, Any]]:
    """Sentences that name one date, one city and so on, none of them seen in training."""
    while True:
        slot = dice.choice([*READING])

        def names_it(template: grammar.Template, slot: str = slot) -> bool:
            kinds = [name for name, _, _ in grammar.SLOT.findall(template.en)]
            return kinds.count(slot) == 1 and "{" + slot + "}" in template.en

        sentence = next(grammar.sentences(dice, held_out=True, of=names_it))
        yield {"text": sentence.en, "question": READING[slot].en}


FILES: dict[str, Callable[[random.Random], list[dict[str, Any]]]] = {
    "orders": orders,
    "notices": notices,
    "long": long,
    "questions": questions,
    "countries": countries,
}


def make_tables() -> dict[str, pa.Table]:
    """All files by name."""
    return {
        name: pa.Table.from_pylist(spoiled(make(random.Random(f"{SEED} {name}"))))
        for name, make in FILES.items()
    }


def spoiled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every real dataset has: nothing, and blanks."""
    for row, nothing in ((rows[7], None), (rows[15], " \n ")):
        row |= dict.fromkeys(row.keys() & {"text", "country"}, nothing)
    return rows


def main() -> None:
    """Write every file of `FILES`."""
    for name, table in make_tables().items():
        path = DATA_DIR / name / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        print(f"{name}: {table.num_rows} rows, {path.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
