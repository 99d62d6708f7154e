"""`MokaConfig` for peft: `moka.MokaConfig` with what peft wants to know besides."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from ...config import FORMAT_VERSION, PARTS
from ...config import MokaConfig as CoreConfig
from ...errors import ConfigError
from ...manifest import FIELDS, PACKED_VERSION, from_peft


class _MokaType(str):
    """The name of the method, as a member of peft's enumeration of methods would behave."""

    @property
    def value(self) -> str:
        """The plain string."""
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        """As an enumeration shows it."""
        return f"PeftType.{self.value}"


MOKA: Any = PeftType.__members__.get("MOKA", _MokaType("MOKA"))


@dataclass
class MokaConfig(PeftConfig):
    """Configuration of a MoKA adapter for peft; the fields mean what they mean in `moka.MokaConfig`.

    Besides those it has peft's own (`task_type`, `base_model_name_or_path`, `inference_mode`, ...), and takes
    some of LoRA's names, so that a script for `LoraConfig` runs as it is.

    Args:
        target_modules: None takes what peft's LoRA adapts in this kind of model.
        trainable_token_indices: tokens whose embeddings are trained as well, as for `LoraConfig`.
        lora_alpha: `scale`: the weight of each component is scale/r, as it is alpha/r in LoRA.
        lora_dropout: `dropout`.
        rank_pattern: `r_pattern`.
        bias: "none" alone; MoKA trains no biases.

    Raises:
        ConfigError: on construction, naming the field, the value and what is expected.

    Example:
        >>> config = MokaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=10)
        >>> model = peft.get_peft_model(model, config)          # doctest: +SKIP
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    r: int = 10
    shapes: Any = "balanced"
    gate: str = "softmax"
    gate_temperature: float = 1.0
    scale: float | str | None = None
    init: str = "default"
    magnitude: bool = False
    train: list[str] | tuple[str, ...] = PARTS
    tie: str | None = None
    nested: bool = False
    dropout: float = 0.0
    gate_dropout: float = 0.0
    path: str = "auto"
    r_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    adapter_dtype: str = "float32"
    strict: bool = True
    format_version: int = FORMAT_VERSION
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    lora_alpha: InitVar[float | None] = None
    lora_dropout: InitVar[float | None] = None
    rank_pattern: InitVar[dict[str, int] | None] = None
    bias: InitVar[str] = "none"

    def __post_init__(self, lora_alpha: Any, lora_dropout: Any, rank_pattern: Any, bias: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes LoRA's names and validates every field."""
        super().__post_init__()
        self.peft_type = MOKA
        if self.format_version == PACKED_VERSION:
            raise ConfigError(
                "this adapter is stored in int8 or int4, which moka.load_adapter alone reads; write it anew "
                "for peft: moka convert --adapter FOLDER --to float --output NEW"
            )
        for name, default, lora_name, value in (
            ("scale", None, "lora_alpha", lora_alpha),
            ("dropout", 0.0, "lora_dropout", lora_dropout),
            ("r_pattern", {}, "rank_pattern", rank_pattern),
        ):
            if value is not None:
                if getattr(self, name) != default:
                    raise ConfigError(f"{lora_name} is another name of {name}; got both, expected one")
                setattr(self, name, value)
        if bias != "none":
            raise ConfigError(
                f"bias: got {bias!r}, expected 'none'; name modules to train in modules_to_save"
            )
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset, tuple)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"
        self.to_moka()

    @classmethod
    def from_moka(cls, config: CoreConfig, **fields: Any) -> MokaConfig:
        """The same configuration for peft, such as one of `moka.preset`.

        Args:
            config: of moka.
            fields: peft's own.

        Example:
            >>> MokaConfig.from_moka(moka.preset("gralora", r=32), task_type="CAUSAL_LM").gate
            'none'
        """
        return cls(**{name: getattr(config, name) for name in FIELDS}, **fields)

    def to_moka(self) -> CoreConfig:
        """The same configuration for `moka.inject`.

        Raises:
            ConfigError: a bad value.
        """
        values = from_peft(vars(self))
        sets = {name: sorted(value) for name, value in values.items() if isinstance(value, set)}
        return CoreConfig.from_dict({**values, **sets})

    def to_dict(self) -> dict[str, Any]:
        """All fields; peft keeps some names in sets, which are sorted here so that equal adapters are equal
        files."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}
