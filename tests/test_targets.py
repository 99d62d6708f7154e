"""Which layers a configuration selects, and what it says of those that it does not find."""

import pytest
from test_inject import Net, snapshot

import moka
from moka import MokaConfig
from moka.errors import ConfigError, InjectionError


def every(*names):
    return {f"layers.{i}.{name}" for i in range(3) for name in names}


@pytest.mark.parametrize(
    ("target", "fields", "expected"),
    [
        (["layers.1.out"], {}, {"layers.1.out"}),
        (r"layers\.[02]\.(q|v)_proj", {"layers_to_transform": 2}, {"layers.2.q_proj", "layers.2.v_proj"}),
        (["q_proj"], {"exclude_modules": ["0.q_proj"]}, {"layers.1.q_proj", "layers.2.q_proj"}),
        ("all-linear", {"exclude_modules": r".*v_proj"}, every("q_proj", "out")),
        ("all-linear", {}, every("q_proj", "v_proj", "out")),
        (["lm_head"], {"strict": False}, {"lm_head"}),
        (["lm_head"], {"strict": False, "gate": "topk(5)"}, {"lm_head"}),
    ],
)
def test_selection(target, fields, expected):
    model = moka.inject(Net(), MokaConfig(target, r=5, **fields))
    assert set(moka.adapter_layers(model)) == expected


@pytest.mark.parametrize(
    ("error", "fields", "message"),
    [
        (InjectionError, {"target_modules": ["q_prj"]}, r"target_modules: 'q_prj' matches no.*'q_proj'"),
        (InjectionError, {"target_modules": ["q_proj", "k_proj"]}, r"'k_proj' matches no module.*'q_proj'"),
        (InjectionError, {"target_modules": ["k_proj"], "strict": False}, r"'k_proj' matches no module"),
        (InjectionError, {"target_modules": "q_proj"}, r"expression for the whole.*list \['q_proj'\]"),
        (InjectionError, {"target_modules": "(q|v)_proj"}, r"end of 'layers\.0.*\(\?:\(q\|v\)_proj\)'"),
        (InjectionError, {"target_modules": "(?i)Q_PROJ"}, r"the whole path, names .* a list; the near"),
        (InjectionError, {"exclude_modules": "q_proj"}, r"exclude_modules: 'q_proj' .*the list \['q_proj'\]"),
        (InjectionError, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
         r"'q_proj': exclude_modules=\('q_proj',\) leaves out all .* 3 in .*'layers\.0\.q_proj'"),
        (InjectionError, {"target_modules": r".*q_proj", "exclude_modules": r".*_proj"},
         r"target_modules: '\.\*q_proj': exclude_modules='\.\*_proj' leaves out all .* 3 in"),
        (InjectionError, {"target_modules": "all-linear", "exclude_modules": r"layers.*"},
         r"all-linear': exclude_modules='layers\.\*' leaves out all .* 9 in"),
        (InjectionError, {"target_modules": ["lm_head"], "layers_to_transform": [0, 2]},
         r"'lm_head': layers_to_transform=\(0, 2\) leaves out all .* 1 in"),
        (InjectionError, {"exclude_modules": ["head"]}, r"exclude_modules: 'head' matches no.*'lm_head'"),
        (InjectionError, {"layers_to_transform": [2, 3]}, r"no layer \[3\]; it has \[0, 1, 2\]"),
        (InjectionError, {"r_pattern": {"k_proj": 2}}, r"r_pattern key 'k_proj' matches no module"),
        (InjectionError, {"shapes": {"k_proj": "identity"}}, r"shapes key 'k_proj' matches no module"),
        (InjectionError, {"target_modules": ["embed"]}, r"embed: cannot adapt a .*Embedding; expected nn"),
        (InjectionError, {"target_modules": ["norm"]}, r"layers\.0\.norm: cannot adapt"),
        (InjectionError, {"modules_to_save": ["heads"]}, r"modules_to_save: 'heads' matches no module"),
        (InjectionError, {"modules_to_save": ["layers.0"]}, r"layers\.0 contains layers\.0\.q_proj, which"),
        (ConfigError, {"target_modules": ["lm_head"]}, r"lm_head: out_features is 11, a prime"),
        (ConfigError, {"gate": "topk(99)"}, r"layers\.0\.q_proj: gate='topk\(99\)' .* 99 .* has 10 comp"),
        (ConfigError, {"gate": "topk(4)", "r_pattern": {"v_proj": 3}}, r"v_proj: .*topk\(4\).* at most 3"),
        (ConfigError, {"shapes": [(4, 4, 4, 4)]}, r"layers\.0\.v_proj: .*16 x 16.*expected 8 x 16"),
        (ConfigError, {"shapes": {"v_proj": [(4, 4, 4, 4)]}}, r"layers\.0\.v_proj: "),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_changes_nothing(error, fields, message):
    model = Net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        moka.inject(model, MokaConfig(**fields))
    assert snapshot(model) == before


def test_not_strict_warns_about_a_pattern_that_matches_nothing():
    with pytest.warns(UserWarning, match="'k_proj' matches no module"):
        model = moka.inject(Net(), MokaConfig(target_modules=["q_proj", "k_proj"], strict=False))
    assert len(moka.adapter_layers(model)) == 3
