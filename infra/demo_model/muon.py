"""Muon for many small matrices: those of one shape are made orthogonal together."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration that Muon's author tuned (Jordan, 2024; torch.optim.Muon's)."""
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):  # type: ignore[misc]  # torch is untyped here
    """What `torch.optim.Muon` does with `adjust_lr_fn="match_rms_adamw"`, in half of the time.

    A model as small as this one has dozens of matrices whose products are each too small to keep
    two cores busy.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        in_order = sorted(matrices, key=lambda matrix: tuple(matrix.shape))
        super().__init__(in_order, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:
        """Move each matrix by its learning rate along its orthogonal momentum. There is no closure;
        the parameter is that of torch's own optimizers."""
        with torch.no_grad():
            for group in self.param_groups:
                for shape, alike in groupby(group["params"], key=lambda matrix: matrix.shape):
                    matrices = [*alike]
                    gradients = [matrix.grad for matrix in matrices]
                    momenta = [self._momentum(matrix) for matrix in matrices]
                    torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
                    ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
                    updates = [*orthogonal(torch.stack(ahead)).float()]
                    torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                    rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                    torch._foreach_add_(matrices, updates, alpha=-rate)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum"]
        return momentum


def orthogonal(matrices: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrices to [count, rows, columns], in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    made = (matrices.mT if tall else matrices).bfloat16()
    made = made / made.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = made @ made.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        made = torch.baddbmm(made, gram, made, beta=a)
    return made.mT if tall else made
