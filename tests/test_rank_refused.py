"""Pruning, growing, moving and truncating components: what is refused, and what a failure leaves."""

import math

import pytest
import torch
from test_rank import adapted, all_parts, no_search_for_optimizers, scores_of  # noqa: F401  (a fixture)
from torch import nn

import moka
from moka import MokaConfig
from moka.errors import ConfigError, NonFiniteError, StateError


def test_optimizers_are_told():
    model = adapted()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.warns(
        UserWarning, match="AdamW was built before moka.prune and does not know the 12"
    ) as found:
        moka.prune(model, energy=0.5)
    assert found[0].filename == __file__
    del optimizer


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on first use
def test_what_is_refused_changes_nothing():
    model = adapted(r=3)
    before, config = all_parts(model), model.moka_config["default"]
    good = scores_of(model, [[1.0] * 3] * 4)
    path = "0.linear"
    for call, error, message in [
        (lambda: moka.prune(model), ConfigError, "expected exactly one of them"),
        (lambda: moka.prune(model, keep=5, elbow=True), ConfigError, "expected exactly one"),
        (lambda: moka.prune(model, energy=0), ConfigError, "energy: got 0, expected a share"),
        (lambda: moka.prune(model, energy=math.nan), ConfigError, "energy: got nan"),
        (lambda: moka.prune(model, keep=3), ConfigError, "at least 4 layers"),
        (
            lambda: moka.prune(model, keep=9, scores={}),
            ConfigError,
            r"scores: got \[0\] for .*expected \[3\]",
        ),
        (lambda: moka.prune(model, keep=9, scores={**good, "x": torch.ones(3)}), ConfigError, r"got \['x'\]"),
        (
            lambda: moka.prune(model, keep=9, scores={**good, path: torch.tensor([1, math.nan, 1])}),
            NonFiniteError,
            "0.linear hold NaN",
        ),
        (lambda: moka.prune(model, keep=9, adapter_name="x"), StateError, "'x' does not exist"),
        (lambda: moka.grow(model, {"k_proj": 4}), ConfigError, "r: got 'k_proj': 4"),
        (lambda: moka.grow(model, 4.0), ConfigError, "expected the end of a path, and an integer"),
        (lambda: moka.grow(model, 2000), ConfigError, "at most 1024"),
        (lambda: moka.grow(model, 4, shapes=[(3, 3, 3, 3)]), ConfigError, "has the product 9 x 9"),
        (lambda: moka.reallocate(model, 4, share=0.5), ConfigError, "one component per layer"),
        (lambda: moka.reallocate(model, 8, share=1.5), ConfigError, "share=1.5"),
        (lambda: moka.truncate(model, 0), ConfigError, "k: got 0"),
    ]:
        with pytest.raises(error, match=message):
            call()
    moka.merge(model)
    with pytest.raises(StateError, match="is merged into the base weight"):
        moka.prune(model, keep=9)
    moka.unmerge(model)
    assert model.moka_config["default"] is config
    assert all(torch.equal(part, before[p]) for p, part in all_parts(model).items())
    with pytest.raises(StateError, match=r"wrapped already .*call moka\.grow first"):
        moka.grow(torch.compile(model), 4)
    with torch.device("meta"):
        meta = moka.inject(nn.Sequential(nn.Linear(8, 8)), MokaConfig(["0"]))
    with pytest.raises(StateError, match="meta device"):
        moka.truncate(meta, 1)


def test_an_interrupt_changes_nothing(monkeypatch):
    model = adapted()
    before, config = all_parts(model), model.moka_config["default"]
    calls, original = [], moka.rank._set_state

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(moka.rank, "_set_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moka.prune(model, keep=4)
    assert len(calls) == 3 + 3  # two layers and the third, and back
    assert all(torch.equal(part, before[p]) for p, part in all_parts(model).items())
    assert model.moka_config["default"] is config
