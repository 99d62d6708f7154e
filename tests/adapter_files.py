"""A small model with two blocks, adapters for it, and the tools to compare and forge their files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import moka
from moka import checkpoint, manifest
from moka.checkpoint import CONFIG, WEIGHTS

DEFAULTS: dict[str, Any] = {"target_modules": ["q", "v"], "r": 3}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.norm = nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.LayerNorm(8)


def base(seed: int = 0, blocks: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(Block() for _ in range(blocks)))


def adapted(seed: int = 1, model: nn.Module | None = None, **config: Any) -> nn.Module:
    """A model with an adapter "default" whose every tensor is random."""
    model = moka.inject(model or base(), moka.MokaConfig(**{**DEFAULTS, **config}))
    return randomize(model, seed)


def randomize(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Edits tensors and manifest of a file and makes its digests right again, as an attacker would."""
    data = (directory / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors, body = safetensors.torch.load(data), json.loads(header["__metadata__"]["moka"])
    del body["digest"]
    before = body["checksums"]
    edit(tensors, body)
    if body.get("checksums") == before:
        body["checksums"] = checkpoint._checksums(tensors)
    text = json.dumps({**body, "digest": manifest._digest(body)}, separators=(",", ":"), ensure_ascii=False)
    (directory / WEIGHTS).write_bytes(safetensors.torch.save(tensors, {"moka": text}))
    (directory / CONFIG).unlink()


def assert_refused(
    model: nn.Module, directory: Path, error: type[Exception], match: str, **flags: bool
) -> None:
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        moka.load_adapter(model, directory, **flags)
    assert str(directory) in str(caught.value)
    assert same(model, before) and not getattr(model, "moka_config", {})
