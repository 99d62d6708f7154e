"""Starts that are better than random factors, from data.

The update is zero before and after (B is), so the model computes what it did; what changes is the direction
of the first steps. With `G = dY^T X` the gradient of a weight and R the rearrangement of `moka/kpsvd.py`,

    dA_i = alpha_i R(G) vec(B_i)          dB_i = alpha_i R(G)^T vec(A_i)

so the backward pass of the adapter is a product with R(G): subspace iteration finds the leading components of
the weight's gradient, and G is never formed. (LoRA-GA, arXiv 2407.05000, and LoRA-One, arXiv 2502.01235, do
so for LoRA, from G.) A start from the weight itself is `MokaConfig.init="residual"`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .choice import evaluating
from .errors import ConfigError, NonFiniteError, StateError
from .gates import UNIFORM
from .inject import adapter_layers
from .layers import MokaLinear
from .shapes import KronShape

METHODS = ("gradient", "activation")
Blocks = dict[MokaLinear, list[Tensor]]  # for each group of components of one shape, their columns
Batches = Iterable[Mapping[str, Any]] | Callable[[], Tensor]


def start(
    model: nn.Module,
    method: str,
    batches: Batches,
    adapter_name: str = "default",
    passes: int = 2,
    norm: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """Sets the factors A of a new adapter from data; B stays zero, so the model computes what it did.

    Args:
        model: with an adapter of `moka.inject` or peft that has not been trained yet.
        method: "gradient": A_i are the leading left vectors of R(G), each shape by itself, so that the first
            gradient of B is as long as can be. "activation": random A_i whose rows follow the second moments
            of the inputs (the idea of EVA, arXiv 2410.07170).
        batches: dicts for `model(**batch)`, with labels, iterated over anew in each pass; or a function that
            returns the loss.
        adapter_name: which adapter.
        passes: of the subspace iteration, each with two backward passes over the batches.
        norm: of the A_i, in terms of what random ones have. The length of B's gradient does not matter to
            Adam, so along the leading directions a step changes more: lower the norm, or the learning rate.
        seed: of the random directions.

    Returns:
        The same model.

    Raises:
        ConfigError: an unknown method, no batches, or factors that are not dense and the layer's own.
        StateError: no such adapter, it was trained, or it is merged.
        NonFiniteError: a gradient is NaN or infinite; the adapter is as before.

    Example:
        >>> moka.start(model, "gradient", batches)          # doctest: +SKIP
    """
    if method not in METHODS:
        raise ConfigError(f"method: got {method!r}, expected one of {METHODS}")
    layers = {p: y for p, y in adapter_layers(model).items() if adapter_name in y.configs}
    if not layers:
        raise StateError(f"adapter {adapter_name!r} does not exist; call moka.inject first")
    for path, layer in layers.items():
        _check(path, layer, adapter_name)
    generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers wherever the model is
    before = {
        y: (y.moka_A[adapter_name].detach().clone(), y.moka_B[adapter_name].detach().clone())
        for y in layers.values()
    }
    try:
        with evaluating(model), _active(layers.values(), adapter_name):
            if method == "gradient":
                found = _gradient(layers, adapter_name, model, batches, passes, generator)
            else:
                found = _activation(layers, adapter_name, model, batches, generator)
            for layer, blocks in found.items():
                _place(layer, adapter_name, 0, blocks, norm)
    except BaseException:
        for layer, (A, B) in before.items():
            _set(layer, adapter_name, A, B)
        raise
    return model


def _gradient(
    layers: dict[str, MokaLinear],
    name: str,
    model: nn.Module,
    batches: Batches,
    passes: int,
    generator: torch.Generator,
) -> Blocks:
    """Subspace iteration on R(G) for every group of components of one shape."""
    sides = {}
    for layer in layers.values():
        sides[layer] = [
            (torch.empty(0), torch.randn(s.mb * s.nb, len(at), generator=generator, device="cpu"))
            for s, at in _groups(layer, name)
        ]
    for _ in range(passes):
        for side in (0, 1):  # A from B, then B from A
            for layer, pairs in sides.items():
                known = [torch.linalg.qr(pair[1 - side]).Q for pair in pairs]
                _place(layer, name, 1 - side, known)
            products = _products(layers, name, side, model, batches)
            for (layer, pairs), found in zip(list(sides.items()), products, strict=True):
                sides[layer] = [
                    (f, p[1]) if side == 0 else (p[0], f) for f, p in zip(found, pairs, strict=True)
                ]
    # right = R(G)^T Q for Q spanning left: rotate Q to the singular vectors
    return {
        layer: [
            torch.linalg.qr(left).Q @ torch.linalg.svd(right, full_matrices=False).Vh.mT
            for left, right in pairs
        ]
        for layer, pairs in sides.items()
    }


def _activation(
    layers: dict[str, MokaLinear], name: str, model: nn.Module, batches: Batches, generator: torch.Generator
) -> Blocks:
    """A_i = Z C^(1/2), with Z random and C the sum of X X^T over the tokens, X `[na, nb]` the input."""
    moments: dict[tuple[MokaLinear, int], Tensor] = {}

    def collect(layer: MokaLinear, args: tuple[Tensor, ...]) -> None:
        for s, _ in _groups(layer, name):
            X = args[0].detach().float().reshape(-1, s.na, s.nb)
            moment = torch.einsum("tab,tcb->ac", X, X)
            moments[layer, s.na] = moments.get((layer, s.na), torch.zeros_like(moment)) + moment

    hooks = [layer.register_forward_pre_hook(collect) for layer in layers.values()]
    try:
        with torch.no_grad():
            for _ in _losses(model, batches):
                pass
    finally:
        for hook in hooks:
            hook.remove()
    blocks: Blocks = {layer: [] for layer in layers.values()}
    for layer in blocks:
        for s, at in _groups(layer, name):
            values, vectors = torch.linalg.eigh(moments[layer, s.na].cpu())
            root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
            random = torch.randn(len(at), s.ma, s.na, generator=generator, device="cpu") @ root
            blocks[layer].append((random / random.flatten(1).norm(dim=1)[:, None, None]).flatten(1).mT)
    return blocks


def _check(path: str, layer: MokaLinear, name: str) -> None:
    config, form = layer.configs[name], layer.forms[name]
    identity = any(shape.identity for shape in form.shapes)
    if not form.dense or identity or config.tie or config.gate not in UNIFORM:
        raise ConfigError(
            f"{path}: start needs dense factors of the layer's own, and a gate of one weight per component"
        )
    if layer.merged_adapters or layer.moka_A[name].is_meta or layer.moka_B[name].any():
        raise StateError(
            f"{path}: adapter {name!r} was trained, is merged or has no values; start from a new one"
        )


def _groups(layer: MokaLinear, name: str) -> list[tuple[KronShape, list[int]]]:
    """Each shape and its components."""
    shapes = layer.shapes[name]
    return [(s, [i for i, other in enumerate(shapes) if other == s]) for s in dict.fromkeys(shapes)]


@torch.no_grad()
def _place(layer: MokaLinear, name: str, side: int, blocks: list[Tensor], norm: float | None = None) -> None:
    """Puts unit columns of each group into one side's factors, zeros into the other's.

    Args:
        layer, name: which adapter.
        side: 0 for A, 1 for B.
        blocks: `[entries, components]` of each group.
        norm: their length, in terms of that of random factors, U(-1/sqrt(na), 1/sqrt(na)); None for 1.
    """
    factors = [torch.zeros_like(part) for part in _parts(layer, name, side, layer.tables()[side][name])]
    for (s, at), block in zip(_groups(layer, name), blocks, strict=True):
        length = 1.0 if norm is None else norm * (s.ma / 3) ** 0.5
        for i, column in zip(at, block.mT, strict=False):  # R may have a lower rank than there are components
            factors[i] = length * column.to(factors[i])
    A, B = (torch.zeros_like(table[name]) for table in (layer.moka_A, layer.moka_B))
    (A, B)[side].copy_(torch.cat(factors))
    _set(layer, name, A, B)


@torch.no_grad()
def _set(layer: MokaLinear, name: str, A: Tensor, B: Tensor) -> None:
    layer.moka_A[name].copy_(A)
    layer.moka_B[name].copy_(B)


def _parts(layer: MokaLinear, name: str, side: int, flat: Tensor) -> tuple[Tensor, ...]:
    return flat.split([s.b_numel if side else s.a_numel for s in layer.shapes[name]])


def _products(
    layers: dict[str, MokaLinear], name: str, side: int, model: nn.Module, batches: Batches
) -> list[list[Tensor]]:
    """For each layer the gradients of one side, as columns of each group, without the gates."""
    wanted = [layer.tables()[side][name] for layer in layers.values()]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in wanted]
    for loss in _losses(model, batches):
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        for path, total, gradient in zip(layers, sums, gradients, strict=True):
            if gradient is None or not gradient.isfinite().all():
                raise NonFiniteError(f"{path}: the gradient is missing, NaN or infinite; check the batches")
            total += gradient
    products = []
    for layer, total in zip(layers.values(), sums, strict=True):
        parts, alpha = _parts(layer, name, side, total.cpu()), layer.alpha(name).detach().cpu()
        groups = _groups(layer, name)
        products.append([torch.stack([parts[i] / alpha[i] for i in at], dim=1) for _, at in groups])
    return products


def _losses(model: Any, batches: Batches) -> Iterator[Tensor]:
    count = 0
    if callable(batches):
        yield batches()
        return
    for batch in batches:
        count += 1
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"batches: got a {type(batch).__name__}, expected the model's arguments by name, such as "
                f"{{'input_ids': ..., 'labels': ...}}"
            )
        loss = model(**batch).loss
        if loss is None:
            raise ConfigError(f"batches: no loss comes from {sorted(batch)}; expected labels among them")
        yield loss
    if not count:
        raise ConfigError(
            "batches: got none, expected at least one, in a list or another iterable to be used again"
        )


@contextlib.contextmanager
def _active(layers: Iterable[MokaLinear], name: str) -> Iterator[None]:
    """Lets both factors of one adapter receive gradients."""
    before = [
        (y, y.active_adapters, y.moka_A[name].requires_grad, y.moka_B[name].requires_grad) for y in layers
    ]
    try:
        for layer, *_ in before:
            layer.active_adapters = [name]
            layer.moka_A[name].requires_grad_(True)
            layer.moka_B[name].requires_grad_(True)
        yield
    finally:
        for layer, active, a, b in before:
            layer.active_adapters = active
            layer.moka_A[name].requires_grad_(a)
            layer.moka_B[name].requires_grad_(b)
