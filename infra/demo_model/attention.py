"""Attention for the training on CPU cores: what lies ahead of a part of a row is not computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "in-parts"
PARTS = 4
"""A row's tokens are asked in so many parts, each only about what stands before its own end."""


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

    torch's own kernel for CPUs takes three times as long with a mask of this kind, and with it
    would be half of a training step.
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
        scores = scores.masked_fill(~attention_mask[:, :, start:end, :end], -1e4)
        shares = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        parts.append(shares @ value[:, :, :end])
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, in_parts)
