"""The training corpus: an endless stream of batches, each a function of its number alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from infra.demo_model.conversation import Conversation, Skill
from infra.demo_model.copying import copies
from infra.demo_model.extraction import extractions
from infra.demo_model.questions import questions
from infra.demo_model.summaries import summaries
from infra.demo_model.tools import conversations
from infra.demo_model.translation import passages, single_sentences

SEED = 31

SKILLS: dict[Skill, float] = {
    single_sentences: 0.34,
    passages: 0.22,
    copies: 0.06,
    conversations: 0.12,
    extractions: 0.10,
    questions: 0.08,
    summaries: 0.08,
}
"""Share of the rows of training that each skill gets."""
LONG = frozenset({passages, conversations, summaries})
"""Skills whose conversations need the longer rows."""
COPYING_FIRST = 300
"""The first batches teach nothing but to copy: on that, the other skills build."""


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


def make_batch(tokenizer: PreTrainedTokenizerFast, number: int) -> Batch:
    """Batch `number` of the corpus, on any machine the same."""
    dice = random.Random(f"{SEED} {number}")
    long = number >= COPYING_FIRST and dice.random() < sum(SKILLS[skill] for skill in LONG)
    skills = [skill for skill in SKILLS if (skill in LONG) == long]
    if number < COPYING_FIRST:
        skills = [copies]
    shape = LONG_ROWS if long else SHORT_ROWS
    chosen = dice.choices(skills, [SKILLS[skill] for skill in skills], k=shape.rows)
    rows = [pack(tokenizer, skill(dice), shape.tokens) for skill in chosen]
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


def pack(
    tokenizer: PreTrainedTokenizerFast, conversations: Iterator[Conversation], tokens: int
) -> Batch:
    """Fill one row with conversations, laying down only once what they all begin with.

    Each conversation sees that beginning and itself, and counts its positions on from there: the
    loss is that of one row for each conversation, for half the work and with little padding. One
    that is longer than a row is left out.
    """
    taken: list[list[int]] = []
    beginning = length = 0
    while True:
        ids = encode(tokenizer, next(conversations))
        if len(ids) > tokens:
            continue
        if not taken:
            beginning = _system_turn(tokenizer, ids)
            length = beginning
        length += len(ids) - beginning
        if length > tokens:
            break
        taken.append(ids)
    row = [*taken[0][:beginning]]
    positions, owners, learned = [*range(beginning)], [0] * beginning, [False] * beginning
    for owner, ids in enumerate(taken, start=1):
        row += ids[beginning:]
        positions += range(beginning, len(ids))
        owners += [owner] * (len(ids) - beginning)
        learned += answers(tokenizer, ids)[beginning:]
    padding = tokens - len(row)
    ids_ = torch.tensor(row + [tokenizer.pad_token_id] * padding)
    owner = torch.tensor(owners + [-1] * padding)
    is_learned = torch.tensor([*learned, *[False] * padding])
    visible = ((owner[:, None] == owner) | (owner == 0)).tril()
    targets = torch.full((tokens,), -100)
    targets[:-1] = torch.where(is_learned[1:], ids_[1:], -100)
    return Batch(ids_, torch.tensor(positions + [0] * padding), visible[None], targets)


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


def answers(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[bool]:
    """Which tokens the assistant says: those after `<|assistant|>`, to `<|im_end|>` with it."""
    begin = tokenizer.convert_tokens_to_ids("<|assistant|>")
    says, marks = False, []
    for token in ids:
        marks.append(says)
        if token == begin:
            says = True
        elif token == tokenizer.eos_token_id:
            says = False
    return marks
