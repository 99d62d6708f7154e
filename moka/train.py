"""A whole training run from one configuration: what `moka train` does."""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from . import __version__, embedded, plots
from .checkpoint import WEIGHTS
from .config import MokaConfig
from .data import Collator, Row, TextDataset, read_jsonl, rows_of
from .errors import StateError
from .evaluate import Progress, evaluate_rows
from .inject import inject
from .loading import EMBEDDED, load_model
from .presets import preset
from .rates import param_groups
from .safefile import write_atomic
from .summary import summary

try:
    import pydantic
    import yaml
except ImportError as error:
    raise ImportError("training runs need pydantic and pyyaml; install moka[cli]") from error

#: Called after each step with (steps done, steps in all, the figures of the step).
OnStep = Callable[[int, int, dict[str, float]], None]


class RunConfig(pydantic.BaseModel):
    """Everything that decides a run; unknown keys are errors. Saved as `config.yaml` beside the adapter."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    model: str = pydantic.Field(EMBEDDED, description="embedded, a model directory, a .gguf file or a hub id")
    quantize: Literal["nf4", "bitsandbytes", "none"] = "nf4"
    double_quant: bool = True
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    data: str = pydantic.Field("embedded:arc_easy", description="a .jsonl[.gz] file, or embedded:TASK")
    eval_data: str | None = pydantic.Field(None, description="scored after training; the validation split")
    output: str = "moka-out"
    adapter: dict[str, Any] = pydantic.Field(
        default_factory=dict, description="the fields of MokaConfig; or a preset, its options and such fields"
    )
    max_length: int = pydantic.Field(512, ge=16, description="tokens per row")
    batch_size: int = pydantic.Field(16, ge=1, description="rows per step of each process")
    gradient_accumulation: int = pydantic.Field(1, ge=1)
    epochs: float = pydantic.Field(1.0, gt=0)
    max_steps: int | None = pydantic.Field(None, ge=1, description="ends the run before its epochs do")
    learning_rate: float = pydantic.Field(3e-3, gt=0)
    rates: Literal["equal", "fan_in"] = pydantic.Field(
        "equal", description="fan_in: rates of A and B from their shapes (moka.param_groups)"
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: float = pydantic.Field(0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = pydantic.Field(0.0, ge=0)
    max_grad_norm: float = pydantic.Field(1.0, ge=0)
    gradient_checkpointing: bool = False
    shard: bool = pydantic.Field(False, description="split the model over the processes of torchrun (FSDP2)")
    seed: int = pydantic.Field(0, ge=0)
    save_steps: int | None = pydantic.Field(
        None, ge=1, description="steps between checkpoints to resume from"
    )
    # at least two, so that a run that dies while it writes one still has the one before
    keep_checkpoints: int = pydantic.Field(2, ge=2)
    resume: bool = pydantic.Field(False, description="go on from the newest complete checkpoint in output")

    @pydantic.field_validator("adapter")
    @classmethod
    def _adapter(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "preset" in value:
            return preset(
                **{"name": value["preset"], **{k: v for k, v in value.items() if k != "preset"}}
            ).to_dict()
        return MokaConfig.from_dict(value).to_dict()

    def torch_dtype(self) -> torch.dtype | None:
        """None for "auto"."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    def to_yaml(self) -> str:
        """The configuration as YAML, every default included."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def load_rows(source: str, split: str) -> list[Row]:
    """Rows of a JSON Lines file, or of a split ("train" or "validation") of an embedded task.

    Args:
        source: a path, or "embedded:TASK" with a task of `moka.embedded.TASKS`.
    """
    kind, _, task = source.partition(":")
    if kind == EMBEDDED and task:
        return rows_of(embedded.task_rows(task, split), f"{source}/{split}")
    return read_jsonl(source)


def run(config: RunConfig, on_step: OnStep | None = None, on_eval: Progress | None = None) -> dict[str, Any]:
    """Loads model and data, trains, evaluates if asked, and writes the results into `config.output`.

    The folder receives the adapter, `config.yaml`, `metrics.json`, `loss.png`, `gates.png` and checkpoints.

    Returns:
        What is in `metrics.json`.

    Raises:
        MokaError: bad data, an adapter that does not fit the model, a NaN, or checkpoints in the way.
    """
    on_gpu = training_arguments(config).device.type == "cuda"  # joins the processes, chooses this one's GPU
    device, dtype = None, config.torch_dtype()
    if config.shard and config.quantize != "bitsandbytes":
        # from there it goes to the GPU in parts
        device, dtype = "cpu", dtype or (torch.bfloat16 if on_gpu else torch.float32)
    _refuse_other_run(config)  # like the rows, before the minutes that a large model takes to load
    rows = load_rows(config.data, "train")
    eval_rows = load_rows(config.eval_data, "validation") if config.eval_data else None
    model, tokenizer = load_model(
        config.model, config.quantize, dtype, device, double_quant=config.double_quant
    )
    return train(config, model, tokenizer, rows, eval_rows, on_step, on_eval)


def _refuse_other_run(config: RunConfig) -> None:
    output = Path(config.output)
    if config.resume:
        return
    if any(output.glob("checkpoint-*")):
        raise StateError(
            f"{output}: holds checkpoints of another run; pass resume=true or choose another output"
        )
    if (output / WEIGHTS).exists():
        raise StateError(
            f"{output}: holds the adapter of another run; choose another output or delete {WEIGHTS}"
        )


def train(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    eval_rows: list[Row] | None = None,
    on_step: OnStep | None = None,
    on_eval: Progress | None = None,
) -> dict[str, Any]:
    """The part of `run` after loading: adapts `model` in place and trains it on `rows`."""
    from transformers import PrinterCallback

    from .integrations.distributed import full_adapters, shard
    from .integrations.preflight import agree
    from .integrations.trainer import MokaTrainer

    started = time.perf_counter()
    output, arguments = Path(config.output), training_arguments(config)
    first = (
        arguments.process_index == 0
    )  # it alone writes, beside its adapter, which a sharded model's all gather
    if arguments.world_size > 1:
        agree(config.model_dump())
    _refuse_other_run(config)
    dataset = TextDataset(rows, tokenizer, config.max_length)
    torch.manual_seed(config.seed)  # for the initial factors
    inject(model, MokaConfig.from_dict(config.adapter))
    counts = summary(model)
    if config.shard:
        shard(model)
    if first:
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(output / "config.yaml", config.to_yaml().encode())

    optimizer = None
    if config.rates != "equal":
        kind, settings = MokaTrainer.get_optimizer_cls_and_kwargs(arguments)
        groups = param_groups(model, config.learning_rate, config.rates, weight_decay=config.weight_decay)
        optimizer = kind, {**settings, "params": groups}
    trainer = MokaTrainer(
        model,
        arguments,
        optimizer_cls_and_kwargs=optimizer,
        train_dataset=dataset,
        data_collator=Collator(tokenizer.pad_token_id or tokenizer.eos_token_id or 0),
    )
    trainer.remove_callback(PrinterCallback)  # progress goes to on_step
    if on_step is not None and first:
        trainer.add_callback(step_callback(on_step))
    result = trainer.train(resume_from_checkpoint=config.resume)
    model.eval()
    trainer.save_model(str(output))

    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "processes": arguments.world_size,
        "interrupted": trainer.interrupted,
        "loss": sum(entry["loss"] for entry in history[-10:]) / max(1, len(history[-10:])),
        "train_seconds": result.metrics["train_runtime"],
        "rows": len(dataset),
        "truncated_rows": dataset.truncated,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
    }
    if eval_rows is not None and not trainer.interrupted:
        metrics["eval"] = evaluate_rows(
            model, tokenizer, eval_rows, config.max_length, on_eval if first else None
        )
    metrics |= {
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(),
        "versions": {"moka": __version__, "torch": torch.__version__},
        "history": history,
    }
    with full_adapters(model):
        if first:
            write_metrics(output / "metrics.json", metrics)
            write_plots(model, history, output)
    return metrics


def training_arguments(config: RunConfig) -> Any:
    """The `transformers.TrainingArguments` of a run."""
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    # the older name warns where the newer one exists
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    return TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),  # else torchrun's processes would not join on a CPU
        logging_steps=1,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=config.keep_checkpoints,
        report_to=["tensorboard"] if find_spec("tensorboard") else "none",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=True,
        **{
            checkpointing: config.gradient_checkpointing,
            f"{checkpointing}_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        },
    )


def step_callback(on_step: OnStep) -> Any:
    """A Trainer callback that reports each logged step."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                on_step(state.global_step, state.max_steps, logs)

    return Report()


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """JSON, written whole or not at all."""
    write_atomic(path, (json.dumps(metrics, indent=2) + "\n").encode())


def write_plots(model: Any, history: list[dict[str, float]], output: Path) -> None:
    """`loss.png` and `gates.png`; without matplotlib a warning instead."""
    if find_spec("matplotlib") is None:
        warnings.warn("no pictures were drawn: matplotlib is not installed; install moka[plot]", stacklevel=2)
        return
    plots.plot_loss(history, output / "loss.png")
    plots.plot_gates(model, output / "gates.png")


def peak_memory_bytes() -> int:
    """The most memory this process has held (resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS counts bytes, Linux KiB
