"""One training step of a small NF4 Llama: moka beside the frozen model and the mixture in plain PyTorch.

    python benchmarks/bench_train.py [--quick] [--threads 2] [--device cpu] [--out FILE.csv]

The model has the layer sizes of SmolLM2-135M (hidden 576, intermediate 1536, 9 heads, 3 KV heads) and random
weights, cut to 8 of 30 layers and a vocabulary of 8192 so that a run takes seconds. A step is forward,
backward and AdamW on 4 x 128 tokens; adapters are on q and v; `frozen`, the baseline, computes no more than
the gradient of the embedding.

Columns N and K hold the hidden and intermediate sizes, M the tokens; relF is that of the first loss, to
frozen's, which it must equal since an adapter starts as a zero update.
"""

from __future__ import annotations

import copy

import torch
from peers import PlainMoka
from results import Case, device_guard, make_rows, parser, prepare, relative_error, write
from timing import Call, measure
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moka
from moka import reference

TARGETS = ("q_proj", "v_proj")


def build(quick: bool) -> LlamaForCausalLM:
    """The model, its linear layers in NF4."""
    config = LlamaConfig(
        hidden_size=64 if quick else 576, intermediate_size=128 if quick else 1536, vocab_size=256 if quick
        else 8192, num_hidden_layers=1 if quick else 8, num_attention_heads=4 if quick else 9,
        num_key_value_heads=2 if quick else 3, tie_word_embeddings=True,
    )  # fmt: skip
    return moka.quantize(LlamaForCausalLM(config))


def with_plain_mixture(model: nn.Module) -> nn.Module:
    """Replaces each adapted layer of an injected model by the loop over components."""
    for name, layer in list(model.named_modules()):
        if not name.endswith(TARGETS):
            continue
        shapes = layer.shapes["default"]
        factors = reference.split_factors(layer.moka_A["default"].data, layer.moka_B["default"].data, shapes)
        A, B = zip(*factors, strict=True)
        plain = PlainMoka(layer.base_layer, A, B, layer.moka_gate["default"].data, layer.scaling["default"])
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def variants(base: nn.Module) -> dict[str, nn.Module]:
    """The models compared, each with its own copy of the base; every adapter starts as a zero update."""
    config = moka.MokaConfig(target_modules=list(TARGETS), r=10)
    models = {
        "frozen": copy.deepcopy(base).requires_grad_(False),
        "plain-moka": with_plain_mixture(moka.inject(copy.deepcopy(base), config)),
        "moka": moka.inject(copy.deepcopy(base), config),
    }
    return models


def step_call(model: nn.Module, ids: torch.Tensor) -> Call:
    """Forward, backward and AdamW on what is trainable; returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step(i: int) -> torch.Tensor:
        hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=hidden, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main() -> None:
    args = parser(__doc__, "train.csv").parse_args()
    device = prepare(args)
    with device_guard(device):
        base = build(args.quick).to(device=device, dtype=getattr(torch, args.dtype))
        ids = torch.randint(0, base.config.vocab_size, (1, 16) if args.quick else (4, 128), device=device)
        calls = {name: step_call(model.train(), ids) for name, model in variants(base).items()}
        losses = {name: call(0).cpu().double() for name, call in calls.items()}
        timings = measure(calls, device, repeat_s=0.01 if args.quick else 5.0)
    weights = [m.nf4_weight() for m in base.modules() if isinstance(m, moka.layers.NF4Linear)]
    macs = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    case = Case(
        "train_step",
        base.config.hidden_size,
        base.config.intermediate_size,
        ids.numel(),
        4e-9 * ids.numel() * macs,
    )
    nbytes = 2.0 * sum(weight.nbytes for weight in weights)
    errors = {name: relative_error(loss, losses["frozen"]) for name, loss in losses.items()}
    write(make_rows(args, case, timings, dict.fromkeys(calls, nbytes), errors, "frozen"), args.out)


if __name__ == "__main__":
    main()
