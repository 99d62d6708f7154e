"""Gates: the weight of each component, as a function of trained logits.

    softmax    exp(g_i/T) / sum_j exp(g_j/T)          positive, sums to 1 (MoKA, arXiv 2508.03527)
    topk(j)    softmax over the j largest logits, 0 for the others
    sigmoid    2 sigmoid(g_i) / r                     each between 0 and 2/r, whatever the others are
    linear     g_i                                    any real number
    matrix     sum_ij M_ij A_i kron B_j               all pairs of factors, which must have one shape (as in
                                                      LoRA-XS, arXiv 2405.17604)
    routed     softmax(R x / T)                       for each token its own; the factored path alone
    none       1/r

Logits are kept and computed in fp32: at a usual learning rate the changes of a logit are lost in 16 bits.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .errors import StateError

GATES = ("softmax", "topk(j)", "sigmoid", "linear", "matrix", "routed", "none")
#: Gates that start uniform and have one weight per component, whatever the token.
UNIFORM = ("softmax", "sigmoid", "linear", "none")
TOPK = re.compile(r"topk\(([1-9]\d{0,3})\)")


def is_gate(kind: object) -> bool:
    """Whether this names a gate."""
    return isinstance(kind, str) and (
        TOPK.fullmatch(kind) is not None or (kind in GATES and kind != GATES[1])
    )


def logit_shape(kind: str, r: int, in_features: int) -> tuple[int, ...] | None:
    """The shape of the logits; None for a gate without."""
    if kind == "none":
        return None
    return {"matrix": (r, r), "routed": (r, in_features)}.get(kind, (r,))


@torch.no_grad()
def reset_logits_(kind: str, logits: Tensor, zero: bool = False) -> None:
    """Sets the logits to where the gate is uniform, or to zero."""
    if kind == "matrix" and not zero:
        logits.copy_(torch.eye(len(logits), device=logits.device) / len(logits))
    else:
        logits.fill_(1.0 / len(logits) if kind == "linear" and not zero else 0.0)


def scaled_gate(
    kind: str,
    logits: Tensor | None,
    scale: float,
    r: int,
    temperature: float = 1.0,
    like: Tensor | None = None,
) -> Tensor:
    """`scale` times the gate, `[r]` in fp32 (fp64 for fp64 logits), differentiable in `logits`.

    A gate matrix mixes the factors instead (`mix_factors`); what is left of it here is `scale`.

    Raises:
        StateError: the gate depends on the token.
    """
    if logits is None:  # a gate without has the device of the factors, and fp64 beside fp64
        assert like is not None
        return at_least_fp32(like.new_empty(0)).new_full((r,), scale / r)
    logits = at_least_fp32(logits)
    if kind == "routed":
        raise StateError(
            "gate 'routed' depends on the token, so there is no one update to merge, export or analyze"
        )
    if kind == "matrix":
        return torch.full((r,), scale, dtype=logits.dtype, device=logits.device)
    if kind == "linear":
        return scale * logits
    if kind == "sigmoid":
        return torch.sigmoid(logits) * (2.0 * scale / r)
    if topk := TOPK.fullmatch(kind):
        values, chosen = logits.topk(min(int(topk[1]), r))
        return torch.zeros_like(logits).scatter(
            0, chosen, functional.softmax_gate(values / temperature, scale)
        )
    return functional.softmax_gate(logits if temperature == 1.0 else logits / temperature, scale)


def restrict(kind: str, alpha: Tensor, kept: int | Tensor, scale: float | Tensor) -> Tensor:
    """`scaled_gate` when all but the first `kept` components are left out; a gate that sums to 1 does so over
    these, times `scale`."""
    alpha = alpha * (torch.arange(len(alpha), device=alpha.device) < kept)
    return alpha * (scale / alpha.sum()) if kind in ("softmax", "none") else alpha


def mix_factors(matrix: Tensor, A: Tensor) -> Tensor:
    """The left factors of `sum_j (sum_i M_ij A_i) kron B_j`, flat like A."""
    return (at_least_fp32(matrix).mT @ A.view(len(matrix), -1)).flatten()


def route(logits: Tensor, x: Tensor, scale: float, temperature: float) -> Tensor:
    """`scale * softmax(R x / T)` for each token: R `[r, K]`, x `[..., K]` -> `[..., r]` in fp32 or more."""
    logits = at_least_fp32(logits)
    return scale * torch.softmax(nn.functional.linear(x.to(logits.dtype), logits) / temperature, dim=-1)


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
