"""What would make a job cheaper, faster or less likely to end badly: a line each, with the key."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pipeline.config import JobConfig
from pipeline.engine.vllm import DEFAULT_OPTIONS
from pipeline.forecast.figures import Estimate, Room, TokenEstimate
from pipeline.wording import percent

MOSTLY = 0.9
"""Share of rows from which the others are the exception."""
MANY_DUPLICATES = 0.1
MANY_DECOMPOSED = 0.01
ROWS_COMPARED = 64
"""From which a share of duplicates says something."""
DOMINANT = 0.5
"""Share of the prompts that is the same in all, from which it is most of the work."""
MANY_CUT = 0.01
"""Share of answers; limits.max_failed_fraction has the same default."""
SMALL_BATCH = 8_192
"""Tokens of a step below which a GPU reads weights more often than it need."""
MOST_AT_ONCE = 1_024
"""Requests: more gain nothing on short rows, and take room from the prefix cache."""
ROOMIER = 1.5
"""How many times more the KV cache must hold than is allowed, to be worth a line."""


def advise(job: JobConfig, estimate: Estimate) -> list[str]:
    """What to change, most money first. Says nothing about what is not known."""
    lines = [*_of_rows(estimate)]
    if estimate.tokens:
        lines += _of_lanes(job, estimate.tokens)
        if estimate.room:
            lines += _of_room(estimate.room)
        lines += _of_answers(job, estimate, estimate.tokens)
        lines += _of_prompts(job, estimate.tokens)
        lines += _of_limits(job, estimate, estimate.tokens)
    return lines


def _of_rows(estimate: Estimate) -> Iterator[str]:
    if estimate.duplicates >= MANY_DUPLICATES and estimate.sampled >= ROWS_COMPARED:
        share = percent(estimate.duplicates)
        yield (
            f"at least {share} of the rows are repeated: put each into the input once, and join "
            "the results to the others"
        )
    if estimate.decomposed >= MANY_DECOMPOSED:
        yield (
            f"{percent(estimate.decomposed)} of the rows are not NFC (text from macOS, say): they "
            "are sent as NFC here; elsewhere, a tokenizer that does not normalise may need ten "
            "times the tokens for them"
        )


def _of_lanes(job: JobConfig, tokens: TokenEstimate) -> Iterator[str]:
    fit = tokens.fits_native
    if job.model.context == "yarn" and fit is not None and fit >= MOSTLY:
        yield (
            f"`model.context: yarn` stretches the context for all rows, and {percent(fit)} of them "
            "fit the model's own: with `auto`, only the others pay for it"
        )


def _of_room(room: Room) -> Iterator[str]:
    engine, fit, is_yarn = room.lane.model.engine, room.fit, room.lane.name == "yarn"
    key = "model.yarn.engine" if is_yarn else "model.engine"
    needed, tensor = room.smallest_tensor_parallel, int(engine.get("tensor_parallel_size", 1))
    if not fit.starts:
        if needed and needed > tensor:
            yield f"`{key}.tensor_parallel_size: {needed}` is the least that has room enough"
        elif fit.fits and is_yarn:
            least = fit.kv_tokens * room.lane.factor / fit.max_model_len
            yield (
                f"the KV cache has room for {fit.kv_tokens:,} tokens, so vLLM will not start with "
                f"YaRN's context of {fit.max_model_len:,}: `model.yarn.factor` may be "
                f"{math.floor(100 * least) / 100:g} at most"
            )
        elif fit.fits:
            least = max(1_024, fit.kv_tokens // 1_024 * 1_024)
            yield (
                f"the KV cache has room for {fit.kv_tokens:,} tokens, so vLLM will not start with "
                f"a context of {fit.max_model_len:,}: set `model.engine.max_model_len`, at most "
                f"{least:,}"
            )
        return
    if needed and 2 * needed <= tensor:
        yield (
            f"`tensor_parallel_size: {needed}` has room enough: {tensor // needed} times as many "
            f"replicas on the same GPUs, with less traffic between them (it is {tensor})"
        )
    held = min(MOST_AT_ONCE, fit.rows_held(room.tokens) // 64 * 64)
    if held >= ROOMIER * fit.max_num_seqs:
        given = "" if "max_num_seqs" in engine else ", by default"
        yield (
            f"the KV cache holds {fit.rows_held(room.tokens):,} such requests at once, "
            f"`max_num_seqs` allows {fit.max_num_seqs:,}{given}: set "
            f"`{key}.max_num_seqs: {held}`"
        )
    batch = engine.get("max_num_batched_tokens", DEFAULT_OPTIONS["max_num_batched_tokens"])
    least = max(SMALL_BATCH, min(fit.max_num_seqs, held))
    if isinstance(batch, int) and batch < least:
        yield (
            f"`{key}.max_num_batched_tokens: {batch}` keeps the GPU's steps small: "
            f"{least:,} or more"
        )


def _of_answers(job: JobConfig, estimate: Estimate, tokens: TokenEstimate) -> Iterator[str]:
    limit = f"`sampling.max_tokens: {job.sampling.max_tokens}`"
    if estimate.cut_answers is not None:
        if estimate.cut_answers >= MANY_CUT:
            share = percent(estimate.cut_answers)
            yield f"{share} of the answers so far ended at {limit}: paid for, and mostly not ok"
    elif tokens.limited >= MANY_CUT:
        yield f"{percent(tokens.limited)} of the answers are likely to be longer than {limit}"


def _of_prompts(job: JobConfig, tokens: TokenEstimate) -> Iterator[str]:
    is_off = job.model.engine.get("enable_prefix_caching") is False
    if job.model.backend == "vllm" and is_off and tokens.shared >= DOMINANT:
        yield (
            f"{percent(tokens.shared)} of the prompts is the same in all: without "
            "`model.engine.enable_prefix_caching: false` it is computed once"
        )


def _of_limits(job: JobConfig, estimate: Estimate, tokens: TokenEstimate) -> Iterator[str]:
    """The limit is a share of all rows, those that are done included."""
    allowed, rows = job.limits.max_failed_fraction, estimate.rows + estimate.done
    not_ok = sum(tokens.not_ok.values()) + estimate.done_not_ok
    if not_ok > allowed * rows:
        yield (
            f"about {percent(not_ok / rows)} of the rows can't be done, and "
            f"`limits.max_failed_fraction` is {percent(allowed)}: the run is likely to end with "
            "exit 3"
        )
