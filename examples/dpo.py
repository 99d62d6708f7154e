"""DPO with TRL: preferences, learned by a MoKA adapter. The reference is the same model without its adapter.

    python examples/dpo.py                                  # right answers before wrong ones, on ARC-Easy
    python examples/dpo.py --model Qwen/Qwen3-0.6B --data preferences.jsonl

Rows of `--data` have prompt, chosen and rejected.
"""

import argparse

from base import DTYPE, NF4, ON_GPU, model_source
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer

from moka.embedded import task_rows
from moka.integrations.peft import MokaConfig  # in place of: from peft import LoraConfig


def preferences() -> Dataset:
    """ARC-Easy's training questions: the right answer is chosen, the option before it rejected."""
    rows = [
        {
            "prompt": f"Question: {row['question']}\nAnswer:",
            "chosen": " " + row["options"][row["gold"]],
            "rejected": " " + row["options"][row["gold"] - 1],
        }
        for row in task_rows("arc_easy", "train")
    ]
    return Dataset.from_list(rows)


def main() -> None:
    """Trains, and prints how often the chosen answer is preferred on held-out rows, before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="a folder, a hub id, or 'embedded'")
    parser.add_argument("--data", help="a .jsonl file; default: ARC-Easy")
    parser.add_argument("--output", default="runs/dpo")
    parser.add_argument("--max-steps", type=int, default=60)
    options = parser.parse_args()

    rows = load_dataset("json", data_files=options.data, split="train") if options.data else preferences()
    parts = rows.train_test_split(test_size=min(32, len(rows) // 4), seed=0)
    trainer = DPOTrainer(
        model=model_source(options.model),
        args=DPOConfig(
            output_dir=options.output,
            model_init_kwargs={"quantization_config": NF4, "dtype": DTYPE},
            max_steps=options.max_steps,
            learning_rate=1e-3,
            beta=0.1,
            max_length=512,
            bf16=ON_GPU,
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        peft_config=MokaConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        key = f"eval_{name}"
        print(
            f"{name} on {len(parts['test'])} held-out rows: {before[key]:.3f} before, {after[key]:.3f} after"
        )
    print(f"adapter: {options.output}")


if __name__ == "__main__":
    main()
