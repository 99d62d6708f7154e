"""What a run looks at before it trains, so that nothing is lost at its end."""

from pathlib import Path

import pytest
from test_train import adapter_state, assert_equal, make_trainer, settings
from tiny import tiny_model

import moka
from moka.checkpoint import WEIGHTS
from moka.errors import DataError, StateError
from moka.train import run


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers deprecates
def test_a_model_that_could_not_be_saved_is_refused_before_training(tmp_path):
    with pytest.raises(StateError, match=r"no adapter; call moka\.inject"):
        make_trainer(settings(tmp_path), tiny_model())
    peft = pytest.importorskip("peft")
    from moka.integrations.peft import MokaConfig

    model = peft.get_peft_model(tiny_model(), MokaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(StateError, match=r"adapters of peft; train it with transformers\.Trainer"):
        make_trainer(settings(tmp_path), model)


def test_the_adapter_that_is_trained_is_saved_and_resumed(tmp_path):
    first, config = tiny_model(), moka.MokaConfig.from_dict(settings(tmp_path).adapter)
    model = moka.inject(moka.inject(first, config), config, "second")
    moka.set_adapter(model, ["default", "second"])
    with pytest.raises(StateError, match=r"one adapter, active are \['default', 'second'\]; call moka.set_"):
        make_trainer(settings(tmp_path), model)
    moka.set_adapter(model, "second")
    trainer = make_trainer(settings(tmp_path), model)
    trainer.train()
    expected = adapter_state(model)
    assert expected and all(name.endswith(".second") for name in expected)
    saved = moka.load_adapter(tiny_model(), tmp_path / "checkpoint-6")
    assert_equal(
        adapter_state(saved), {name.replace(".second", ".default"): p for name, p in expected.items()}
    )
    again = moka.inject(moka.inject(tiny_model(), config), config, "second")
    make_trainer(settings(tmp_path), again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal(adapter_state(again), expected)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(settings(tmp_path))
    trainer.eval_dataset = trainer.train_dataset
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "loss"
    trainer.args.greater_is_better = True  # the worst loss: that of an early step
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 2
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    expected = moka.load_adapter(tiny_model(), best)
    assert_equal(adapter_state(trainer.model), adapter_state(expected))


def test_a_run_is_refused_before_its_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("moka.train.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        run(settings(tmp_path, data="nowhere.jsonl"))
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(StateError, match="resume=true"):
        run(settings(tmp_path))
    (tmp_path / "checkpoint-2").rename(tmp_path / "other")
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(StateError, match="the adapter of another run"):
        run(settings(tmp_path))
