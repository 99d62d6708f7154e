"""Training runs: exact resume, SIGTERM, NaN, incomplete checkpoints, and what a run writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny import SENTENCES, tiny_model, tiny_tokenizer

import moka
from moka.data import IGNORED, Collator, TextDataset, rows_of
from moka.errors import CheckpointFormatError, CheckpointMismatchError, NonFiniteError, StateError
from moka.integrations import trainer as module
from moka.integrations.trainer import GroupedByLength, MokaTrainer, last_complete_checkpoint
from moka.train import RunConfig, train, training_arguments

TOKENIZER = tiny_tokenizer()
OBJECTS = [
    {"prompt": sentence[:cut], "completion": sentence[cut:]}
    for sentence in SENTENCES
    for cut in (9, 14, 20, 25)
]


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-equal runs need a fixed number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(output: Path, **changes) -> RunConfig:
    values = {"output": str(output), "batch_size": 4, "epochs": 2, "save_steps": 2, "seed": 3, **changes}
    values.setdefault(
        "adapter", {"r": 3, "gate_dropout": 0.1, "dropout": 0.1}
    )  # dropout: random state matters
    return RunConfig(**values)


def make_trainer(config: RunConfig, model=None) -> MokaTrainer:
    torch.manual_seed(config.seed)
    if model is None:
        model = moka.inject(tiny_model(), moka.MokaConfig.from_dict(config.adapter))
    dataset = TextDataset(rows_of(OBJECTS, "test"), TOKENIZER)
    return MokaTrainer(
        model,
        training_arguments(config),
        train_dataset=dataset,
        data_collator=Collator(TOKENIZER.pad_token_id),
    )


def adapter_state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(trainer: MokaTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 6 steps over 2 epochs, with a checkpoint every 2 steps."""
    torch.set_num_threads(1)
    config = settings(tmp_path_factory.mktemp("whole"), keep_checkpoints=9)
    trainer = make_trainer(config)
    trainer.train()
    return config, trainer


@pytest.mark.parametrize("step", [2, 4])
def test_resume_is_bit_equal(whole, tmp_path, step):
    """From the middle of an epoch, and across its end."""
    config, reference = whole
    shutil.copytree(Path(config.output) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    trainer = make_trainer(settings(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == reference.state.global_step == 6
    assert losses(trainer) == losses(reference)
    assert_equal(adapter_state(trainer.model), adapter_state(reference.model))


def test_another_seed_is_another_run(whole, tmp_path):
    """What resume restores does matter: the run with another seed differs."""
    trainer = make_trainer(settings(tmp_path, seed=4, save_steps=None))
    trainer.train()
    assert losses(trainer) != losses(whole[1])


def test_training_changes_the_adapter_alone(whole):
    before = moka.inject(tiny_model(), moka.MokaConfig.from_dict(whole[0].adapter))
    start, end = adapter_state(before), adapter_state(whole[1].model)
    assert all(not torch.equal(start[name], end[name]) for name in start)
    base = dict(before.named_parameters())
    for name, parameter in whole[1].model.named_parameters():
        if name not in start:
            assert torch.equal(parameter, base[name]), name


def test_checkpoints_hold_the_adapter_alone(whole):
    files = {path.name for path in (Path(whole[0].output) / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not files & {"model.safetensors", "pytorch_model.bin", "training_args.bin"}


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest"])
def test_an_incomplete_checkpoint_is_passed_over(whole, tmp_path, damage):
    for step in (4, 6):
        shutil.copytree(Path(whole[0].output) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    newest = tmp_path / "checkpoint-6"
    if damage == "truncated":
        os.truncate(newest / "optimizer.pt", 100)
    else:
        (newest / ("scheduler.pt" if damage == "missing" else module.MANIFEST)).unlink()
    with pytest.warns(UserWarning, match="checkpoint-6: incomplete"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointFormatError, match="checkpoint-6"):
        make_trainer(settings(tmp_path)).train(resume_from_checkpoint=str(newest))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_complete_checkpoint_of_another_setup_is_refused(whole, tmp_path, name):
    """DeepSpeed writes other files; without these two the run would start afresh from the adapter."""
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(Path(whole[0].output) / "checkpoint-4", checkpoint)
    (checkpoint / name).unlink()
    sizes = json.loads((checkpoint / module.MANIFEST).read_text())
    del sizes[name]
    (checkpoint / module.MANIFEST).write_text(json.dumps(sizes))
    for resume in (str(checkpoint), True):
        with pytest.raises(CheckpointFormatError, match=f"has no {name}"):
            make_trainer(settings(tmp_path)).train(resume_from_checkpoint=resume)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(StateError, match="no complete checkpoint"):
        make_trainer(settings(tmp_path)).train(resume_from_checkpoint=True)


def test_resume_with_another_rank_is_refused(whole, tmp_path):
    checkpoint = str(Path(whole[0].output) / "checkpoint-2")
    with pytest.raises(CheckpointMismatchError, match="r"):
        make_trainer(settings(tmp_path, adapter={"r": 2})).train(resume_from_checkpoint=checkpoint)


def test_sigterm_saves_at_the_end_of_the_step(whole, tmp_path):
    """The handler that was there before is called too, and the run then goes on bit for bit."""
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(True))
    try:
        trainer = make_trainer(settings(tmp_path, save_steps=100))
        step = trainer.training_step

        def terminated(*args, **kwargs):
            if trainer.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **kwargs)

        trainer.training_step = terminated
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.interrupted and called == [True]
    assert trainer.state.global_step == 3
    resumed = make_trainer(settings(tmp_path, save_steps=100))
    resumed.train(resume_from_checkpoint=True)
    assert not resumed.interrupted
    assert losses(resumed) == losses(whole[1])
    assert_equal(adapter_state(resumed.model), adapter_state(whole[1].model))


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    """4 x 3 rows and 1 x 12 rows give the same gradients but for the order of the sums."""
    results = []
    for batch, accumulate in ((12, 1), (3, 4)):
        config = settings(
            tmp_path / str(batch), batch_size=batch, gradient_accumulation=accumulate, max_steps=1,
            save_steps=None, adapter={"r": 2},
        )  # fmt: skip
        trainer = make_trainer(config)
        trainer.optimizer = torch.optim.SGD(
            [p for p in trainer.model.parameters() if p.requires_grad], lr=1e3
        )
        trainer.train()
        results.append((losses(trainer)[0], adapter_state(trainer.model)))
    (loss_a, a), (loss_b, b) = results
    assert loss_a == pytest.approx(loss_b, rel=1e-5)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_loss_equals_the_models_own(tmp_path):
    trainer = make_trainer(settings(tmp_path, adapter={"r": 2}))
    trainer.model.eval()
    batch = Collator(TOKENIZER.pad_token_id)(list(trainer.train_dataset))
    with torch.no_grad():
        own = trainer.model(**batch).loss
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(loss, own)
    assert (
        outputs["logits"].shape[1] < batch["labels"].shape[1]
    )  # the output layer did not run on every token


def test_a_batch_without_answers_gives_zero(tmp_path):
    trainer = make_trainer(settings(tmp_path, adapter={"r": 2}))
    batch = Collator(TOKENIZER.pad_token_id)(list(trainer.train_dataset))
    batch["labels"].fill_(IGNORED)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def poison_loss(trainer):
    """From step 2 on, a layer of the base gives NaN."""
    layer = trainer.model.model.layers[1].mlp.up_proj

    def hook(module, args, output):
        return output * float("nan") if trainer.state.global_step == 2 else output

    layer.register_forward_hook(hook)
    return r"model\.layers\.1\.mlp\.up_proj \(Linear\)"


def poison_gradient(trainer):
    """From step 2 on, one parameter's gradient is infinite."""
    name, parameter = next(
        (n, p) for n, p in trainer.model.named_parameters() if n.endswith("moka_B.default")
    )
    parameter.register_hook(lambda grad: grad * float("inf") if trainer.state.global_step == 2 else grad)
    return name.replace(".", r"\.")


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_nan_stops_before_the_optimizer(tmp_path, poison):
    trainer = make_trainer(settings(tmp_path, save_steps=None))
    expected = poison(trainer)
    states = {}

    def remember(args, state, control, **kwargs):
        states[state.global_step] = adapter_state(trainer.model), optimizer_state(trainer)

    callback = type("Remember", (module.TrainerCallback,), {"on_step_end": staticmethod(remember)})
    trainer.add_callback(callback)
    with pytest.raises(NonFiniteError, match=rf"step 3: .*{expected}"):
        trainer.train()
    parameters, moments = states[2]
    assert_equal(adapter_state(trainer.model), parameters)
    assert_equal(optimizer_state(trainer), moments)
    assert all(p.isfinite().all() for p in parameters.values())


def optimizer_state(trainer) -> dict[str, torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return {f"{i}.{key}": value.clone() for i, part in state.items() for key, value in part.items()}


def test_rows_of_a_batch_have_similar_lengths_and_every_row_comes_once():
    lengths = torch.randint(5, 100, (203,)).tolist()
    sampler = GroupedByLength(lengths, batch_size=8, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(203))
    batches = [orders[0][i : i + 8] for i in range(0, 203, 8)]
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.2 * sum(lengths)


def test_a_run_writes_its_results(tmp_path):
    output = tmp_path / "run"
    config = settings(output, epochs=4, learning_rate=2e-2, adapter={"r": 3})
    steps = []
    options = [{"question": "Which?", "options": ["dog", "fox"], "gold": 0}]
    metrics = train(
        config, tiny_model(), TOKENIZER, rows_of(OBJECTS, "x"), rows_of(options, "y"),
        on_step=lambda *step: steps.append(step),
    )  # fmt: skip
    saved = json.loads((output / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(metrics))
    assert saved["steps"] == len(saved["history"]) == 12
    assert [step[:2] for step in steps] == [(i, 12) for i in range(1, 13)]
    assert saved["loss"] < saved["history"][0]["loss"]
    assert set(saved["eval"]) >= {"accuracy", "accuracy_per_char"}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.yaml", "loss.png", "gates.png"} <= {
        path.name for path in output.iterdir()
    }
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StateError, match="resume=true"):
        train(config, tiny_model(), TOKENIZER, rows_of(OBJECTS, "x"))


def test_train_resumes_from_its_output(tmp_path):
    config = settings(tmp_path / "run", adapter={"r": 3})
    first = train(config, tiny_model(), TOKENIZER, rows_of(OBJECTS, "x"))
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = train(config.model_copy(update={"resume": True}), tiny_model(), TOKENIZER, rows_of(OBJECTS, "x"))
    assert [entry["loss"] for entry in again["history"]] == [entry["loss"] for entry in first["history"]]


def test_gradient_checkpointing_gives_the_same_losses(tmp_path):
    adapter = {"r": 3}
    plain = make_trainer(settings(tmp_path / "a", save_steps=None, adapter=adapter))
    plain.train()
    saving = make_trainer(
        settings(tmp_path / "b", save_steps=None, adapter=adapter, gradient_checkpointing=True)
    )
    saving.train()
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-6)


def test_a_preset_with_rates_from_shapes_resumes_bit_equal(tmp_path):
    adapter = {"preset": "lora", "r": 3, "alpha": 6, "target_modules": ["q_proj"]}
    fields = {"adapter": adapter, "rates": "fan_in", "schedule": "constant_with_warmup", "warmup": 0}
    states = []
    for output, steps in (("whole", [4]), ("parts", [2, 4])):
        for last in steps:
            config = settings(
                tmp_path / output, **{**fields, "max_steps": last}, resume=last == 4 != steps[0]
            )
            model = tiny_model()
            train(config, model, TOKENIZER, rows_of(OBJECTS, "test"))
        assert model.moka_config["default"].shapes == "lora" and model.moka_config["default"].scale == 6.0
        states.append(adapter_state(model))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    moved = [name for name in states[0] if "moka_A" in name and states[0][name].any()]
    assert moved
    with pytest.raises(ValueError, match="nearest valid one is 'alpha'"):
        settings(tmp_path, adapter={"preset": "lora", "alfa": 3})


def test_rates_reach_the_optimizer(tmp_path, monkeypatch):
    seen = {}
    original = MokaTrainer.create_optimizer

    def spy(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        seen.update({id(p): group["lr"] for group in made.param_groups for p in group["params"]})
        return made

    monkeypatch.setattr(MokaTrainer, "create_optimizer", spy)
    model = tiny_model()
    adapter = {"preset": "lora", "r": 2, "target_modules": ["q_proj"]}
    train(
        settings(tmp_path, adapter=adapter, rates="fan_in", max_steps=1),
        model,
        TOKENIZER,
        rows_of(OBJECTS, "test"),
    )
    layer = next(iter(moka.adapter_layers(model).values()))
    assert seen[id(layer.moka_A["default"])] == pytest.approx(16 * seen[id(layer.moka_B["default"])])
