"""NF4 weights: a matrix in 4 bits per entry, in the layout of bitsandbytes.

    w[e] = code[nibble e] * absmax[e // blocksize]   code: 16 quantiles of N(0, 1)   (QLoRA, arXiv 2305.14314)

The first of two entries is the high nibble of its byte. With double quantization `absmax` is itself stored in
8 bits: `absmax[i] = code2[absmax_q[i]] * absmax2[i // blocksize2] + offset`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, StateError
from .ops import require_native
from .shapes import flatten_shapes

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCKSIZE2 = 256  # bitsandbytes quantizes absmax in blocks of 256


@dataclass(frozen=True)
class NF4Weight:
    """A matrix in NF4; made by `quantize` or read in place by `from_bitsandbytes`.

    Attributes:
        packed: two entries per byte, any storage dtype (bitsandbytes' `quant_storage`); viewed as uint8.
        absmax: `[ceil(numel / blocksize)]`, fp32, or uint8 under double quantization.
        shape: `(N, K)`, the only truth about the size.
        blocksize: entries per absmax.
        absmax2, code2, offset, blocksize2: the second level; None without double quantization.
        dtype: dtype of the weight before quantization; what `dequantize()` returns by default.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    absmax2: Tensor | None = None
    code2: Tensor | None = None
    offset: Tensor | None = None
    blocksize2: int = BLOCKSIZE2
    dtype: torch.dtype = torch.float32

    @property
    def double_quant(self) -> bool:
        """Whether absmax is itself quantized."""
        return self.absmax2 is not None

    @property
    def device(self) -> torch.device:
        """Where the packed bytes are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held by every tensor of this weight."""
        tensors = (self.packed, self.absmax, self.absmax2, self.code2, self.offset)
        return sum(t.nbytes for t in tensors if t is not None)

    def op_args(self) -> tuple:
        """The NF4 argument group of the operators, in schema order."""
        tensors = (self.packed, self.absmax, self.absmax2, self.code2, self.offset)
        return (*tensors, self.blocksize, self.blocksize2, *self.shape)

    @classmethod
    def from_op_args(cls, args: tuple, dtype: torch.dtype) -> NF4Weight:
        """The weight that `op_args` describes."""
        packed, absmax, absmax2, code2, offset, blocksize, blocksize2, *shape = args
        return cls(packed, absmax, tuple(shape), blocksize, absmax2, code2, offset, blocksize2, dtype)

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device."""
        moved = {
            name: tensor.to(device)
            for name in ("packed", "absmax", "absmax2", "code2", "offset")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def dequantize(
        self,
        dtype: torch.dtype | None = None,
        mixture: tuple[Tensor, Tensor, Tensor, Sequence[Sequence[Any]]] | None = None,
    ) -> Tensor:
        """The dense matrix `[N, K]`, bit-equal to bitsandbytes; `mixture = (A, B, alpha, shapes)` is added.

        Args:
            dtype: of the result (fp64, fp32, bf16 or fp16); default the dtype before quantization.
            mixture: flat factors A and B, alpha `[r]` (scale times gate), shapes; None for the base alone.

        Example:
            >>> w4 = moka.nf4.quantize(torch.randn(64, 64))
            >>> w4.dequantize(torch.float32).shape
            torch.Size([64, 64])
        """
        require_native()
        A, B, alpha, shapes = mixture if mixture is not None else (None, None, None, ())
        return torch.ops.moka.nf4_dequantize(
            *self.op_args(), dtype or self.dtype, A, B, alpha, flatten_shapes(shapes)
        )


def quantize(w: Tensor, blocksize: int = 64, double_quant: bool = False) -> NF4Weight:
    """Quantizes a matrix to NF4, bit-equal to `bitsandbytes.functional.quantize_4bit`.

    Args:
        w: `[N, K]`, fp32, bf16 or fp16.
        blocksize: entries that share one absmax; a power of two from 32 to 4096.
        double_quant: store absmax in 8 bits with a second absmax per 256 (QLoRA section 3).

    Raises:
        ConfigError: the blocksize is not one of `BLOCKSIZES`, or `w` is not a matrix.
    """
    if blocksize not in BLOCKSIZES:
        raise ConfigError(f"blocksize: got {blocksize}, expected one of {BLOCKSIZES}")
    if w.dim() != 2:
        raise ConfigError(f"w: expected a matrix [N, K], got shape {tuple(w.shape)}; reshape it first")
    require_native()
    packed, absmax = torch.ops.moka.nf4_quantize(w.detach(), blocksize)
    weight = NF4Weight(packed, absmax, (w.shape[0], w.shape[1]), blocksize, dtype=w.dtype)
    if not double_quant:
        return weight
    offset = absmax.mean()
    code2 = dynamic_code().to(absmax.device)
    absmax_q, absmax2 = quantize_absmax(absmax - offset, code2)
    return replace(weight, absmax=absmax_q, absmax2=absmax2, code2=code2, offset=offset)


def dynamic_code() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, `[256]` fp32, ascending (arXiv 2110.02861, 2.1).

    Seven decades below 1; decade `i` is split evenly into `2^i` bins whose midpoints are the values.
    """
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        positive.append(10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0))
    values = torch.cat(positive)
    return torch.cat((values, -values, torch.tensor([0.0, 1.0]))).sort().values


def quantize_absmax(centered: Tensor, code2: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes `absmax - offset` to 8 bits in blocks of 256: codes `[n]` uint8 and second absmax, fp32.

    A value becomes the nearest code. Like bitsandbytes, so that the stored bytes agree, the CPU first rounds
    it to one of 65536 steps over [-1, 1]; the GPU does not. There the reciprocal of bitsandbytes is
    approximate: it may send a value in the middle of two codes to the other one.
    """
    n = centered.numel()
    blocks = torch.nn.functional.pad(centered, (0, -n % BLOCKSIZE2)).view(-1, BLOCKSIZE2)
    absmax2 = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax2.clamp(min=torch.finfo(torch.float32).tiny))[:, None]
    middles = (code2[:-1] + code2[1:]).double() / 2
    if not centered.is_cuda:
        scaled = ((scaled + 1.0) * 32767.5 + 0.5).int().double() / 32767.5 - 1.0
    nearest = torch.bucketize(scaled.double(), middles)
    return nearest.to(torch.uint8).flatten()[:n].contiguous(), absmax2


def from_bitsandbytes(layer: torch.nn.Module) -> NF4Weight:
    """Reads the weight of a bitsandbytes `Linear4bit` in place: no tensor is copied.

    Call it at each forward rather than keeping the result: moving a `Linear4bit` replaces its tensors.

    Raises:
        StateError: the layer is not quantized yet, is not NF4, or was repacked for CPU inference, after which
            its original bytes are gone.

    Example:
        >>> w4 = moka.nf4.from_bitsandbytes(model.lm_head)      # doctest: +SKIP
    """
    args = bitsandbytes_args(layer)
    return NF4Weight.from_op_args(args, _quant_state(layer, layer.weight).dtype)


def _quant_state(layer: Any, weight: Any) -> Any:
    return getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)


def bitsandbytes_args(layer: torch.nn.Module) -> tuple:
    """`from_bitsandbytes(layer).op_args()`, without making the object: each forward needs them."""
    weight: Any = layer.weight
    state = _quant_state(layer, weight)
    if state is None:
        raise StateError(
            "the Linear4bit layer holds no quantized weight yet; move it to a device first, e.g. "
            "model.to('cpu')"
        )
    if state.quant_type != "nf4":
        raise StateError(f"quant_type: got {state.quant_type!r}, expected 'nf4'; load the model with NF4")
    if getattr(state, "packing_format_for_cpu", False):
        raise StateError(
            "this Linear4bit layer was repacked by a CPU forward pass in eval mode and can no longer be "
            "trained; reload the model and inject (quantize, accelerate) before the first evaluation"
        )
    if len(state.shape) != 2:
        raise StateError(f"the quantized weight has shape {tuple(state.shape)}, expected a matrix [N, K]")
    second = state.state2 if state.nested else None
    if second is None:
        return weight.data, state.absmax, None, None, None, state.blocksize, BLOCKSIZE2, *state.shape
    levels = state.absmax, second.absmax, second.code, state.offset
    return weight.data, *levels, state.blocksize, second.blocksize, *state.shape
