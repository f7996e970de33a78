"""Receipts on their way from a worker to the driver: JSON, as all that a worker answers."""

from __future__ import annotations

import json

from pipeline.errors import error_from_json
from pipeline.meter import Reading
from pipeline.records import Counts, Receipt, Unit

NOT_BEGUN = "null"
"""In the place of a receipt: the run drains."""


def encode_receipt(receipt: Receipt) -> str:
    """A receipt as JSON, a kilobyte or two."""
    unit = receipt.unit
    return json.dumps({
        "unit": [unit.shard, unit.start, unit.stop],
        "counts": receipt.counts.to_json(),
        "worker": receipt.worker,
        "seconds": receipt.seconds,
        "engine": receipt.engine.to_json(),
    })  # fmt: skip


def decode_receipt(text: str) -> Receipt | None:
    """The inverse of `encode_receipt`; None for a unit that was not begun. Raises the AxbatchError
    that came in its place."""
    if text == NOT_BEGUN:
        return None
    fields = json.loads(text)
    if "error" in fields:
        raise error_from_json(text)
    counts = Counts.from_json(fields["counts"])
    engine = Reading.from_json(fields["engine"])
    return Receipt(Unit(*fields["unit"]), counts, fields["worker"], fields["seconds"], engine)
