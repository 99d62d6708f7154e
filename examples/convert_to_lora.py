"""A MoKA adapter as a LoRA for servers that know no other kind, reloaded by peft, and what that loses.

python examples/sft.py
python examples/convert_to_lora.py --adapter runs/sft --rank 64
"""

import argparse

import torch
from base import DTYPE, NF4, model_source
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import moka

TEXT = "Question: Which of these do plants take from the air?\nAnswer: carbon dioxide"


def main() -> None:
    """Exports, and compares base, MoKA and LoRA on one text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="what the adapter was trained on")
    parser.add_argument("--adapter", default="runs/sft", help="a folder, written by peft or by moka")
    parser.add_argument("--output", default="runs/lora")
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()

    source = model_source(options.model)
    tokens = AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt")

    def load_base():
        return AutoModelForCausalLM.from_pretrained(source, quantization_config=NF4, dtype=DTYPE)

    def measure(model) -> tuple[torch.Tensor, float]:
        model.eval()
        with torch.no_grad():
            outputs = model(**tokens.to(model.device), labels=tokens.input_ids.to(model.device))
        return outputs.logits.float(), outputs.loss.item()

    model = moka.load_adapter(load_base(), options.adapter)
    with moka.disabled(model):
        base, base_loss = measure(model)
    with_moka, moka_loss = measure(model)
    export = moka.export_lora(model, options.output, rank=options.rank)
    print(export)
    with_lora, lora_loss = measure(PeftModel.from_pretrained(moka.accelerate(load_base()), options.output))

    print(f"loss: base {base_loss:.4f}, MoKA {moka_loss:.4f}, LoRA of rank {export.rank} {lora_loss:.4f}")
    lost, update = (with_lora - with_moka).norm(), (with_moka - base).norm()
    print(
        f"logits: the LoRA differs from the MoKA adapter by {lost / update:.1%} of what the adapter changes"
    )
    print(f"LoRA: {options.output}")


if __name__ == "__main__":
    main()
