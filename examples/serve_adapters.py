r"""Several adapters in one batch: each row goes through its own, and the 4-bit base runs once for all rows.

    python examples/serve_adapters.py
    python examples/serve_adapters.py --adapters runs/sft runs/dpo --prompt "Question: What is rain?\nAnswer:"

Without `--adapters` two are trained first, to give different answers to the same question.
"""

import argparse

import peft
import torch
from base import DTYPE, NF4, model_source
from transformers import AutoModelForCausalLM, AutoTokenizer

from moka.integrations.peft import MokaConfig

ANSWERS = {"sailor": " Ahoy! It be Paris, matey!", "teacher": " Good question: it is Paris, in France."}


def teach(model, tokenizer, prompt: str, answer: str, steps: int) -> None:
    """Trains the active adapter on one answer."""
    question = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    tokens = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt").input_ids.to(model.device)
    labels = tokens.clone()
    labels[:, : question.shape[1]] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{model.active_adapter}: loss {loss.item():.3f} after {steps} steps")


def main() -> None:
    """Generates one answer per adapter, all in one batch, and compares with one adapter at a time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="a folder, a hub id, or 'embedded'")
    parser.add_argument("--adapters", nargs="+", default=[], help="folders")
    parser.add_argument("--prompt", default="Question: What is the capital of France?\nAnswer:")
    parser.add_argument("--max-steps", type=int, default=15)
    options = parser.parse_args()

    source = model_source(options.model)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(source, quantization_config=NF4, dtype=DTYPE)
    if options.adapters:
        names = [f"adapter{i}" for i in range(len(options.adapters))]
        model = peft.PeftModel.from_pretrained(base, options.adapters[0], adapter_name=names[0])
        for name, folder in zip(names[1:], options.adapters[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
    else:
        names = list(ANSWERS)
        config = MokaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"])
        model = peft.get_peft_model(base, config, adapter_name=names[0])
        model.add_adapter(names[1], config)
        for name, answer in ANSWERS.items():
            model.set_adapter(name)
            teach(model, tokenizer, options.prompt, answer, options.max_steps)
    model.eval()

    rows = ["__base__", *names]  # one per row of the batch, in any order and number
    batch = tokenizer([options.prompt] * len(rows), return_tensors="pt", padding=True).to(model.device)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    mixed = model.generate(**batch, **settings, adapter_names=rows)[:, batch.input_ids.shape[1] :]
    for row, tokens in zip(rows, mixed, strict=True):
        print(f"{row:>10}: {tokenizer.decode(tokens, skip_special_tokens=True).strip()!r}")

    with torch.no_grad():
        together = model(**batch, adapter_names=rows).logits
        for i, name in enumerate(names, 1):
            model.set_adapter(name)
            alone = model(**{key: value[i : i + 1] for key, value in batch.items()}).logits
            print(f"{name}: largest difference from running alone {(together[i] - alone[0]).abs().max():.1e}")


if __name__ == "__main__":
    main()
