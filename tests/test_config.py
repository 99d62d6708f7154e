"""MokaConfig: what it accepts, what it refuses and how it says so; the component shapes that follow."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moka import MokaConfig
from moka.config import FORMAT_VERSION
from moka.errors import ConfigError
from moka.rules import plan_shapes
from moka.shapes import KronShape, divisors, is_prime


def test_defaults_are_the_papers():
    config = MokaConfig()
    assert (config.target_modules, config.r, config.shapes) == (("q_proj", "v_proj"), 10, "balanced")
    assert (config.gate, config.scale, config.path, config.dropout) == ("softmax", None, "auto", 0.0)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("target_modules", [], "at least one module name"),
        ("target_modules", [1], "non-empty strings"),
        ("target_modules", "(", "regular expression"),
        ("exclude_modules", 3, "a list of module names"),
        ("layers_to_transform", [-1], "an integer from 0"),
        ("layers_to_transform", True, "a list of layer indices or None"),
        ("r", 0, "an integer from 1 to 1024"),
        ("r", 10**9, "an integer from 1 to 1024"),
        ("r", True, "an integer from 1 to 1024"),
        ("r", 2.0, "an integer from 1 to 1024"),
        ("shapes", "square", "one of"),
        ("shapes", [], "a non-empty list"),
        ("shapes", [(1, 2, 3)], "(ma, na, mb, nb)"),
        ("shapes", [(1, 2, 3, 0)], "an integer from 1"),
        ("shapes", {"q_proj": "square"}, "one of"),
        ("shapes", {"(": "balanced"}, "regular expression"),
        ("layers_to_transform", [], "at least one layer index (no layer is chosen), or None"),
        ("gate", "relu", "one of ('softmax', 'topk(j)'"),
        ("scale", 0.0, "a number above 0"),
        ("scale", math.inf, "a finite number"),
        ("scale", "2", "a finite number"),
        ("init", "ones", "one of ('default', 'swapped', 'svd', 'residual')"),
        ("dropout", 1.0, "below 1"),
        ("dropout", -0.1, "at least 0"),
        ("dropout", math.nan, "a finite number"),
        ("gate_dropout", 1.5, "below 1"),
        ("path", "fast", "one of ('auto', 'merged', 'factored')"),
        ("r_pattern", {"q_proj": 0}, "an integer from 1"),
        ("r_pattern", [("q_proj", 2)], "a dict"),
        ("modules_to_save", "lm_head", "a list of module names"),
        ("adapter_dtype", "int8", "one of ('float32'"),
        ("strict", 1, "True or False"),
    ],
)
def test_a_bad_value_is_named(field, value, expected):
    with pytest.raises(ConfigError) as error:
        MokaConfig(**{field: value})
    message = str(error.value)
    assert message.startswith(field) and "got " in message and expected in message


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="'target_module'; the nearest valid key is 'target_modules'"):
        MokaConfig.from_dict({"target_module": ["q_proj"]})
    with pytest.raises(ConfigError, match="'rank'; the nearest valid key is 'r'"):
        MokaConfig.from_dict({"rank": 8})


def test_a_newer_format_is_refused():
    with pytest.raises(ConfigError, match=f"format {FORMAT_VERSION + 1}.*up to {FORMAT_VERSION}.*newer moka"):
        MokaConfig.from_dict({**MokaConfig().to_dict(), "format_version": FORMAT_VERSION + 1})


@pytest.mark.parametrize("text", ["", "[1]", '{"r": }'])
def test_malformed_json(text):
    with pytest.raises(ConfigError, match="JSON"):
        MokaConfig.from_json(text)


def test_it_only_holds_data():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MokaConfig().r = 3  # pyright: ignore[reportAttributeAccessIssue]
    names = ["q_proj"]
    config = MokaConfig(target_modules=names)
    names.append("v_proj")
    assert config.target_modules == ("q_proj",)


name = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
shape = st.tuples(*[st.integers(1, 64)] * 4)
shape_spec = st.one_of(st.sampled_from(("balanced", "identity")), st.lists(shape, min_size=1, max_size=3))
configs = st.fixed_dictionaries(
    {},
    optional={
        "target_modules": st.one_of(st.just("all-linear"), st.lists(name, min_size=1, max_size=3)),
        "exclude_modules": st.lists(name, max_size=2),
        "layers_to_transform": st.one_of(
            st.none(), st.integers(0, 99), st.lists(st.integers(0, 99), min_size=1)
        ),
        "r": st.integers(1, 1024),
        "shapes": st.one_of(shape_spec, st.dictionaries(name, shape_spec, max_size=2)),
        "gate": st.sampled_from(("softmax", "linear", "none")),
        "scale": st.one_of(st.none(), st.floats(1e-3, 1e3), st.integers(1, 10)),
        "dropout": st.floats(0, 0.99),
        "r_pattern": st.dictionaries(name, st.integers(1, 1024), max_size=2),
        "modules_to_save": st.lists(name, max_size=2),
        "strict": st.booleans(),
    },
)


@settings(deadline=None, max_examples=50)
@given(configs)
def test_json_round_trip(values):
    config = MokaConfig(**values)
    text = config.to_json()
    assert MokaConfig.from_json(text) == config
    assert MokaConfig.from_json(text).to_json() == text
    assert MokaConfig.from_dict(config.to_dict()) == config
    assert json.loads(text)["format_version"] == FORMAT_VERSION


def test_patterns_match_the_end_of_a_path():
    config = MokaConfig(r_pattern={"v_proj": 5, r"layers\.0\..*": 3}, shapes={"q_proj": "identity"})
    assert config.r_for("model.layers.0.self_attn.v_proj") == 5
    assert config.r_for("model.layers.0.self_attn.q_proj") == 3
    assert config.r_for("model.layers.10.self_attn.q_proj") == 10
    assert config.r_for("model.conv_proj") == 10
    assert config.shapes_for("a.q_proj") == "identity" and config.shapes_for("a.kq_proj") == "balanced"


def entries(shapes):
    return sum(s.a_numel + s.b_numel for s in shapes)


def test_balanced_shapes_are_the_papers():
    paper_A = [(16, 256), (32, 128), (64, 64), (128, 32), (256, 16)]
    paper_B = paper_A[::-1]
    assert [s[0:2] for s in plan_shapes(4096, 4096, 10)] == paper_A * 2
    assert [s[2:4] for s in plan_shapes(4096, 4096, 10)] == paper_B * 2
    assert entries(plan_shapes(4096, 4096, 10)) == 81_920
    assert entries(plan_shapes(1024, 4096, 10)) == 40_960


@pytest.mark.parametrize(
    "N, K, more", [(3584, 3584, 1.01), (11008, 4096, 1.05), (13824, 5120, 1.001), (2560, 9728, 1.02)]
)
def test_sides_of_b_are_powers_of_two(N, K, more):
    shapes = plan_shapes(N, K, 10)
    assert all(size.bit_count() == 1 for s in shapes for size in (s.mb, s.nb))
    assert len(set(shapes)) == 5 and entries(shapes) <= more * 20 * math.sqrt(N * K)


def test_sides_of_b_are_powers_of_two_only_where_that_costs_little():
    assert [s.mb for s in plan_shapes(576, 576, 5)] == [96, 48, 24, 12, 6]
    assert [s.mb for s in plan_shapes(128 * 1187, 3584, 5)] == [1187, 1187, 128, 128, 128]


def test_what_is_left_of_r_goes_to_even_shapes_first():
    assert [s.ma for s in plan_shapes(4096, 4096, 3)] == [64, 32, 128]
    assert [s.ma for s in plan_shapes(4096, 4096, 6)] == [16, 32, 64, 128, 256, 64]


def test_identity_components_do_not_collapse():
    for N, K in ((4096, 4096), (1024, 4096), (576, 1536)):
        shapes = plan_shapes(N, K, 10, "identity")
        identities = [(s.identity, s.ma if s.identity == 1 else s.mb) for s in shapes]
        assert len(set(identities)) == 10 and {side for side, _ in identities} == {1, 2}
        assert all((s.ma == s.na) if s.identity == 1 else (s.mb == s.nb) for s in shapes)


def test_too_few_identity_sizes():
    assert len(plan_shapes(6, 9, 2, "identity")) == 2
    with pytest.raises(ConfigError, match=r"a\.b: .*2 distinct components for 6 x 9.*r=3.*r_pattern"):
        plan_shapes(6, 9, 3, "identity", module="a.b")


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 12))
def test_planned_shapes_fit_any_layer(N, K, r):
    shapes = plan_shapes(N, K, r, strict=False)
    assert len(shapes) == r
    assert all((s.ma * s.mb, s.na * s.nb) == (N, K) for s in shapes)


def test_a_prime_dimension():
    with pytest.raises(ConfigError, match=r"layer\.0: out_features is 13, a prime.*strict=False"):
        plan_shapes(13, 64, module="layer.0")
    with pytest.raises(ConfigError, match="in_features is 104729"):
        plan_shapes(64, 104729)
    shape = plan_shapes(13, 64, 1, strict=False)[0]
    assert sorted((shape.ma, shape.mb)) == [1, 13]
    assert [n for n in range(30) if is_prime(n)] == [5, 7, 11, 13, 17, 19, 23, 29]
    assert divisors(12) == (1, 2, 3, 4, 6, 12)


def test_explicit_shapes():
    shapes = plan_shapes(12, 8, 99, [(3, 2, 4, 4), (4, 4, 3, 2, 1)])
    assert shapes == (KronShape(3, 2, 4, 4), KronShape(4, 4, 3, 2, 1))
    with pytest.raises(ConfigError, match=r"a\.b: .*4, 2\) has the product 12 x 4.*expected 12 x 8"):
        plan_shapes(12, 8, kind=[(3, 2, 4, 2)], module="a.b")
    with pytest.raises(ConfigError, match="identity factor must be square"):
        plan_shapes(12, 8, kind=[(3, 2, 4, 4, 1)])


def test_a_component_of_one_entry():
    shapes = plan_shapes(12, 8, kind=[(1, 1, 12, 8)])
    assert (shapes[0].a_numel, shapes[0].b_numel, shapes[0].macs) == (1, 96, 96 + 8)
