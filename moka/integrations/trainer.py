"""`MokaTrainer`: transformers' Trainer for an adapted model.

What it adds: checkpoints hold the adapter alone; an interrupted run resumes bit for bit (optimizer,
scheduler, random state, order of the data); a NaN stops the run before it reaches the optimizer; SIGTERM
saves at the end of the step; the output layer, the largest of a small model, runs on the answer tokens alone.
In several processes (DDP, FSDP2) all of them stop together, and the first one writes the files.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_adapter, save_adapter
from ..data import IGNORED, answer_positions
from ..errors import CheckpointFormatError, NonFiniteError, StateError
from ..layout import is_sharded
from ..safefile import write_atomic
from .distributed import any_process, full_optimizer_state, load_full_optimizer_state, prepare_base
from .preflight import check_accelerator, check_distributed, is_fsdp_module, require_adapter

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError("moka.integrations.trainer needs transformers; install moka[hf]") from error

MANIFEST = "complete.json"  # written last: the names and sizes of a checkpoint's files
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # as transformers names them
#: Arguments that must be the same on every process, or some would wait for steps that others do not take.
SHARED_ARGUMENTS = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "max_grad_norm", "save_strategy", "save_steps", "seed",
)  # fmt: skip


class MokaTrainer(Trainer):
    """Trains the adapter of a model from `moka.inject`; takes the arguments of `transformers.Trainer`.

    The loss is the mean cross-entropy over the labels that are not -100, over all accumulated batches; a
    model's own additions to the loss (the balance term of a mixture of experts) are left out.

    Under torchrun or `accelerate launch` the mean is over the batches of all processes, and the model may be
    split by `moka.shard` or accelerate. Checkpoints do not depend on that: any setup can resume any other's.

    Raises:
        StateError: the model has no adapter of `moka.inject`; peft's models go to `transformers.Trainer`.

    Attributes:
        interrupted: whether SIGTERM ended `train`; a checkpoint of the last step was saved before.

    Example:
        >>> trainer = MokaTrainer(model, args, train_dataset=rows, data_collator=collator)  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=True)                                      # doctest: +SKIP
    """

    model: Any
    model_wrapped: Any
    args: Any
    lr_scheduler: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_accelerator(self.accelerator, self.model)
        require_adapter(self.accelerator.unwrap_model(self.model))
        self._sharded = self.is_fsdp_enabled or is_fsdp_module(self.model)
        if is_fsdp_module(self.model):
            # moka.shard has done what accelerate would do, which would else wrap the model in DDP
            self.accelerator.prepare_model = functools.partial(
                _prepare_sharded, self.accelerator.prepare_model
            )
        self.interrupted = False
        self.sampler: GroupedByLength | None = None
        # num_items_in_batch is used by compute_loss below, whatever the model's own forward accepts
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        forward = inspect.signature(self.accelerator.unwrap_model(self.model).forward)
        self._selects_logits = "logits_to_keep" in forward.parameters
        self.add_callback(_Steps(self))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy of the answer tokens.

        Raises:
            NonFiniteError: the loss is NaN or infinite, on any process; names the step and the first module
                to blame.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        positions = answer_positions(labels)
        inputs.setdefault("use_cache", False)
        if self._selects_logits:
            logits = model(**inputs, logits_to_keep=positions).logits
        else:
            logits = model(**inputs).logits[:, positions]
        targets = labels[:, positions + 1]
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        total = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss = total / max(float(count), 1.0)  # a batch without an answer gives 0, not 0/0
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        if self.is_in_train:
            problem = None if loss.isfinite() else f"the loss is {loss.item()}"
            if any_process(problem):
                module = first_nonfinite_module(
                    self.model, inputs
                )  # on all: a sharded model cannot run alone
                problem = problem and f"{problem}; first module with a NaN or Inf: {module}"
                raise NonFiniteError(self._nonfinite(any_process(problem)))
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass.

        Raises:
            NonFiniteError: a gradient is NaN or infinite, on any process. (With fp16 loss scaling such steps
                are normal and skipped.)
        """
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.scaler is None and (problem := any_process(self._bad_gradient())):
            raise NonFiniteError(self._nonfinite(problem))
        return loss

    def _bad_gradient(self) -> str | None:
        named = [(name, _local(p.grad)) for name, p in self.model.named_parameters() if p.grad is not None]
        if named and not math.isfinite(sum(torch._foreach_norm([grad for _, grad in named])).item()):  # pyright: ignore
            # the backward pass runs from the last module to the first
            bad = next((name for name, grad in reversed(named) if not grad.isfinite().all()), None)
            if bad is not None:
                return f"a gradient is not finite; first module of the backward pass: {bad}"
        return None

    def _nonfinite(self, what: str | None) -> str:
        return (
            f"step {self.state.global_step + 1}: {what}. Adapter and optimizer are as after step "
            f"{self.state.global_step}; lower the learning rate, or look for bad values in the base model"
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        self.sampler = GroupedByLength(dataset.lengths(), self.args.train_batch_size, self.args.seed)  # pyright: ignore
        return self.sampler

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; SIGTERM finishes the step, saves a checkpoint and returns.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest complete one in `output_dir`;
                newer incomplete ones are named in a warning.

        Raises:
            StateError: True, but there is no complete checkpoint.
            CheckpointFormatError: the named checkpoint is incomplete, or DeepSpeed's and this run is not.
            CheckpointMismatchError: the checkpoint's adapter is not the one in the model.
            ConfigError: the processes differ, or `check_distributed` refuses the setup.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise StateError(f"{self.args.output_dir}: holds no complete checkpoint to resume from")
        elif resume_from_checkpoint and (problem := checkpoint_problem(Path(resume_from_checkpoint))):
            raise CheckpointFormatError(
                f"{resume_from_checkpoint}: {problem}; resume from an earlier checkpoint"
            )
        if resume_from_checkpoint and not self.is_deepspeed_enabled:
            _require_optimizer(Path(resume_from_checkpoint))
        shared = {name: getattr(self.args, name) for name in SHARED_ARGUMENTS}
        check_distributed(self.model, resume_from_checkpoint=resume_from_checkpoint, **shared)
        if self.is_fsdp_enabled:  # accelerate shards it
            prepare_base(self.model, self.accelerator.state.fsdp_plugin.mixed_precision_policy)
        with self._sigterm_stops():
            return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter; every process must call this."""
        if self._sharded:
            self._save(output_dir)  # transformers would gather the whole model
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._sharded or self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            save_adapter(model, output_dir or self.args.output_dir, require_adapter(model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = full_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # transformers 5.17 cannot load onto "cpu:0", as several processes on a CPU call it
        several_on_cpu = self.args.device == torch.device("cpu", 0) and not self.is_deepspeed_enabled
        if checkpoint is None or not (self._sharded or several_on_cpu):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER, SCHEDULER)
        )
        load_full_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(schedule)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            (folder / MANIFEST).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its random state
        if self.args.should_save:
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
            write_atomic(folder / MANIFEST, json.dumps(sizes, indent=2).encode())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        load_adapter(model, resume_from_checkpoint, require_adapter(model))

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        self._load_from_checkpoint(best)

    @contextlib.contextmanager
    def _sigterm_stops(self) -> Iterator[None]:
        """Sets `interrupted` on SIGTERM, then calls the earlier handler; only the main thread can do this."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.getsignal(signal.SIGTERM)

        def handler(number: int, frame: Any) -> None:
            self.interrupted = True
            if callable(previous):
                previous(number, frame)

        signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)


class _Steps(TrainerCallback):
    """Checks the wrapped model, tells the sampler its epoch; saves and stops at the end of the step in which
    the trainer was interrupted, on any process.
    """

    def __init__(self, trainer: MokaTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_distributed(self.trainer.model_wrapped)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate does not find the sampler when several processes resume in the middle of an epoch
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any_process("SIGTERM" if self.trainer.interrupted else None):
            self.trainer.interrupted = True
            control.should_save = control.should_training_stop = True


class GroupedByLength(torch.utils.data.Sampler):
    """Random order in which a batch holds rows of similar length, so that little is padded.

    The order is a function of seed and epoch alone, so that a resumed run sees the rows it would have seen.

    Args:
        lengths: tokens per row.
        batch_size: rows per batch.
        window: batches that are sorted together; larger means less padding and less randomness.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, window: int = 16):
        self.lengths, self.batch_size, self.window = lengths, batch_size, window
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        step = self.batch_size * self.window
        starts = range(0, len(order), step)
        rows = [row for i in starts for row in sorted(order[i : i + step], key=self.lengths.__getitem__)]
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # a short batch must stay at the end
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([row for batch in shuffled + last for row in batch])


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint of a run, or None; a warning names each newer one that is incomplete."""
    folders = Path(output_dir).glob("checkpoint-*")
    found = [(int(m[1]), path) for path in folders if (m := _CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        problem = checkpoint_problem(path)
        if problem is None:
            return str(path)
        warnings.warn(f"{path}: {problem}; trying the checkpoint before it", stacklevel=2)
    return None


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None when all its files are there in full."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return f"incomplete: it has no readable {MANIFEST}, which is written last"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"incomplete: {name} is missing or is not {size} bytes long"
    return None


def _require_optimizer(folder: Path) -> None:
    """transformers would start the optimizer and the learning rate afresh, without a word."""
    for name in (OPTIMIZER, SCHEDULER):
        if not (folder / name).is_file():
            raise CheckpointFormatError(
                f"{folder}: has no {name}, as after DeepSpeed or save_only_model; resume in its setup, "
                f"or load its adapter with moka.load_adapter and start a new run"
            )


def first_nonfinite_module(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Path and class of the first module whose output is NaN or infinite, found by one more forward pass."""
    found: list[str] = []

    def hook(path: str) -> Any:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(t.isfinite().all() for t in _tensors(output) if t.is_floating_point()):
                found.append(f"{path or 'the model'} ({type(module).__name__})")

        return check

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "none on a second pass; the loss itself overflowed"


def _prepare_sharded(prepare_model: Any, model: Any, **options: Any) -> Any:
    return prepare_model(model, **{**options, "device_placement": False, "evaluation_mode": True})


def _local(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
