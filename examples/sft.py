"""QLoRA with TRL, as its documentation has it, with one line changed: MokaConfig where LoraConfig was.

    python examples/sft.py                                  # the embedded model learns science questions
    python examples/sft.py --model Qwen/Qwen3-0.6B --data my.jsonl --max-steps 500
    python examples/sft.py --max-steps 120 --resume         # goes on from the last checkpoint
    accelerate launch --config_file examples/accelerate_ddp.yaml examples/sft.py

Rows of `--data` are in one of TRL's formats: prompt and completion, messages, or text.
"""

import argparse

from base import DTYPE, NF4, ON_GPU, model_source
from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from moka.embedded import task_rows
from moka.integrations.peft import MokaConfig  # in place of: from peft import LoraConfig


def questions() -> Dataset:
    """ARC-Easy's training questions, each with its right answer."""
    rows = [
        {
            "prompt": f"Question: {row['question']}\nAnswer:",
            "completion": " " + row["options"][row["gold"]],
        }
        for row in task_rows("arc_easy", "train")
    ]
    return Dataset.from_list(rows)


def main() -> None:
    """Trains, and prints the loss on held-out rows before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="a folder, a hub id, or 'embedded'")
    parser.add_argument("--data", help="a .jsonl file; default: ARC-Easy")
    parser.add_argument("--output", default="runs/sft")
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --output")
    options = parser.parse_args()

    rows = load_dataset("json", data_files=options.data, split="train") if options.data else questions()
    parts = rows.train_test_split(test_size=min(32, len(rows) // 4), seed=0)
    trainer = SFTTrainer(
        model=model_source(options.model),
        args=SFTConfig(
            output_dir=options.output,
            model_init_kwargs={"quantization_config": NF4, "dtype": DTYPE},
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            max_length=512,
            bf16=ON_GPU,
            logging_steps=10,
            save_steps=max(1, options.max_steps // 2),
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        peft_config=MokaConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.model.print_trainable_parameters()
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=options.resume)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    print(f"loss on {len(parts['test'])} held-out rows: {before:.3f} before, {after:.3f} after")
    print(f"adapter: {options.output}; PeftModel.from_pretrained loads it, `moka merge` merges it")


if __name__ == "__main__":
    main()
