"""The training corpus: an endless stream of batches, each a function of its number alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from infra.demo_model.choosing import choices, decisions
from infra.demo_model.conversation import Conversation, Skill
from infra.demo_model.copying import copies
from infra.demo_model.extraction import extractions
from infra.demo_model.questions import questions
from infra.demo_model.summaries import odd_summaries, summaries
from infra.demo_model.tools import conversations
from infra.demo_model.translation import (
    odd_passages,
    odd_sentences,
    passages,
    single_sentences,
    word_lists,
)

SEED = 31

Mix = dict[Skill, float]
"""Share of the rows of training that each skill gets."""

SKILLS: Mix = {
    single_sentences: 0.34,
    passages: 0.22,
    copies: 0.06,
    conversations: 0.12,
    extractions: 0.10,
    questions: 0.08,
    summaries: 0.08,
}
"""The tokenizer is made of these, so that it stays what it is whatever a later mix adds."""
BASICS: Mix = {
    single_sentences: 0.20,
    odd_sentences: 0.14,
    passages: 0.12,
    odd_passages: 0.10,
    copies: 0.06,
    conversations: 0.12,
    extractions: 0.10,
    decisions: 0.08,
    summaries: 0.08,
}
CHOOSING: Mix = {
    choices: 0.40,
    decisions: 0.12,
    odd_sentences: 0.13,
    word_lists: 0.04,
    odd_passages: 0.16,
    odd_summaries: 0.08,
    conversations: 0.04,
    extractions: 0.03,
}
"""Half of the rows teach where a letter stands, which nothing else does."""
EVERYTHING: Mix = {
    decisions: 0.10,
    choices: 0.04,
    single_sentences: 0.12,
    odd_sentences: 0.17,
    word_lists: 0.03,
    passages: 0.09,
    odd_passages: 0.15,
    copies: 0.01,
    conversations: 0.11,
    extractions: 0.09,
    summaries: 0.03,
    odd_summaries: 0.06,
}
MIXES: tuple[tuple[int, Mix], ...] = (
    (0, {copies: 1.0}),  # on that, the other skills build
    (300, BASICS),
    (2300, CHOOSING),
    (2800, EVERYTHING),
)
"""Each mix and the number of the first batch that is made by it."""
LONG = frozenset({passages, odd_passages, conversations, summaries, odd_summaries})
"""Skills whose conversations need the longer rows."""


MISSES = 4
"""A row is full when so many conversations did not fit."""
FIRST_TOKENS, FIRST_WEIGHT = 6, 4.0
"""So many tokens of each answer count for more than one."""


class Shape(NamedTuple):
    """Rows of a batch and tokens of a row; few shapes, since each is compiled by itself."""

    rows: int
    tokens: int


SHORT_ROWS, LONG_ROWS = Shape(8, 512), Shape(4, 1024)


class Batch(NamedTuple):
    """Several conversations in each row."""

    ids: Tensor  # [rows, tokens]
    positions: Tensor  # [rows, tokens], each token's place in its conversation
    visible: Tensor  # [rows, 1, tokens, tokens], what each token may look at
    targets: Tensor  # [rows, tokens], the token to be learned after each, or -100
    weights: Tensor  # [rows, tokens], what each target counts for


def make_batch(tokenizer: PreTrainedTokenizerFast, number: int) -> Batch:
    """Batch `number` of the corpus, on any machine the same."""
    dice = random.Random(f"{SEED} {number}")
    mix = [mix for first, mix in MIXES if first <= number][-1]
    long = dice.random() < sum(share for skill, share in mix.items() if skill in LONG)
    shares = {skill: share for skill, share in mix.items() if (skill in LONG) == long}
    shape = LONG_ROWS if long else SHORT_ROWS
    chosen = dice.choices([*shares], [*shares.values()], k=shape.rows)
    rows = [pack(tokenizer, skill(dice), shape.tokens) for skill in chosen]
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


def pack(
    tokenizer: PreTrainedTokenizerFast, conversations: Iterator[Conversation], tokens: int
) -> Batch:
    """Fill one row with conversations, laying down only once what they all begin with.

    Each conversation sees that beginning and itself, and counts its positions on from there: the
    loss is that of one row for each conversation, for half the work and with little padding. One
    that does not fit is left out.
    """
    taken: list[list[int]] = []
    beginning = length = misses = 0
    while misses < MISSES:
        ids = encode(tokenizer, next(conversations))
        if len(ids) > tokens:
            continue
        if not taken:
            beginning = _system_turn(tokenizer, ids)
            length = beginning
        if length + len(ids) - beginning > tokens:
            misses += 1
            continue
        length += len(ids) - beginning
        taken.append(ids)
    row = [*taken[0][:beginning]]
    positions, owners, weights = [*range(beginning)], [0] * beginning, [0.0] * beginning
    for owner, ids in enumerate(taken, start=1):
        row += ids[beginning:]
        positions += range(beginning, len(ids))
        owners += [owner] * (len(ids) - beginning)
        weights += answers(tokenizer, ids)[beginning:]
    padding = tokens - len(row)
    ids_ = torch.tensor(row + [tokenizer.pad_token_id] * padding)
    owner = torch.tensor(owners + [-1] * padding)
    weight = torch.tensor([*weights, *[0.0] * padding])
    visible = ((owner[:, None] == owner) | (owner == 0)).tril()
    next_weight = torch.cat([weight[1:], torch.zeros(1)])
    targets = torch.where(next_weight > 0, ids_.roll(-1), -100)
    return Batch(ids_, torch.tensor(positions + [0] * padding), visible[None], targets, next_weight)


def encode(tokenizer: PreTrainedTokenizerFast, conversation: Conversation) -> list[int]:
    """The token ids of a whole conversation, by the model's own chat template."""
    text = tokenizer.apply_chat_template(
        conversation.messages, tools=conversation.tools, tokenize=False
    )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _system_turn(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> int:
    """How many tokens come up to and with the first `<|user|>`."""
    return ids.index(tokenizer.convert_tokens_to_ids("<|user|>")) + 1


def answers(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[float]:
    """What each token counts for in the loss: nothing, unless the assistant says it.

    It says what stands after `<|assistant|>`, up to `<|im_end|>` and with it. The first tokens
    decide: a letter, a sentence to be copied, a tool; what follows, mostly follows from them.
    """
    begin, end = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.eos_token_id
    said, weights = -1, []  # how many tokens of the turn were said
    for token in ids:
        weights.append(0.0 if said < 0 else FIRST_WEIGHT if said < FIRST_TOKENS else 1.0)
        if said >= 0:
            said += 1
        if token == begin:
            said = 0
        elif token == end:
            said = -1
    return weights
