"""Which row of a batch goes through which adapter, and a layer's forward pass for such a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import bases, functional
from .errors import StateError
from .functional import Shapes
from .shapes import flatten_shapes

if TYPE_CHECKING:
    from .layers import MokaLinear

FEW_TOKENS = 64  # as many as the kernel for a mixture per row takes (csrc/kernels/decode_cuda.h)


def copies_cost_little(x: Tensor) -> bool:
    """Whether making a copy of a base with an adapter in it takes a small part of the time of a product."""
    return x.is_cuda


class Rows:
    """Which row of a batch goes through which adapter.

    Args:
        assignment: an adapter per row; `BASE` for the base model alone.
        repeats: a batch may also hold each row this many times, one after the other, as in beam search.
    """

    BASE = "__base__"

    def __init__(self, assignment: Sequence[str], repeats: int = 1) -> None:
        self.assignment, self.repeats = tuple(assignment), repeats
        self.names = tuple(name for name in dict.fromkeys(assignment) if name != self.BASE)
        self._groups: dict[tuple[int, torch.device], tuple[dict[str, Tensor], Tensor, Tensor]] = {}
        self._stacks: dict[MokaLinear, tuple[list[int], tuple[Tensor, Tensor, Tensor]]] = {}
        self._numbers: dict[tuple[tuple[str, ...], int, int, torch.device], Tensor] = {}

    def indices(self, x: Tensor) -> dict[str, Tensor]:
        """The rows of `x` `[batch, ...]` that belong to each name of the assignment, int64.

        Raises:
            StateError: the batch has another number of rows.
        """
        return self._grouped(x)[0]

    def each(self, x: Tensor, function: Callable[[str, Tensor], Tensor]) -> Tensor:
        """`function(name, its rows of x)` for each name of the assignment, the results in the order of x."""
        indices, order, inverse = self._grouped(x)
        parts = x.index_select(0, order).split([len(index) for index in indices.values()])
        results = [function(name, part) for name, part in zip(indices, parts, strict=True)]
        return torch.cat(results).index_select(0, inverse)

    def _grouped(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """`indices`, all of them one after the other, and where each row of x is then."""
        key = x.shape[0], x.device
        if key not in self._groups:
            rows: dict[str, list[int]] = {}
            for i, name in enumerate(self._of_batch(x.shape[0])):
                rows.setdefault(name, []).append(i)
            order = [i for own in rows.values() for i in own]
            inverse = sorted(range(len(order)), key=order.__getitem__)
            groups = {name: torch.tensor(own, device=x.device) for name, own in rows.items()}
            self._groups[key] = (
                groups,
                torch.tensor(order, device=x.device),
                torch.tensor(inverse, device=x.device),
            )
        return self._groups[key]

    def _of_batch(self, batch: int) -> list[str]:
        if batch not in (len(self.assignment), len(self.assignment) * self.repeats):
            raise StateError(
                f"adapter_names: a layer got {batch} rows, expected one for each of the "
                f"{len(self.assignment)} names; layers that see a part of the batch cannot be mixed"
            )
        return [name for name in self.assignment for _ in range(batch // len(self.assignment))]

    def forward(self, layer: MokaLinear, x: Tensor) -> Tensor:
        """A layer's y for x `[batch, ..., K]`, each row through the base and its own adapter.

        Few tokens take one operator, for equal shapes and without gradients. Else a GPU computes one product
        for each adapter, as a copy of the base with the adapter in it costs little there; elsewhere the
        adapters' shares are added to the base's y.
        """
        base: Any = layer.base_layer
        inputs = x.to(bases.compute_dtype(base, x))
        names = [name for name in self.names if name in layer.configs]
        stacked, tokens = self._stack(layer, names), x.numel() // x.shape[-1]
        if stacked is not None:
            A, B, alpha, shapes = stacked
            base_args, sixteen = bases.op_args(base), inputs.dtype in (torch.float16, torch.bfloat16)
            if x.is_cuda and sixteen and 0 < tokens <= FEW_TOKENS and len(base_args) > 1:
                numbers = self._numbers_of(names, x)
                y = functional.nf4_linear_rows(inputs, base_args, base.bias, A, B, alpha, numbers, shapes)
                return y.to(x.dtype)
            mixtures = {name: (A[i], B[i], alpha[i], shapes) for i, name in enumerate(names)}
        else:
            mixtures = {name: layer.mixture([name], gate_dropout=layer.training) for name in names}
        dropout = {name: layer.configs[name].dropout if layer.training else 0.0 for name in names}
        if copies_cost_little(x) and not any(dropout.values()):
            flat = {name: (*factors, flatten_shapes(shapes)) for name, (*factors, shapes) in mixtures.items()}

            def one(name: str, part: Tensor) -> Tensor:
                if name not in flat:
                    return base(part)
                return layer.product(part, flat[name], layer.configs[name].path)

            return layer.result(self.each(inputs, one), x)
        indices = self.indices(x)
        for name, p in dropout.items():
            if p:
                index = indices[name]
                inputs = inputs.index_copy(0, index, nn.functional.dropout(inputs[index], p))
        own = [indices[name] for name in names]
        return functional.add_kron_mixtures(base(x), inputs, own, list(mixtures.values()))

    def _stack(self, layer: MokaLinear, names: list[str]) -> tuple[Tensor, Tensor, Tensor, Shapes] | None:
        """A layer's adapters side by side: A `[adapters, entries]`, B, alpha `[adapters, r]`, shapes.

        None with gradients, in training and for adapters of different shapes.
        """
        if torch.is_grad_enabled() or layer.training or len({layer.shapes[name] for name in names}) != 1:
            return None
        compiled = torch.compiler.is_compiling()  # then a look at the versions would end the graph
        tables = () if compiled else layer.tables()
        versions = [table[name]._version for table in tables for name in names if name in table]
        found, stacked = (None, None) if compiled else self._stacks.get(layer, (None, None))
        if stacked is None or found != versions:
            parts = zip(*(layer.mixture([name])[:3] for name in names), strict=True)
            stacked = tuple(torch.stack(part) for part in parts)
            if not compiled:
                self._stacks[layer] = versions, stacked  # pyright: ignore[reportArgumentType]
        A, B, alpha = stacked
        return A, B, alpha, layer.shapes[names[0]]

    def _numbers_of(self, names: list[str], x: Tensor) -> Tensor:
        """Which of the names each token of x has, `[tokens]` int32; -1 for none of them."""
        batch, tokens = x.shape[0], x.numel() // x.shape[-1]
        key = tuple(names), batch, tokens, x.device
        if key not in self._numbers:
            numbers = {name: i for i, name in enumerate(names)}
            rows = torch.tensor([numbers.get(n, -1) for n in self._of_batch(batch)], dtype=torch.int32)
            self._numbers[key] = rows.repeat_interleave(tokens // batch).to(x.device)
        return self._numbers[key]
