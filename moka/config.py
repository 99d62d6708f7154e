"""`MokaConfig`: what to adapt and how. It holds data only; `moka.inject` does the work."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ConfigError
from .factors import parse
from .functional import PATHS
from .gates import GATES, UNIFORM, is_gate
from .init import INITS
from .rules import MAX_R, parse_rule

#: Written into every saved configuration. Raise it when the meaning of a field changes; older ones must keep
#: loading.
FORMAT_VERSION = 1
ADAPTER_DTYPES = ("float32", "bfloat16", "float16")
ShapeSpec = str | tuple[tuple[int | str, ...], ...]
#: What other libraries call a field or an option -> what moka may call it; spelling alone leads elsewhere.
OTHER_NAMES = {
    "rank": ("r",),
    "lora_rank": ("r", "rank"),
    "lora_alpha": ("alpha", "scale"),
    "lora_dropout": ("dropout",),
    "rank_pattern": ("r_pattern",),
    "use_dora": ("magnitude",),
}
#: What an adapter can train, in the order of `MokaLinear.adapter_layer_names`.
PARTS = ("A", "B", "gate", "magnitude")


@dataclass(frozen=True)
class MokaConfig:
    """Configuration of one adapter; names follow peft's where peft has them. The defaults are the paper's.

    Attributes:
        target_modules: suffixes of module paths, one regular expression for whole paths (a string), or
            "all-linear": every linear layer but the output embedding.
        exclude_modules: suffixes or a regular expression of modules to leave alone.
        layers_to_transform: indices of the layers to adapt, the first number in a module path; None for all.
        r: components of each mixture.
        shapes: "balanced" (the paper's), "identity" (MoKA_s), another rule of `moka.rules`, a list of
            `(ma, na, mb, nb)` (and what else a `KronShape` holds) which then sets the number of components,
            or a dict from module pattern to one of these; modules that match none are balanced.
        gate: "softmax", "linear", "none" or another of `moka.gates`.
        gate_temperature: T of the gates that are a softmax.
        scale: factor on the gated sum; None means the number of components, which undoes the 1/r of a uniform
            gate; "sqrt" its square root, for an output that does not grow with r (rsLoRA's rule).
        init: "default" (A random, B zero), "swapped", "svd" (the leading Kronecker components of the base
            weight, with a gate of zeros: for gate="matrix" or "linear"), or "residual" (the same with its
            gate, and the base becomes what is left, in 4 bits again if it was: SoKA, arXiv 2506.15251). What
            is left of a weight is as hard to quantize as the weight: expect another direction of training,
            not a smaller error.
        magnitude: train the norm of each row apart from its direction (DoRA, `moka/magnitude.py`).
        train: which of "A", "B", "gate" and "magnitude" are trained; the others stay as they start.
        tie: "A" or "B": the layers whose components agree share these factors; None: each has its own.
        nested: in a training step each layer uses its first k components, k drawn anew, so that every prefix
            is an adapter (DyLoRA, arXiv 2210.07558).
        dropout: on the mixture's input. The paper uses 0.1; it is 0 here since dropout rules out the merged
            path.
        gate_dropout: probability that a component is left out in a training step.
        path: "auto", "merged" or "factored".
        r_pattern: module pattern -> r, for layers that differ.
        modules_to_save: suffixes of modules that are trained in full and saved with the adapter.
        adapter_dtype: of the factors: "float32", "bfloat16" or "float16"; gates are always fp32.
        strict: refuse patterns that match nothing and prime dimensions; otherwise warn.

    A module pattern (a key of `shapes` or `r_pattern`) is a regular expression for the end of a path, from a
    dot on; the first that matches counts.

    Raises:
        ConfigError: on construction, naming the field, the value and what is expected.

    Example:
        >>> MokaConfig(target_modules=["q_proj", "v_proj"], r_pattern={"v_proj": 5}).r
        10
    """

    target_modules: str | Sequence[str] = ("q_proj", "v_proj")
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    r: int = 10
    shapes: str | Sequence[Sequence[int]] | Mapping[str, Any] = "balanced"
    gate: str = "softmax"
    gate_temperature: float = 1.0
    scale: float | str | None = None
    init: str = "default"
    magnitude: bool = False
    train: Sequence[str] = PARTS
    tie: str | None = None
    nested: bool = False
    dropout: float = 0.0
    gate_dropout: float = 0.0
    path: str = "auto"
    r_pattern: Mapping[str, int] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    adapter_dtype: str = "float32"
    strict: bool = True

    def __post_init__(self) -> None:
        """Validates every field; sequences become tuples, so that equal configurations compare equal."""
        if isinstance(self.layers_to_transform, int) and not isinstance(self.layers_to_transform, bool):
            self._set("layers_to_transform", (self.layers_to_transform,))
        self._set(
            "target_modules", _check_patterns("target_modules", self.target_modules, may_be_empty=False)
        )
        self._set("exclude_modules", _check_patterns("exclude_modules", self.exclude_modules))
        self._set("modules_to_save", _check_names("modules_to_save", self.modules_to_save))
        if self.layers_to_transform is not None:
            layers = _check_list(
                "layers_to_transform", self.layers_to_transform, "a list of layer indices or None"
            )
            if not layers:
                _fail(
                    "layers_to_transform",
                    layers,
                    "at least one layer index (no layer is chosen), or None for all",
                )
            self._set(
                "layers_to_transform", tuple(_check_int("layers_to_transform", i, 0, 2**31) for i in layers)
            )
        _check_int("r", self.r, 1, MAX_R)
        self._set("r_pattern", _check_mapping("r_pattern", self.r_pattern))
        for pattern, r in self.r_pattern.items():
            _check_int(f"r_pattern[{pattern!r}]", r, 1, MAX_R)
        if isinstance(self.shapes, Mapping):
            items = _check_mapping("shapes", self.shapes).items()
            self._set("shapes", {k: _check_shapes(f"shapes[{k!r}]", v) for k, v in items})
        else:
            self._set("shapes", _check_shapes("shapes", self.shapes))
        if not is_gate(self.gate):
            _fail("gate", self.gate, f"one of {GATES}")
        self._set("train", _check_names("train", self.train))
        if not self.train or set(self.train) - set(PARTS):
            _fail("train", self.train, f"some of {PARTS}")
        choices = {"init": INITS, "tie": (None, "A", "B"), "path": PATHS, "adapter_dtype": ADAPTER_DTYPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                _fail(name, getattr(self, name), f"one of {allowed}")
        for name in ("dropout", "gate_dropout"):
            self._set(name, _check_number(name, getattr(self, name)))
            if not 0.0 <= getattr(self, name) < 1.0:
                _fail(name, getattr(self, name), "a probability of at least 0 and below 1")
        for name, special in (("scale", (None, "sqrt")), ("gate_temperature", ())):
            if getattr(self, name) not in special:
                self._set(name, _check_number(name, getattr(self, name)))
                if getattr(self, name) <= 0:
                    _fail(name, getattr(self, name), f"a number above 0{', None or sqrt' if special else ''}")
        for name in ("strict", "nested", "magnitude"):
            if not isinstance(getattr(self, name), bool):
                _fail(name, getattr(self, name), "True or False")
        if self.magnitude and (self.dropout or self.gate == "routed"):
            _fail("magnitude", True, "dropout=0 and a gate that is the same for all tokens with it")
        if self.init == "residual" and self.gate not in UNIFORM:
            _fail("init", self.init, f"a gate that starts uniform with it: one of {UNIFORM}")
        if self.init == "svd" and self.gate not in ("matrix", "linear"):
            _fail("init", self.init, "gate='matrix' or 'linear' with it, which can be zero")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def r_for(self, path: str) -> int:
        """The number of components for the module at `path`, unless an explicit list of shapes sets it."""
        return next((r for key, r in self.r_pattern.items() if pattern_matches(key, path)), self.r)

    def scale_for(self, r: Any) -> Any:
        """The factor on the gated sum of r components, a number or a tensor."""
        if self.scale == "sqrt":
            return r**0.5
        return r * 1.0 if self.scale is None else self.scale

    def shapes_for(self, path: str) -> ShapeSpec:
        """The shape specification for the module at `path`."""
        if not isinstance(self.shapes, dict):
            return self.shapes  # pyright: ignore[reportReturnType]
        return next((s for key, s in self.shapes.items() if pattern_matches(key, path)), "balanced")

    def __getattr__(self, name: str) -> Any:
        # what peft asks of its own configurations first
        hint = "; peft takes MokaConfig of moka.integrations.peft, MokaConfig.from_moka(config) makes it"
        told = hint if name in ("base_model_name_or_path", "peft_type") else ""
        raise AttributeError(f"moka.MokaConfig has no attribute {name!r}{told}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types, after `format_version`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"format_version": FORMAT_VERSION, **json.loads(json.dumps(values))}

    def to_json(self) -> str:
        """`to_dict` as indented JSON with a final newline; the same bytes for equal configurations."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MokaConfig:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            ConfigError: an unknown key (with the nearest valid one), a bad value, or a newer format.
        """
        values = dict(values)
        version = _check_int("format_version", values.pop("format_version", FORMAT_VERSION), 1, 2**31)
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"format_version: the configuration has format {version}, this moka reads up to "
                f"{FORMAT_VERSION}; install a newer moka"
            )
        names = [f.name for f in fields(cls)]
        for key in values:
            if key not in names:
                nearest = nearest_name(str(key), names)
                raise ConfigError(f"unknown key {key!r}; the nearest valid key is {nearest!r}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> MokaConfig:
        """The inverse of `to_json`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"the configuration is a JSON {type(values).__name__}, expected an object")
        return cls.from_dict(values)


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a module pattern matches `path`, or the end of it from a dot on."""
    return re.fullmatch(rf"(.*\.)?({pattern})", path) is not None


def nearest_name(key: str, names: Sequence[str]) -> str:
    """The name that an unknown one most likely stands for: a synonym, else the nearest in spelling."""
    synonyms = [name for name in OTHER_NAMES.get(key, ()) if name in names]
    return (synonyms or difflib.get_close_matches(key, names, n=1, cutoff=0.0))[0]


def _fail(name: str, value: Any, expected: str) -> None:
    raise ConfigError(f"{name}: got {value!r}, expected {expected}")


def _check_int(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _fail(name, value, f"an integer from {low} to {high}")
    return value


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        _fail(name, value, "a finite number")
    return float(value)


def _check_list(name: str, value: Any, expected: str) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        _fail(name, value, expected)
    return value


def _check_names(name: str, value: Any) -> tuple[str, ...]:
    names = _check_list(name, value, "a list of module names")
    if not all(isinstance(n, str) and n for n in names):
        _fail(name, value, "a list of non-empty strings")
    return tuple(names)


def _check_patterns(name: str, value: Any, may_be_empty: bool = True) -> str | tuple[str, ...]:
    if isinstance(value, str):
        _check_regex(name, value)
        return value
    names = _check_names(name, value)
    if not names and not may_be_empty:
        _fail(name, value, "at least one module name")
    return names


def _check_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        _fail(name, value, f"a regular expression ({error})")


def _check_mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        _fail(name, value, "a dict from module pattern to value")
    for key in value:
        _check_regex(name, key)
    return dict(value)


def _check_shapes(name: str, value: Any) -> ShapeSpec:
    expected = f"a rule such as 'balanced' or a non-empty list of at most {MAX_R} (ma, na, mb, nb)"
    if isinstance(value, str):
        parse_rule(name, value)
        return value
    rows = [_check_list(name, row, expected) for row in _check_list(name, value, expected)]
    if not 1 <= len(rows) <= MAX_R or not all(len(row) in (4, 5, 7) for row in rows):
        _fail(name, value, expected)
    for row in rows:
        for size in row[:4]:
            _check_int(name, size, 1, 2**31)
        for identity in row[4:5]:
            _check_int(name, identity, 0, 2)
        for kind in row[5:]:
            if not isinstance(kind, str):
                _fail(name, kind, "the kind of a factor, such as 'dense'")
            parse(kind)
    return tuple(tuple(row) for row in rows)
