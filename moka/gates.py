"""Gates: the weight of each component of a mixture (MoKA, arXiv 2508.03527, its softmax over trained logits).

A gate does not depend on the input, and every kind starts uniform, `1 / r` each. All of it is computed in
fp32: at a usual learning rate the changes of a logit are lost in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional

#: softmax: positive, sums to 1. linear: any real number. none: fixed at 1/r.
GATES = ("softmax", "linear", "none")


def uniform_logit(kind: str, r: int) -> float:
    """The value of every logit at which the gate is uniform."""
    return 0.0 if kind == "softmax" else 1.0 / r


def scaled_gate(
    kind: str, logits: Tensor | None, scale: float, r: int, device: torch.device | None = None
) -> Tensor:
    """`scale` times the gate, `[r]` in fp32 (fp64 for fp64 logits), differentiable in `logits`."""
    if logits is None:
        return torch.full((r,), scale / r, dtype=torch.float32, device=device)
    return functional.softmax_gate(logits, scale) if kind == "softmax" else scale * at_least_fp32(logits)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is when it is fp32 or fp64 already."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class GateParameter(nn.Parameter):
    """Gate logits, in fp32 (or fp64) whatever they are cast to.

    Trainers cast every trainable parameter to 16 bits (TRL does it on a quantized base, through `.data`), and
    `model.to(torch.bfloat16)` does too; a gate would then stand still. A cast of the same values leaves them
    as they are.
    """

    @property
    def data(self) -> Tensor:
        """The values, as for every tensor."""
        return torch.Tensor.data.__get__(self)  # pyright: ignore[reportAttributeAccessIssue]

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.dtype in (torch.float16, torch.bfloat16):
            cast = not value.is_meta and not self.is_meta and torch.equal(value, self.detach().to(value))
            value = self.detach().to(value.device) if cast else value.float()
        torch.Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]


class GateDict(nn.ParameterDict):
    """Adapter name -> gate logits; whatever is put in becomes a `GateParameter`, also by loading."""

    def register_parameter(self, name: str, param: Any) -> None:
        """As for every module."""
        if type(param) is nn.Parameter:
            param = GateParameter(at_least_fp32(param.detach()), param.requires_grad)
        super().register_parameter(name, param)
