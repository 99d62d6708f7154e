"""`export_lora`: an adapter as a LoRA of peft, for servers that know no other kind.

    dW = scale * sum_i gate_i (A_i kron B_i) = U S V^T       lora_B = U_r S_r^1/2, lora_A = S_r^1/2 V_r^T

Exact where r is at least the rank of dW, which is at most `sum_i rank A_i * rank B_i`; else the nearest
matrix of rank r (Eckart-Young), and the share of the update that it lacks is reported:
`|dW - dW_r|_F^2 / |dW|_F^2`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import safefile
from .checkpoint import CONFIG, WEIGHTS
from .errors import ConfigError, NonFiniteError, StateError
from .fingerprint import fingerprint
from .inject import adapter_layers, require_adapters, saved_modules
from .layers import MokaLinear
from .targets import walk
from .wrapped import unwrapped

OVERSAMPLE = 16  # extra directions of the randomized SVD
POWER_STEPS = 4  # its passes over the matrix and back; the spectrum of an update may decay slowly


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an adapter in another form.

    Attributes:
        path: where it is.
        shape: (out_features, in_features).
        rank: of its two matrices, before any padding to that of the widest layer; components of a mixture.
        energy, discarded: |dW|_F^2, and what is missing of it, |dW - B A|_F^2 of the matrices as written.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    energy: float
    discarded: float

    @property
    def discarded_share(self) -> float:
        """The share of the update's energy that is lost."""
        return self.discarded / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class Export:
    """What `export_lora` wrote or a function of `moka.convert` made; `str()` of it is a table."""

    layers: tuple[ExportedLayer, ...]

    @property
    def rank(self) -> int:
        """The largest rank: `r` of the configuration."""
        return max(layer.rank for layer in self.layers)

    @property
    def discarded_share(self) -> float:
        """The share of the energy of all updates together that is lost."""
        energy = sum(layer.energy for layer in self.layers)
        return sum(layer.discarded for layer in self.layers) / energy if energy else 0.0

    def __str__(self) -> str:
        width = max(len(layer.path) for layer in self.layers)
        lines = [
            f"{layer.path:<{width}}  {layer.shape[0]} x {layer.shape[1]}, rank {layer.rank}, "
            f"discarded energy {layer.discarded_share:.2e}"
            for layer in self.layers
        ]
        total = f"{len(self.layers)} layers, r = {self.rank}, discarded energy {self.discarded_share:.2e}"
        return "\n".join([*lines, total])


@torch.no_grad()
def export_lora(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    rank_pattern: bool = False,
) -> Export:
    """Writes an adapter as a LoRA: `adapter_config.json` and `adapter_model.safetensors` as peft does.

    The LoRA belongs on the base that the adapter was trained on, the same 4-bit one. Its scale is 1 in every
    layer (`lora_alpha` = `r`). Each update is formed as a dense matrix, one layer at a time on the layer's
    device. Up to about half of its full rank a randomized SVD does, which takes seconds for 4096 x 4096 on
    two CPU cores; a full one takes minutes: give `rank` with `energy` to bound it.

    Args:
        model: with adapters from `moka.inject`; it is not changed.
        directory: made if need be. An older LoRA in it is replaced, each file atomically; another kind of
            adapter is not.
        adapter_name: which adapter.
        rank: the largest rank; a layer of lower rank is exact. None for no bound.
        energy: in each layer the smallest rank that holds this share of |dW|_F^2 (0 to 1); None for all.
        rank_pattern: each layer has its own rank, in `rank_pattern` and `alpha_pattern` of the configuration.
            By default all have the largest of them, padded with zeros, as some servers need.

    Returns:
        Ranks and discarded energy, per layer and in total.

    Raises:
        ConfigError: a value is out of range, the folder holds another kind of adapter, or the adapter has
            what a LoRA has not: modules trained in full, a layer reached by several paths.
        StateError: no such adapter, or it is on the meta device.
        NonFiniteError: an update holds NaN or infinity; nothing is written.

    Example:
        >>> print(moka.export_lora(model, "lora", rank=64))          # doctest: +SKIP
    """
    model = unwrapped(model)
    layers = exportable_layers(model, adapter_name)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ConfigError(f"rank: got {rank!r}, expected a positive integer or None")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy: got {energy!r}, expected a share above 0 and at most 1, or None")
    directory = Path(directory)
    refuse_other_adapter(directory, "LORA")
    exported, factors = [], {}
    for path, layer in layers.items():
        delta = layer.delta_weight(adapter_name)
        if not delta.isfinite().all():
            raise NonFiniteError(
                f"{path}: the update of adapter {adapter_name!r} holds NaN or infinity; nothing was written"
            )
        A, B = _low_rank(delta, _rank_bound(layer, adapter_name), rank, energy)
        figures = (t.double().square().sum().item() for t in (delta, delta - B @ A))
        exported.append(ExportedLayer(path, (B.shape[0], A.shape[1]), len(A), *figures))
        factors[path] = A.cpu().contiguous(), B.cpu().contiguous()
    export = Export(tuple(exported))
    tensors = {}
    for path, (A, B) in factors.items():
        missing = 0 if rank_pattern else export.rank - len(A)
        tensors[f"base_model.model.{path}.lora_A.weight"] = nn.functional.pad(A, (0, 0, 0, missing))
        tensors[f"base_model.model.{path}.lora_B.weight"] = nn.functional.pad(B, (0, missing))
    config = _lora_config(model, export, rank_pattern)
    write_adapter(directory, config, tensors)
    return export


def exportable_layers(model: nn.Module, name: str) -> dict[str, MokaLinear]:
    """The layers that an adapter adapts, once nothing stands against writing it in another form."""
    require_adapters(model, [name], "save them with model.save_pretrained(folder), then moka export-lora")
    if trained := [path for path, copy in saved_modules(model).items() if name in copy.modules_to_save]:
        raise ConfigError(
            f"modules_to_save: adapter {name!r} trains {trained} in full, which that form cannot hold; merge "
            f"it into the model (moka.merge), or train without modules_to_save"
        )
    layers = {path: layer for path, layer in adapter_layers(model).items() if name in layer.configs}
    if any(layer.replaced is not None for layer in layers.values()):
        raise ConfigError(
            f"adapter {name!r}: init='residual' changed the base that it belongs on; merge it instead"
        )
    for path, module in walk(model):
        if module in layers.values() and path not in layers:
            raise ConfigError(
                f"{path}: shares its layer with another path, and peft would adapt one of them alone; merge "
                f"the adapter into the model instead (moka.merge)"
            )
    for path, layer in layers.items():
        if layer.moka_A[name].is_meta:
            raise StateError(f"{path}: adapter {name!r} is on the meta device; load it first")
    return layers


def write_adapter(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes the two files of an adapter of peft, each atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    # a kill in between leaves a folder that peft refuses, and into which the same call can write again
    safefile.write_atomic(directory / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    safefile.write_atomic(directory / WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))


def refuse_other_adapter(directory: Path, kind: str) -> None:
    """A folder keeps its adapter if that is of another kind than is to be written.

    Raises:
        ConfigError: naming both kinds.
    """
    if not (directory / WEIGHTS).exists():
        return
    try:
        found = json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        found = "unknown"
    if found != kind:
        raise ConfigError(
            f"{directory}: holds an adapter of type {found!r}, which the {kind} would replace; choose "
            f"another folder"
        )


def _rank_bound(layer: MokaLinear, name: str) -> int:
    """`sum_i rank A_i * rank B_i`, by the sizes of the factors; any rank if rows are scaled."""
    if name in layer.moka_magnitude:
        return min(layer.out_features, layer.in_features)
    return sum(min(s.ma, s.na) * min(s.mb, s.nb) for s in layer.shapes[name])


def _low_rank(delta: Tensor, bound: int, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """`A [r, K]` and `B [N, r]` with B A nearest to the update, for the rank that is asked for."""
    full = min(delta.shape)
    needed = min(full, bound, *([] if rank is None else [rank + OVERSAMPLE]))
    if 2 * needed < full:
        with torch.random.fork_rng(devices=[delta.device] if delta.is_cuda else []):
            torch.manual_seed(0)  # equal adapters give equal files
            U, S, V = torch.svd_lowrank(delta, needed, POWER_STEPS)
        Vh = V.mT
    else:
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    # what is below is rounding, as in torch.linalg.matrix_rank
    rounding = max(delta.shape) * torch.finfo(S.dtype).eps
    r = int((rounding * S[0] < S).sum())
    if energy is not None:
        held = S.double().square().cumsum(0)
        wanted = energy * delta.double().square().sum()
        r = min(r, int((held < wanted).sum()) + 1)
    r = max(1, r if rank is None else min(r, rank))  # peft has no rank 0
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def _lora_config(model: nn.Module, export: Export, rank_pattern: bool) -> dict[str, Any]:
    """peft's `LoraConfig`: the fields that servers read; peft has defaults for the others."""
    ranks = {layer.path: layer.rank for layer in export.layers if layer.rank != export.rank}
    patterns = ranks if rank_pattern else {}
    return {
        **peft_fields(model, "LORA", [layer.path for layer in export.layers]),
        "r": export.rank,
        "lora_alpha": export.rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def peft_fields(model: nn.Module, kind: str, paths: Iterable[str]) -> dict[str, Any]:
    """What the configurations of all of peft's methods have."""
    base = fingerprint(model, ())
    return {
        "peft_type": kind,
        "task_type": base["task_type"] or None,
        "base_model_name_or_path": base["name_or_path"],
        "inference_mode": True,
        "target_modules": _target_modules(model, paths),
        "modules_to_save": None,
    }


def _target_modules(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Last names, such as `q_proj`, if they select these layers and no other; else the paths."""
    paths = set(paths)
    names = {path.rpartition(".")[2] for path in paths}
    selected = {path for path, _ in walk(model) if path.rpartition(".")[2] in names}
    return sorted(names if selected == paths else paths)
