"""Lanes: the engine with the model's own context, then, for what it deferred, one with a longer.

A row that doesn't fit the first lane and may not be cut is committed as deferred. When that lane
is through, the deferred rows of each shard become a shard of their own (as those of a retry do),
for an engine whose context is as long as the longest of them all needs and no longer: YaRN is
static in vLLM, so it changes the answers to short prompts too, and the more the larger its factor.
Publishing puts both lanes' results together.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.config import ModelConfig
from pipeline.errors import ModelError
from pipeline.model import read_config
from pipeline.parts import (
    PARTS,
    Overlay,
    missing_ranges,
    not_ok_rows,
    overlay_key,
    part_path,
    parts_among,
    read_stamp,
)
from pipeline.plan import Plan, ShardPlan
from pipeline.records import DEFERRED, Counts, Unit, counted_as
from pipeline.storage import Folder


@dataclass(frozen=True)
class Lane:
    """An engine setting."""

    name: Literal["native", "yarn"]
    model: ModelConfig
    """With the options that its engine is to have."""
    longest: int = 0
    """Tokens of context that the next lane may have; 0 where there is none."""
    factor: float = 1.0
    """Context as a multiple of the model's own."""


@dataclass(frozen=True)
class LaneUse:
    """What a lane did in a run."""

    lane: Lane
    counts: Counts = field(default_factory=Counts)

    def to_json(self) -> dict[str, Any]:
        lane = self.lane
        counts = self.counts.to_json()
        return {"name": lane.name, "factor": lane.factor, "engine": lane.model.engine, **counts}


def first_lane(model: ModelConfig) -> Lane:
    """Where all rows begin. Raises ModelError if the model can't be made longer."""
    match model.context:
        case "native":
            return Lane("native", model)
        case "auto":
            return Lane("native", model, longest=_longest(model))
        case "yarn":
            return yarn_lane(model, _longest(model))


def yarn_lane(model: ModelConfig, tokens: int) -> Lane:
    """The lane whose context holds `tokens`; its model is the same with the options that give it
    so much. Raises ModelError."""
    engine = {**model.engine, **model.yarn.engine, "max_model_len": tokens}
    own = own_context(model)
    # Rounded up, as vLLM refuses a `max_model_len` that is a hair above own * factor.
    factor = max(1.0, math.ceil(1000 * tokens / own) / 1000)
    if model.backend == "vllm" and factor > 1:
        engine["hf_overrides"] = yarn_overrides(read_config(model), own, factor)
    return Lane("yarn", model.model_copy(update={"engine": engine}), factor=factor)


def yarn_overrides(config: dict[str, Any], own: int, factor: float) -> dict[str, Any]:
    """What vLLM changes in the model's config.json. It takes the longer context only with
    `max_position_embeddings` beside the rope parameters (seen with vLLM 0.32, transformers 5)."""
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": own,
    }
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        rope["rope_theta"] = theta
    return {"rope_parameters": rope, "max_position_embeddings": math.ceil(own * factor)}


def own_context(model: ModelConfig) -> int:
    """Tokens that the model was made for. Raises ModelError if its configuration does not say, or
    says that it is stretched already."""
    if model.backend != "vllm":
        return int(model.engine.get("max_model_len", 32_768))
    config = read_config(model)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    own = config.get("max_position_embeddings")
    if kind != "default" or not isinstance(own, int):
        why = f"has rope type `{kind}`" if kind != "default" else "names no max_position_embeddings"
        raise ModelError(
            f"model.context: {model.id}: its config.json {why}, so YaRN can't be added",
            "Use `model.context: native`.",
        )
    return own


def _longest(model: ModelConfig) -> int:
    return int(own_context(model) * model.yarn.factor)


def plan_deferred(identity: str, waiting: Iterable[ShardPlan], output: Folder) -> Plan:
    """The deferred rows of these shards, whose own rows are all committed."""
    parts = parts_among(output.list(PARTS))

    def deferred(planned: ShardPlan) -> ShardPlan:
        rows = array("q", _deferred_rows(output, parts.get(planned.key, [])))
        key = overlay_key(planned.key, rows)
        shard = planned.shard
        before = shard.selected
        selected = array("q", (before[row] for row in rows)) if before is not None else rows
        count = len(rows)
        return ShardPlan(
            replace(shard, rows=count, row_groups=(count,), selected=selected),
            key,
            None,
            missing_ranges(count, parts.get(key, [])),
            completes=planned,
            overlay=Overlay(key, rows),
        )

    return Plan(identity, list(map(deferred, waiting)))


def _deferred_rows(output: Folder, parts: list[Unit]) -> Iterator[int]:
    """Positions of deferred rows. Parts may overlap; a row counts as merging takes it."""
    position = 0
    for unit in parts:
        if unit.stop <= position:
            continue
        stamp = read_stamp(output, part_path(unit))
        if stamp and stamp.counts.deferred:
            for row, counted in not_ok_rows(output, part_path(unit)):
                if counted == counted_as(DEFERRED, DEFERRED) and unit.start + row >= position:
                    yield unit.start + row
        position = unit.stop
