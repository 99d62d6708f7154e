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
