"""MoKA as a method of peft: importing this module makes peft know it.

    from moka.integrations.peft import MokaConfig          # instead of: from peft import LoraConfig
    model = peft.get_peft_model(model, MokaConfig(task_type="CAUSAL_LM"))

A process that only loads an adapter must import it too; `moka run -- <command>` does so for any program in
Python.
"""

from __future__ import annotations

from typing import Any

try:
    from peft import mapping
except ImportError as error:
    raise ImportError("moka.integrations.peft needs peft; install moka[peft]") from error

from .config import MOKA, MokaConfig
from .hotswap import hotswap_adapter
from .layer import MokaPeftLinear
from .model import MokaModel

__all__ = ["MOKA", "MokaConfig", "MokaModel", "MokaPeftLinear", "hotswap_adapter"]


def register(
    configs: dict[Any, Any] = mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
    tuners: dict[Any, Any] = mapping.PEFT_TYPE_TO_TUNER_MAPPING,
    prefixes: dict[Any, Any] = mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
) -> None:
    """Enters MoKA in peft's tables of methods.

    Raises:
        ImportError: this peft has a MoKA of its own, which then is the one to use.
    """
    if configs.get(MOKA, MokaConfig) is not MokaConfig:
        raise ImportError(f"this peft has MoKA built in ({configs[MOKA]}); use peft's own MokaConfig")
    configs[MOKA], tuners[MOKA], prefixes[MOKA] = MokaConfig, MokaModel, MokaModel.prefix


register()
