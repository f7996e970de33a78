"""Receipts on their way from a worker to the driver: JSON, as all that a worker answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pipeline.errors import error_from_json
from pipeline.meter import Reading
from pipeline.records import Counts, Receipt, Unit


def encode_receipts(receipts: Iterable[Receipt]) -> str:
    """Those of a bundle as JSON, a kilobyte or two each."""
    return json.dumps([_to_json(receipt) for receipt in receipts])


def decode_receipts(text: str) -> list[Receipt]:
    """The inverse of `encode_receipts`. Raises the AxbatchError that came in their place."""
    receipts = json.loads(text)
    if isinstance(receipts, dict):
        raise error_from_json(text)
    return [_from_json(fields) for fields in receipts]


def _to_json(receipt: Receipt) -> dict[str, Any]:
    unit = receipt.unit
    return {
        "unit": [unit.shard, unit.start, unit.stop],
        "counts": receipt.counts.to_json(),
        "worker": receipt.worker,
        "seconds": receipt.seconds,
        "engine": receipt.engine.to_json(),
    }


def _from_json(fields: dict[str, Any]) -> Receipt:
    counts = Counts.from_json(fields["counts"])
    engine = Reading.from_json(fields["engine"])
    return Receipt(Unit(*fields["unit"]), counts, fields["worker"], fields["seconds"], engine)
