"""Saving and loading adapters: `adapter_model.safetensors`, and `adapter_config.json` for tools that want it.

The safetensors file alone is the adapter: its metadata hold the manifest (`moka/manifest.py`), and
`adapter_config.json` is derived from it and not read. Keys are peft's: `base_model.model.<module>.moka_A`. A
file that peft saved has no manifest; then `adapter_config.json` is read, as untrusted as the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from . import layout, packed, safefile
from .config import ADAPTER_DTYPES, MokaConfig
from .errors import (
    CheckpointFormatError,
    CheckpointMismatchError,
    ConfigError,
    InjectionError,
    NonFiniteError,
    UnsafeFileError,
)
from .fingerprint import check_base, fingerprint
from .inject import (
    active_adapters,
    adapter_layers,
    check_adapter_name,
    check_model,
    eject,
    inject,
    require_adapters,
    saved_modules,
    set_adapter,
)
from .layers import MokaLinear
from .manifest import SCHEMES, Manifest, adapter_config_text, portable, read_peft_config
from .targets import find_targets
from .wrapped import refuse_wrapped, unwrapped

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA_KEY = "moka"  # a single key: safetensors writes several in no fixed order
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    *,
    quantize: str | None = None,
) -> dict[str, float]:
    """Writes one adapter into `directory`, made if need be; equal adapters give equal bytes.

    Each of the two files is replaced atomically, the adapter first: a save that is killed at any point leaves
    the old adapter or the new one, whole. Factors are stored in `adapter_dtype`, gates in fp32, and regular
    expressions in the configuration as the module paths that they matched.

    `quantize` makes the file smaller and loses some of the update: each factor entry becomes an integer of 8
    or 4 bits, `round(x Q / absmax)` with Q = 127 or 7 and the absmax of its group of 64 beside it, 8.5 or 4.5
    bits in all for fp32 factors. Gates, magnitudes and modules trained in full stay as they are.
    `moka.load_adapter` gives `q absmax / Q` in `adapter_dtype`, off by at most `absmax / (2 Q)` and that
    dtype's own rounding; saved again, that makes the same file. peft does not read such files.

    If the model is split over processes (FSDP2), every process must call this; the first one writes.

    Args:
        model: with adapters from `moka.inject`; compiled or wrapped for training too.
        directory: gets `adapter_model.safetensors` and `adapter_config.json`.
        adapter_name: which adapter; the name itself is not stored.
        quantize: "int8", "int4" or None.

    Returns:
        With `quantize`, the loss: path of each layer -> `|dW - dW'|_F / |dW|_F` of its update, from the
        factors (those of a routed gate weighed equally). Else nothing is lost, and the dict is empty, as it
        is on processes that do not write.

    Raises:
        ConfigError: another value of `quantize`, or no model in its place.
        StateError: no such adapter, it is merged, or the model is on the meta device.
        NonFiniteError: a tensor holds NaN or infinity; the old files stay.
        OSError: with the path; the old file stays.

    Example:
        >>> moka.save_adapter(model, "out/")          # doctest: +SKIP
        >>> max(moka.save_adapter(model, "small/", quantize="int8").values())          # doctest: +SKIP
        0.0071
    """
    check_model(model, "moka.save_adapter(model, directory)")
    check_adapter_name(adapter_name)
    if quantize is not None and quantize not in SCHEMES:
        raise ConfigError(f"quantize: got {quantize!r}, expected one of {(None, *SCHEMES)}")
    model = unwrapped(model)
    require_adapters(model, [adapter_name], "save them with model.save_pretrained(folder)")
    layers = {path: layer for path, layer in adapter_layers(model).items() if adapter_name in layer.configs}
    root: Any = model
    config = portable(root.moka_config[adapter_name], list(layers))
    targets = find_targets(model, config)
    if {target.module for target in targets} != set(layers.values()):
        raise ConfigError(
            f"target_modules of adapter {adapter_name!r}: no list of names selects the same modules, and a "
            f"file holds no regular expression; inject with names instead"
        )
    base = fingerprint(model, layout.base_weights(targets))
    current = layout.current_tensors(model, config, targets, adapter_name)
    expected = layout.expected_tensors(model, config, targets)
    tensors = {
        name: layout.full_tensor(current[name]).to("cpu", dtype, copy=True).contiguous()
        for name, (_, dtype) in expected.items()
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(
                f"{name} holds NaN or infinity; nothing was saved, train from the last good state"
            )
    if any(layout.is_sharded(tensor) for tensor in current.values()) and torch.distributed.get_rank() != 0:
        return {}
    errors: dict[str, float] = {}
    if quantize:
        exact, tensors = tensors, packed.pack(tensors, quantize)
        stored = packed.unpack(tensors, expected, quantize, str(directory))
        for target in targets:
            own = (_of_layer(values, target.path) for values in (exact, stored))
            module: Any = target.module
            errors[target.path] = packed.update_error(module, adapter_name, *own)
    shapes = {target.path: target.shapes for target in targets}
    copy = adapter_config_text(config, base, quantize).encode()
    manifest = Manifest(config, base, shapes, _checksums(tensors), _checksum(copy), quantize)
    data = safetensors.torch.save(tensors, {METADATA_KEY: manifest.to_text()})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    safefile.write_atomic(directory / WEIGHTS, data)
    safefile.write_atomic(directory / CONFIG, copy)
    return errors


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    *,
    allow_base_mismatch: bool = False,
    allow_nonfinite: bool = False,
) -> nn.Module:
    """Loads an adapter that `save_adapter` or peft wrote; an error leaves the model as it was.

    The files are not trusted: all is checked, against the model too, before anything is changed. If the model
    has no adapter of this name, one is injected with the stored configuration; else it gets the values.

    Args:
        model: the base that the adapter was trained on, adapted or not.
        directory: as given to `save_adapter`, or peft's `save_pretrained`.
        adapter_name: what the adapter is called in the model.
        allow_base_mismatch: accept a base with other weights or another quantization.
        allow_nonfinite: accept NaN and infinity.

    Returns:
        The same model.

    Raises:
        ConfigError: no model in its place, or a bad adapter name.
        FileNotFoundError: the directory holds no adapter.
        UnsafeFileError: a pickle, a link out of the directory, a FIFO, a configuration with more than data.
        CheckpointFormatError: damaged, truncated, or not an adapter of MoKA.
        CheckpointMismatchError: it does not fit the model, naming tensors or fields.
        BaseMismatchError: it fits, but was trained on another base.
        NonFiniteError: a tensor holds NaN or infinity.
        StateError: the model has merged adapters, or is on the meta device.

    Example:
        >>> model = moka.load_adapter(model, "out/")          # doctest: +SKIP
    """
    check_model(model, "moka.load_adapter(model, directory)")
    check_adapter_name(adapter_name)
    given, model = model, unwrapped(model)
    require_adapters(model, [], "load further ones with model.load_adapter")
    if adapter_name not in getattr(model, "moka_config", {}):
        refuse_wrapped(given, "moka.load_adapter")  # it would be injected
    directory = Path(directory)
    where = str(directory / WEIGHTS)
    _refuse_pickles(directory)
    if not (directory / WEIGHTS).exists():
        raise FileNotFoundError(
            f"{where}: no such file; expected the folder of a saved adapter. From the hub: "
            f'huggingface_hub.snapshot_download(repo, local_dir="adapter")'
        )
    max_tensors = max(safefile.MAX_TENSORS, 6 * sum(1 for _ in model.modules()))
    with safefile.open_untrusted(directory, WEIGHTS) as descriptor:
        header = safefile.read_header(descriptor, where, max_tensors, safefile.PACKED_BYTES)
        manifest, config = None, None
        if METADATA_KEY in header.metadata:
            manifest = Manifest.from_text(header.metadata[METADATA_KEY], where)
            config = manifest.config
        else:
            config = _peft_config(directory, where, header)
        existing = getattr(model, "moka_config", {}).get(adapter_name)
        try:
            targets = find_targets(model, config)
            if manifest is not None and (by_layer := layout.with_stored_shapes(manifest, targets)) != config:
                config = by_layer
                targets = find_targets(model, config)
            if existing is not None:
                layout.check_fields(where, config, portable(existing, layout.layer_paths(header.tensors)))
            expected = layout.expected_tensors(model, config, targets)
        except (InjectionError, ConfigError) as error:
            raise CheckpointMismatchError(f"{where}: does not fit this model: {error}") from error
        scheme = manifest.quantize if manifest is not None else None
        stored = packed.packed_layout(expected, scheme) if scheme else expected
        layout.check_tensors(where, header.tensors, stored)
        weights = layout.base_weights(targets)
        if manifest is not None:
            layout.check_shapes(where, manifest, targets)
            base = fingerprint(model, weights)
            if not allow_base_mismatch:
                check_base(where, manifest.base, base)
        data = safefile.read_all(descriptor, where, header)
    tensors = safetensors.torch.load(data)
    if manifest is not None:
        _check_sums(where, tensors, manifest)
    _check_finite(where, tensors, allow_nonfinite)
    if scheme:
        tensors = packed.unpack(tensors, expected, scheme, where)
    layout.check_tied(where, tensors, config, targets)
    if manifest is not None:
        _warn_if_stale(directory, manifest.adapter_config)
    else:
        warnings.warn(
            f"{where}: was saved by peft, without a fingerprint of its base and without checksums, so "
            f"neither could be checked; moka.save_adapter writes both",
            stacklevel=2,
        )
    _apply(model, tensors, config, adapter_name)
    return given


def _peft_config(directory: Path, where: str, header: safefile.Header) -> MokaConfig:
    """The configuration of an adapter that peft saved, from `adapter_config.json` and the tensors' dtype."""
    path = str(directory / CONFIG)
    try:
        with safefile.open_untrusted(directory, CONFIG) as descriptor:
            config = read_peft_config(safefile.read_text(descriptor, path), path)
    except FileNotFoundError:
        raise CheckpointFormatError(
            f"{where}: has no manifest and no {CONFIG} beside it, so neither moka.save_adapter nor peft "
            f"wrote it in full; save the adapter again"
        ) from None
    # trainers cast what they train, and peft does not note that
    stored = {header.tensors[name].dtype for name in header.tensors if name.endswith(layout.FACTORS)}
    dtypes = [name for name in ADAPTER_DTYPES if layout.DTYPES[getattr(torch, name)] in stored]
    return replace(config, adapter_dtype=dtypes[0]) if len(dtypes) == len(stored) == 1 else config


def _refuse_pickles(directory: Path) -> None:
    """A pickle in place of the safetensors file gets a better answer than "no such file"."""
    found = [directory] if directory.is_file() else sorted(directory.glob("*"))
    pickles = [path for path in found if path.suffix in PICKLES]
    if pickles and not (directory / WEIGHTS).exists():
        raise UnsafeFileError(
            f"{pickles[0]}: a {pickles[0].suffix} file is a pickle, which can run any code when loaded; "
            f"expected {WEIGHTS} in a directory, as moka.save_adapter writes it"
        )


def _of_layer(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Factors and gate of one layer, by the names of their tables."""
    names = ((table, f"{layout.PREFIX}{path}.{table}") for table in MokaLinear.adapter_layer_names)
    return {table: tensors[name] for table, name in names if name in tensors}


def _checksums(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Of the bytes, name, dtype and shape of each tensor, in the order of the names."""
    return tuple(
        _checksum(
            f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(),
            tensor.reshape(-1).view(torch.uint8).numpy().data,
        )
        for name, tensor in sorted(tensors.items())
    )


def _checksum(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def _check_sums(where: str, tensors: dict[str, Tensor], manifest: Manifest) -> None:
    found = _checksums(tensors)
    if len(found) != len(manifest.checksums):
        raise CheckpointFormatError(f"{where}: {len(manifest.checksums)} checksums, expected {len(found)}")
    for name, checksum, stored in zip(sorted(tensors), found, manifest.checksums, strict=True):
        if checksum != stored:
            raise CheckpointFormatError(f"{where}: tensor {name} is corrupt, its checksum does not match")


def _check_finite(where: str, tensors: dict[str, Tensor], allow_nonfinite: bool) -> None:
    for name, tensor in sorted(tensors.items()):
        if not allow_nonfinite and not tensor.isfinite().all():
            raise NonFiniteError(
                f"{where}: {name} holds NaN or infinity; pass allow_nonfinite=True to load it"
            )


def _warn_if_stale(directory: Path, expected: str) -> None:
    try:
        with safefile.open_untrusted(directory, CONFIG) as descriptor:
            same = _checksum(os.pread(descriptor, safefile.MAX_HEADER_BYTES, 0)) == expected
    except FileNotFoundError:
        return
    if not same:
        warnings.warn(
            f"{directory / CONFIG} differs from the configuration in {WEIGHTS}, which is the one in use; "
            f"saving the adapter again writes both",
            stacklevel=3,
        )


@torch.no_grad()
def _apply(model: nn.Module, tensors: dict[str, Tensor], config: MokaConfig, adapter_name: str) -> None:
    """Injects the adapter unless it is there, and copies the values; an interrupt undoes both."""
    with contextlib.ExitStack() as undo:
        if adapter_name not in getattr(model, "moka_config", {}):
            active = active_adapters(model)
            inject(model, config, adapter_name, initialize=False)
            undo.callback(_remove, model, adapter_name, active)
        current = layout.current_tensors(model, config, find_targets(model, config), adapter_name)
        for name, tensor in tensors.items():
            undo.callback(current[name].copy_, current[name].clone())
            current[name].copy_(layout.part_of(tensor, current[name]))
        undo.pop_all()


def _remove(model: Any, adapter_name: str, active: list[str]) -> None:
    if len(model.moka_config) == 1:
        eject(model)
        return
    for layer in adapter_layers(model).values():
        layer.delete_adapter(adapter_name)
    for module in saved_modules(model).values():
        if adapter_name in module.modules_to_save:
            module.delete_adapter(adapter_name)
    del model.moka_config[adapter_name]
    set_adapter(model, active)
