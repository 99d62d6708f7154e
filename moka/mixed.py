"""Mixed batches: each row of a batch goes through an adapter of its own, or through the base alone.

y[row] = W x[row] + b + sum_i alpha_i (A_i kron B_i) x[row]          with the mixture named for the row
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .errors import ConfigError, StateError
from .functional import Shapes
from .inject import adapter_layers, saved_modules
from .layers import MokaLinear

FEW_TOKENS = 64  # as many as the kernel for a mixture per row takes (csrc/kernels/decode_cuda.h)


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
        self._indices: dict[tuple[str, int, torch.device], Tensor] = {}
        self._stacks: dict[MokaLinear, tuple[list[int], tuple[Tensor, Tensor, Tensor]]] = {}
        self._numbers: dict[tuple[tuple[str, ...], int, int, torch.device], Tensor] = {}

    def index(self, name: str, x: Tensor) -> Tensor:
        """The rows of `x` `[batch, ...]` that belong to an adapter, int64.

        Raises:
            StateError: the batch has another number of rows.
        """
        key = name, x.shape[0], x.device
        if key not in self._indices:
            rows = [i for i, own in enumerate(self._of_batch(x.shape[0])) if own == name]
            self._indices[key] = torch.tensor(rows, device=x.device)
        return self._indices[key]

    def _of_batch(self, batch: int) -> list[str]:
        if batch not in (len(self.assignment), len(self.assignment) * self.repeats):
            raise StateError(
                f"adapter_names: a layer got {batch} rows, expected one for each of the "
                f"{len(self.assignment)} names; layers that see a part of the batch cannot be mixed"
            )
        return [name for name in self.assignment for _ in range(batch // len(self.assignment))]

    def stack(self, layer: MokaLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Shapes] | None:
        """A layer's adapters side by side, for the one operator that takes them all.

        Args:
            layer: one of the model's.
            x: `[batch, ..., K]`, as the operator gets it.

        Returns:
            A `[adapters, entries]`, B, alpha `[adapters, r]`, the adapter's number for each token `[tokens]`
            int32 (-1 for none), shapes; None where the operator would not be faster: with gradients, on a
            CPU, in 32 bits, for many tokens, or when the adapters differ in shape.
        """
        names = tuple(name for name in self.names if name in layer.configs)
        tokens = x.numel() // x.shape[-1]
        few = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and 0 < tokens <= FEW_TOKENS
        if torch.is_grad_enabled() or not few or len({layer.shapes[name] for name in names}) != 1:
            return None
        tables = layer.tables()
        versions = [table[name]._version for table in tables for name in names if name in table]
        found, stacked = self._stacks.get(layer, (None, None))
        if stacked is None or found != versions:
            parts = zip(*(layer.mixture([name])[:3] for name in names), strict=True)
            stacked = tuple(torch.stack(part) for part in parts)
            self._stacks[layer] = versions, stacked  # pyright: ignore[reportArgumentType]
        batch = x.shape[0]
        key = names, batch, tokens, x.device
        if key not in self._numbers:
            numbers = {name: i for i, name in enumerate(names)}
            rows = torch.tensor([numbers.get(n, -1) for n in self._of_batch(batch)], dtype=torch.int32)
            self._numbers[key] = rows.repeat_interleave(tokens // batch).to(x.device)
        A, B, alpha = stacked
        return A, B, alpha, self._numbers[key], layer.shapes[names[0]]


@contextlib.contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str], repeats: int = 1) -> Iterator[nn.Module]:
    """Within the block each row of the batch goes through the adapter named for it.

    The base runs once for all rows. Gradients flow as ever; which adapters are active does not matter, but a
    disabled model stays its base.

    Args:
        model: with adapters from `moka.inject` or peft.
        adapter_names: one per row; "__base__" for the base model alone.
        repeats: the rows may also come this many times each, as `generate` repeats them in beam search.

    Raises:
        ConfigError: an unknown name, or an adapter with `modules_to_save`.
        StateError: an adapter is merged; another such block is running; or gradient checkpointing is on in
            training, which would run the forward pass again outside the block.

    Example:
        >>> with moka.mixed_batch(model, ["default", "__base__"]):          # doctest: +SKIP
        ...     logits = model(two_rows).logits
    """
    rows, layers = Rows(adapter_names, repeats), list(adapter_layers(model).values())
    known = list(dict.fromkeys(name for layer in layers for name in layer.configs))
    if not adapter_names or (unknown := [name for name in rows.names if name not in known]):
        got = unknown if adapter_names else list(adapter_names)
        raise ConfigError(f"adapter_names: got {got}, expected one of {[*known, rows.BASE]} for each row")
    if any(layer.replaced is not None for layer in layers):
        raise StateError("adapter_names: init='residual' changed the base, which all rows would share")
    if directed := [n for n in rows.names if any(n in layer.moka_magnitude for layer in layers)]:
        raise ConfigError(f"adapter_names: {directed} set the norm of each row (magnitude), one for all rows")
    copies = [n for n in rows.names if any(n in m.modules_to_save for m in saved_modules(model).values())]
    if copies:
        raise ConfigError(f"adapter_names: {copies} have modules_to_save, which cannot be mixed in a batch")
    if any(layer.rows is not None for layer in layers):
        raise StateError("adapter_names: another mixed batch is running on this model; one at a time")
    if merged := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise StateError(f"adapters {merged} are merged into the base weights; unmerge them first")
    if torch.is_grad_enabled() and any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        raise StateError(
            "adapter_names with gradient checkpointing: the backward pass would run the layers again without "
            "them; call model.gradient_checkpointing_disable(), or train one adapter at a time"
        )
    try:
        for layer in layers:
            layer.rows = rows
        yield model
    finally:
        for layer in layers:
            layer.rows = None
