"""`MokaLinear`: a frozen linear layer with gated mixtures of Kronecker products.

    y = W x + b + scale * sum_i gate_i (A_i kron B_i) x                             (MoKA, arXiv 2508.03527)

Parameters are keyed by adapter name, as in peft's tuner layers, so that one layer can hold several adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import bases, branches, functional, gates, magnitude, reference
from .bases import MergedBase, NF4Linear
from .config import PARTS, MokaConfig
from .errors import ConfigError, StateError
from .factors import expand
from .gates import GateDict, at_least_fp32
from .init import init_factors_, init_svd_
from .kpsvd import fit
from .nf4 import NF4Weight
from .shapes import KronShape, flatten_shapes

if TYPE_CHECKING:
    from .rows import Rows

__all__ = ["MokaLinear", "NF4Linear", "delta_weight"]


class MokaLinear(nn.Module):
    """A frozen linear layer plus the mixtures of its active adapters, in one operation.

    Args:
        base_layer: the layer to adapt, kept as it is: `nn.Linear`, bitsandbytes `Linear4bit` or `NF4Linear`.

    Attributes:
        moka_A, moka_B: adapter name -> all factors `A_i` (`B_i`), row-major and concatenated; `factors` has
            views.
        moka_gate: adapter name -> gate logits, fp32, most often `[r]`; no entry for gate="none".
        moka_magnitude: adapter name -> row norms `[N]` fp32, with magnitude=True.
        shapes, configs, scaling: adapter name -> component shapes, configuration, scale.
        forms: adapter name -> how its factors become dense, and what the operators take.
        active_adapters: the adapters that take part in `forward`, added up.
        merged_adapters: those whose update is in the base weight already; they are left out of `forward`.
        merged_base: what `moka.unmerge` puts back; None unless merged.
        disable_adapters: `forward` calls the base layer alone.
        routing: what a routed gate gave each token in the last training step, for `moka.routing_loss`.
        replaced: the base layer before init="residual" took its leading components out of it; None otherwise.
        rows: which row of the batch goes through which adapter, within `moka.mixed_batch`.
    """

    adapter_layer_names = ("moka_A", "moka_B", "moka_gate", "moka_magnitude")
    other_param_names = ("shapes", "configs", "scaling", "forms")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features  # pyright: ignore[reportAttributeAccessIssue]
        self.out_features: int = base_layer.out_features  # pyright: ignore[reportAttributeAccessIssue]
        self.moka_A, self.moka_B, self.moka_gate = nn.ParameterDict(), nn.ParameterDict(), GateDict()
        self.moka_magnitude = GateDict()
        self.shapes: dict[str, tuple[KronShape, ...]] = {}
        self.configs: dict[str, MokaConfig] = {}
        self.scaling: dict[str, float] = {}
        self.forms: dict[str, branches.Form] = {}
        self.routing: Tensor | None = None
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.merged_base: MergedBase | None = None
        self.disable_adapters = False
        self.rows: Rows | None = None
        self.replaced: MergedBase | None = None  # in a dataclass, so that it is no submodule
        self.train(base_layer.training)

    def add_adapter(
        self, name: str, config: MokaConfig, shapes: Sequence[KronShape], initialize: bool = True
    ) -> None:
        """Adds an adapter on the base weight's device, initialized to a zero update; it is not active yet.

        Raises:
            StateError: the name is taken.
        """
        if name in self.moka_A:
            raise StateError(f"adapter {name!r} exists already; choose another name or eject it first")
        if self.configs and "residual" in (config.init, *(c.init for c in self.configs.values())):
            raise StateError(
                f"adapter {name!r}: got one beside {list(self.configs)}, expected one only: init='residual' "
                f"changes the base of the layer"
            )
        device, dtype = self.weight_device(), getattr(torch, config.adapter_dtype)
        sizes = sum(s.a_numel for s in shapes), sum(s.b_numel for s in shapes)
        self.moka_A[name], self.moka_B[name] = (
            nn.Parameter(torch.empty(size, dtype=dtype, device=device)) for size in sizes
        )
        logits = gates.logit_shape(config.gate, len(shapes), self.in_features)
        if logits is not None:
            self.moka_gate[name] = nn.Parameter(torch.empty(logits, device=device, dtype=torch.float32))
        if config.magnitude:
            norms = torch.empty(self.out_features, device=device, dtype=torch.float32)
            self.moka_magnitude[name] = nn.Parameter(norms)
        self.shapes[name], self.configs[name] = tuple(shapes), config
        self.scaling[name] = config.scale_for(len(shapes))
        self.forms[name] = branches.form_of(shapes)
        self.reset_adapter(name, from_base=initialize)

    @torch.no_grad()
    def reset_adapter(self, name: str, from_base: bool = True) -> None:
        """Sets an adapter to its initial values, a zero update; needed after `to_empty` on a meta model.

        Args:
            name: which adapter.
            from_base: compute what the configuration takes from the base weight.
        """
        config, shapes = self.configs[name], self.shapes[name]
        A, B = self.moka_A[name], self.moka_B[name]
        if config.init == "svd" and from_base and not A.is_meta:
            init_svd_(A, B, shapes, self.base_weight())
        else:
            init_factors_(A, B, shapes, config.init)
        if name in self.moka_gate:
            gates.reset_logits_(config.gate, self.moka_gate[name], zero=config.init == "svd")
        if config.init == "residual" and self.weight_device().type != "meta":
            self._split_base(name)
        if config.magnitude and from_base and not A.is_meta:
            self.moka_magnitude[name].copy_(magnitude.row_norms(self, None))

    def _split_base(self, name: str) -> None:
        """Moves the leading Kronecker components of the base weight into an adapter: W = rest + dW.

        The rest does not depend on values that the adapter has, so that loading one can repeat the split.
        """
        self.restore_base()
        weight, shapes = bases.dense_of(self.base_layer), self.shapes[name]
        alpha = self.scaling[name] / len(shapes)  # of each component, as the gate starts
        terms = fit(weight, shapes)
        rest = weight.clone()
        flat = [
            torch.cat([term[side].flatten() for term in terms]).div(alpha**0.5).to(self.moka_A[name].dtype)
            for side in (0, 1)
        ]
        for A, B in reference.split_factors(flat[0].float(), flat[1].float(), shapes):
            rest -= alpha * torch.kron(A, B)
        self.replaced = MergedBase(self.base_layer, 0.0)
        self.base_layer = bases.with_weight(self.base_layer, rest)
        if not self.moka_A[name].is_meta:
            self.moka_A[name].copy_(flat[0])
            self.moka_B[name].copy_(flat[1])

    def original_layer(self) -> nn.Module:
        """The base layer as it was before any adapter changed it, if none is merged."""
        if self.replaced is None:
            return self.base_layer
        return bases.moved(self.replaced.original, self.weight_device())

    def restore_base(self) -> None:
        """Undoes what init="residual" did to the base layer."""
        self.base_layer, self.replaced = self.original_layer(), None

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            StateError: it is merged.
        """
        if name in self.merged_adapters:
            raise StateError(f"adapter {name!r} is merged into the base weight; unmerge it first")
        if name in self.configs and self.configs[name].init == "residual":
            self.restore_base()
        for table in (*self.adapter_layer_names, *self.other_param_names):
            if name in getattr(self, table):
                del getattr(self, table)[name]
        self.active_adapters = [n for n in self.active_adapters if n != name]

    def set_adapter(self, names: Sequence[str]) -> None:
        """Makes exactly these adapters active and trainable; the layer may lack some of them.

        Raises:
            StateError: a merged adapter would be switched off.
        """
        active = [name for name in names if name in self.moka_A]
        for name in self.merged_adapters:
            if name not in active:
                raise StateError(f"adapter {name!r} is merged into the base weight; unmerge it first")
        self.active_adapters = active
        self.freeze(active)

    def freeze(self, trainable: Sequence[str]) -> None:
        """Makes what these adapters train trainable (`MokaConfig.train`), and nothing else."""
        for part, table in zip(PARTS, self.tables(), strict=True):
            for name, parameter in table.items():
                trained = name in trainable and part in self.configs[name].train
                # DistributedDataParallel waits for the gradient of every trainable parameter
                parameter.requires_grad_(trained and parameter.numel() > 0)

    def tables(self) -> tuple[nn.ParameterDict, ...]:
        """The parameters by adapter name, in the order of `adapter_layer_names`."""
        return self.moka_A, self.moka_B, self.moka_gate, self.moka_magnitude

    def used_adapters(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.configs]

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]`, in the dtype the base layer would return."""
        names = self.used_adapters()
        if self.merged_adapters:
            names = [name for name in names if name not in self.merged_adapters]
        if self.disable_adapters or (not names and self.rows is None):
            return self._base_forward(x)
        if self.rows is not None:
            return self.rows.forward(self, x)
        base: Any = self.base_layer
        dtype = bases.compute_dtype(base, x)
        inputs = x if dtype == x.dtype else x.to(dtype)
        directed = magnitude.directed(self, names)
        if any(self._apart(name, x) for name in names):
            y = base(x)
            for name in names:
                y = y + self.update(inputs, name).to(y.dtype)
            return y
        *factors, shapes = self.mixture(names, gate_dropout=self.training)
        if factors[0].is_meta and not x.is_meta:
            raise StateError(
                f"adapter {names[0]!r} is on the meta device; give it values with model.to_empty(device=...) "
                f"and reset_adapter on each layer, or with moka.load_adapter"
            )
        mixture, path = (*factors, flatten_shapes(shapes)), self.configs[names[0]].path
        y = self.product(inputs, mixture, path, with_bias=not directed)
        if directed:
            y = y * magnitude.direction(self, names[0]).to(y.dtype)
            y = y if base.bias is None else y + base.bias.to(dtype)
        return self.result(y, x)

    def product(self, x: Tensor, mixture: tuple, path: str, with_bias: bool = True) -> Tensor:
        """Base and mixture in one operation, for x in the base's `compute_dtype`."""
        bias: Any = self.base_layer.bias if with_bias else None
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return functional.linear(x, bases.op_args(self.base_layer), bias, mixture, path)

    def result(self, y: Tensor, x: Tensor) -> Tensor:
        """y in the dtype that the base would give it for x."""
        return y if y.dtype == x.dtype or not bases.is_linear4bit(self.base_layer) else y.to(x.dtype)

    def _apart(self, name: str, x: Tensor) -> bool:
        """Whether an adapter runs beside the base, not in one operation with it."""
        config = self.configs[name]
        if config.gate == "routed" or (self.training and config.dropout):  # the mixture sees another input
            return True
        low_rank = self.forms[name].low_rank and config.path != "merged" and not config.magnitude
        return low_rank and (config.path == "factored" or not x.is_cuda)

    def update(self, x: Tensor, name: str) -> Tensor:
        """What one adapter adds to the output for x `[..., K]`: activations run through its factors."""
        config, form = self.configs[name], self.forms[name]
        if self.training and config.dropout:
            x = nn.functional.dropout(x, config.dropout)
        if config.gate == "routed":
            routing = gates.route(self.moka_gate[name], x, self.scaling[name], config.gate_temperature)
            if self.training:
                self.routing = routing / self.scaling[name]
            return branches.routed(x, *self._dense(name), routing, form)
        if form.low_rank:
            B, alpha = at_least_fp32(self.moka_B[name]), self._train_alpha(name)
            return branches.low_rank(x, self._left(name), B, alpha, form)
        return functional.kron_mixture(x, *self.mixture([name], gate_dropout=self.training))

    def _base_forward(self, x: Tensor) -> Tensor:
        weight = getattr(self.base_layer, "weight", x)
        if self.merged_base is None or weight.dtype == x.dtype:
            return self.get_base_layer()(x)
        return self.base_layer(x.to(weight.dtype)).to(x.dtype)  # merged into another dtype

    def mixture(
        self, names: Sequence[str], gate_dropout: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, tuple[KronShape, ...]]:
        """(A, B, alpha, shapes) of several adapters as one mixture, as the operators take it."""
        parts = [
            (*self._dense(name), self._train_alpha(name) if gate_dropout else self.alpha(name))
            for name in names
        ]
        if len(names) == 1:
            return *parts[0], self.forms[names[0]].shapes
        A, B, alpha = (torch.cat(part) for part in zip(*parts, strict=True))
        return A, B, alpha, tuple(shape for name in names for shape in self.forms[name].shapes)

    def _dense(self, name: str) -> tuple[Tensor, Tensor]:
        """The dense factors, flat; the operators read fp32 beside any activations, and fp64."""
        return self._left(name), expand(at_least_fp32(self.moka_B[name]), self.forms[name].b)

    def _left(self, name: str) -> Tensor:
        A = expand(at_least_fp32(self.moka_A[name]), self.forms[name].a)
        return gates.mix_factors(self.moka_gate[name], A) if self.configs[name].gate == "matrix" else A

    def alpha(self, name: str) -> Tensor:
        """scale * gate, `[r]` fp32: what multiplies each component.

        Raises:
            StateError: the gate is routed, so that it depends on the token.
        """
        config = self.configs[name]
        logits = None if config.gate == "none" else self.moka_gate[name]
        r, like = len(self.shapes[name]), self.moka_A[name]
        return gates.scaled_gate(config.gate, logits, self.scaling[name], r, config.gate_temperature, like)

    def _train_alpha(self, name: str) -> Tensor:
        """`alpha` in a training step: without the components that a random number or `gate_dropout` leaves
        out."""
        alpha, config = self.alpha(name), self.configs[name]
        if not self.training:
            return alpha
        if config.nested:
            kept = torch.randint(1, len(alpha) + 1, (), device=alpha.device)
            alpha = gates.restrict(config.gate, alpha, kept, config.scale_for(kept))
        return nn.functional.dropout(alpha, config.gate_dropout) if config.gate_dropout else alpha

    def factors(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """`(A_i [ma, na], B_i [mb, nb])` of each component: dense, identities explicit; views of parameters
        that are fp32 and hold the entries."""
        return reference.split_factors(*self._dense(name), self.forms[name].shapes)

    @torch.no_grad()
    def delta_weight(self, name: str | None = None) -> Tensor:
        """The dense update `[N, K]` in fp32 of one adapter, or of all active ones."""
        names = self.used_adapters() if name is None else [name]
        zero = torch.zeros(self.out_features, self.in_features, device=self.weight_device())
        if not names:
            return zero
        A, B, alpha, shapes = self.mixture(names)
        delta = functional.kron_add(zero.to(A.dtype), A, B, alpha, shapes).float()
        return magnitude.change(self, names[0], delta) if magnitude.directed(self, names) else delta

    def base_weight(self) -> NF4Weight | Tensor:
        """The frozen weight `[N, K]`: of the base layer as it is now."""
        return bases.weight_of(self.base_layer)

    def weight_device(self) -> torch.device:
        """Where the base weight is."""
        return bases.device_of(self.base_layer)

    # Model code reads the dtype or device of its linear layers' weights; peft's tuner layers answer likewise.
    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it is stored."""
        return self.base_layer.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # pyright: ignore[reportReturnType]

    def get_base_layer(self) -> nn.Module:
        """The layer that was adapted, or what it was merged into."""
        return self.base_layer if self.merged_adapters else self.original_layer()

    def extra_repr(self) -> str:
        """Active adapters and their sizes."""
        active = ", ".join(f"{n} (r={len(self.shapes[n])})" for n in self.used_adapters())
        return f"active: {active or 'none'}"


def delta_weight(layer: MokaLinear, adapter_name: str | None = None) -> Tensor:
    """The dense update `[N, K]` of one adapted layer, fp32: for analysis and tests, never needed in training.

    Args:
        layer: as found by `moka.adapter_layers(model)`.
        adapter_name: one adapter; None for the sum of the active ones.

    Raises:
        ConfigError: `layer` is not adapted, or has no such adapter.

    Example:
        >>> layer = MokaLinear(torch.nn.Linear(4, 6))
        >>> layer.add_adapter("default", MokaConfig(), [KronShape(2, 2, 3, 2)])
        >>> moka.delta_weight(layer, "default").shape
        torch.Size([6, 4])
    """
    if not isinstance(layer, MokaLinear):
        raise ConfigError(
            f"delta_weight: expected an adapted layer (moka.adapter_layers), got {type(layer).__name__}"
        )
    if adapter_name is not None and adapter_name not in layer.configs:
        raise ConfigError(
            f"delta_weight: adapter {adapter_name!r} does not exist; the layer has {list(layer.configs)}"
        )
    return layer.delta_weight(adapter_name)
