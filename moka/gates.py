"""Gates: the weight of each component of a mixture (MoKA, arXiv 2508.03527, its softmax over trained logits).

A gate does not depend on the input, and every kind starts uniform, `1 / r` each. All of it is computed in
fp32: at a usual learning rate the changes of a logit are lost in 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: softmax: positive, sums to 1. linear: any real number. none: fixed at 1/r.
GATES = ("softmax", "linear", "none")


def uniform_logit(kind: str, r: int) -> float:
    """The value of every logit at which the gate is uniform."""
    return 0.0 if kind == "softmax" else 1.0 / r


def gate_values(kind: str, logits: Tensor | None, r: int, device: torch.device | None = None) -> Tensor:
    """The gate `[r]` in fp32 (fp64 for fp64 logits), differentiable in `logits`."""
    if logits is None:
        return torch.full((r,), 1.0 / r, dtype=torch.float32, device=device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.softmax(0) if kind == "softmax" else logits
