"""Attention for the training on CPU cores: what lies ahead of a part of a row is not computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "in-parts"
PARTS = 4
"""A row's tokens are asked in so many parts, each only about what stands before its own end."""
UNSEEN = -1e30
"""The score of what a token may not see; finite, as padding sees nothing."""


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
    would be half of a training step. Memory is what limits this one, so it is the values' sum that
    is divided, not each score. Scores come to 200: only less the highest of their row can `exp`
    hold them all, and an engine's answers are those that were learned.
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
        scores = torch.where(seen, scores, UNSEEN)
        highest = scores.detach().amax(-1, keepdim=True)
        powers = (scores.float() - highest.float()).exp()
        found = powers.to(query.dtype) @ value[:, :, :end]
        parts.append((found / powers.sum(-1, keepdim=True)).to(query.dtype))
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, in_parts)
