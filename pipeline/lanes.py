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
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.config.model import ModelConfig
from pipeline.engine import DEFAULT_CONTEXT, check_engine
from pipeline.errors import ModelError
from pipeline.model import read_config, resolve_model
from pipeline.parts import (
    PARTS,
    Overlay,
    missing_ranges,
    overlay_key,
    parts_among,
)
from pipeline.plan import Plan, ShardPlan, find_deferred
from pipeline.records import Counts
from pipeline.shards import UNIT_BYTES
from pipeline.storage import Folder

BYTES_PER_TOKEN = 4
"""Of prose, about; Korean has more."""


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
    is_second: bool = False
    """Whether it is there for what another lane deferred."""

    @property
    def title(self) -> str:
        """For people."""
        return f"yarn x{self.factor:.2g}" if self.name == "yarn" else self.name


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
            return yarn_lane(model, int(model.engine.get("max_model_len", _longest(model))))


def check_lanes(model: ModelConfig) -> None:
    """What can be known of every lane's engine without starting it: a mistake in the second is not
    to show when the first is through. Raises JobFileError, ModelError, EngineError."""
    lane = first_lane(model)
    for each in [lane, yarn_lane(model, lane.longest)] if lane.longest else [lane]:
        resolve_model(each.model)
        check_engine(each.model)


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
        **(config.get("rope_parameters") or {}),
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": own,
    }
    if "rope_theta" in config:  # as models of transformers 4 have it
        rope.setdefault("rope_theta", config["rope_theta"])
    return {"rope_parameters": rope, "max_position_embeddings": math.ceil(own * factor)}


def own_context(model: ModelConfig) -> int:
    """Tokens that the model was made for. Raises ModelError if its configuration does not say, or
    says that it is stretched already."""
    if model.backend != "vllm":
        return int(model.engine.get("max_model_len", DEFAULT_CONTEXT))
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


def deferred_unit(longest: int) -> int:
    """Rows of a unit of deferred rows, of which the longest has so many tokens: as large as those
    of other rows, in bytes."""
    return max(1, UNIT_BYTES // (BYTES_PER_TOKEN * longest))


def plan_deferred(
    identity: str, waiting: Iterable[ShardPlan], output: Folder, longest: int
) -> Plan:
    """The deferred rows of these shards, whose own rows are all committed. `longest` is the tokens
    of the longest."""
    rows_per_unit = deferred_unit(longest)
    waiting, parts = list(waiting), parts_among(output.list(PARTS))
    rows_of = find_deferred(waiting, output, parts)

    def deferred(planned: ShardPlan) -> ShardPlan:
        rows = rows_of[planned.key]
        key = overlay_key(planned.key, rows)
        shard = planned.shard
        before = shard.selected
        selected = array("q", (before[row] for row in rows)) if before is not None else rows
        count = len(rows)
        return ShardPlan(
            replace(
                shard,
                rows=count,
                row_groups=(count,),
                selected=selected,
                rows_per_unit=min(shard.rows_per_unit, rows_per_unit),
            ),
            key,
            None,
            missing_ranges(count, parts.get(key, [])),
            completes=planned,
            overlay=Overlay(key, rows),
        )

    return Plan(identity, list(map(deferred, waiting)))
