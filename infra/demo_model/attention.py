"""Attention for the training on CPU cores: what lies ahead of a part of a row is not computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "in-parts"
PARTS = 4
"""A row's tokens are asked in so many parts, each only about what stands before its own end."""
HIGHEST_SCORE = 60.0
"""A higher score counts as this one: `exp` of it, summed over a row, is far from an overflow."""
LEAST_SUM = 1e-30
"""In place of 0, where all scores of a token are so low that `exp` of each is 0."""


def in_parts(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention as transformers asks for it, for whole rows.

    `query` is [rows, heads, tokens, size], `key` and `value` [rows, key-value heads, tokens,
    size], `attention_mask` [rows, 1, tokens, tokens]; what it gives, [rows, tokens, heads, size].

    torch's own kernel for CPUs takes three times as long with a mask of this kind, and with it
    would be half of a training step. Memory is what limits this one, so scores are gone over once,
    not for their highest first, and it is the values' sum that is divided, not each score.
    """
    heads, tokens = query.shape[1], query.shape[2]
    key, value = (kept.repeat_interleave(heads // kept.shape[1], 1) for kept in (key, value))
    if attention_mask is None:
        attention_mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    size = -(-tokens // PARTS)
    parts = []
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        scores = query[:, :, start:end] * scaling @ key[:, :, :end].transpose(2, 3)
        seen = attention_mask[:, :, start:end, :end]
        powers = torch.where(seen, scores.float().clamp(max=HIGHEST_SCORE).exp(), 0.0)
        sums = powers.sum(-1, keepdim=True).clamp(min=LEAST_SUM)
        found = powers.to(query.dtype) @ value[:, :, :end]
        parts.append((found / sums).to(query.dtype))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, in_parts)
