"""Rules against the modules that a trace found; tests/linen/test_rules.py runs them on models."""

import pytest

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.target_rules import (
    TracedModule,
    check_coverage,
    config_of,
    layer_index,
    parameter_rule,
    parameter_spec,
    saved_module_of,
    try_rules,
)

from ..messages import mentions


def seen(*adapted):
    layers = ("layers_0/up", "layers_1/up", "head")
    return {
        p: TracedModule("Dense", kind="dense", axes="io", adaptable=True, adapted=p in adapted)
        for p in layers
    }


def check(adapted, **fields):
    found = seen(*adapted) | {"norm": TracedModule("Own", weights=["w"])}
    check_coverage(LoRAPlusConfig(**fields), found, [f"{p}/kernel" for p in seen()] + ["norm/w"], {})


UP = ["layers_0/up", "layers_1/up"]


@pytest.mark.parametrize(
    ("adapted", "fields", "words"),
    [
        (UP, {"target_modules": ["up"]}, None),
        (UP, {"target_modules": "all-linear", "modules_to_save": ["head"]}, None),
        (UP[1:], {"target_modules": ["up"], "layers_to_transform": [1]}, None),
        (UP, {"target_modules": ["upp"]}, ["target_modules", "'upp'", "'up'"]),
        (UP, {"target_modules": "up"}, ["target_modules", "'up'", "regular", "[up]"]),
        ([], {"target_modules": ["norm"]}, ["'norm'", "Own", "target_parameters"]),
        ([], {"target_modules": ["up"], "exclude_modules": ["up"]}, ["'up'", "exclude_modules"]),
        (UP, {"target_modules": ["up"], "exclude_modules": ["head"]}, ["exclude_modules", "'head'"]),
        (UP, {"target_modules": ["up"], "layers_to_transform": [0, 7]}, ["layers_to_transform", 7, "[0, 1]"]),
        (UP, {"target_modules": ["up"], "rank_pattern": {"head": 2}}, ["rank_pattern", "'head'"]),
        (UP, {"target_modules": ["up"], "modules_to_save": ["tail"]}, ["modules_to_save", "'tail'"]),
        (UP, {"target_modules": ["up"], "modules_to_save": ["layers_0"]}, ["layers_0/up", "modules_to_save"]),
        (UP, {"target_modules": ["up"], "target_parameters": [".*/v"]}, ["target_parameters", "'.*/v'"]),
        (
            UP,
            {"target_modules": ["up"], "target_parameters": [".*_0/up/kernel"]},
            ["kernel", "'up'", "already"],
        ),
    ],
)
def test_every_rule_must_match_something_once(adapted, fields, words):
    if words is None:
        check(adapted, **fields)
    else:
        with pytest.raises(ValueError, match=mentions(*words)):
            check(adapted, **fields)


def test_a_parameter_is_matched_by_one_rule_with_a_letter_an_axis():
    config = LoRAPlusConfig(target_parameters={".*/w": "eio", "a/.*": "io"}, rank=2, rank_pattern={"b/w": 1})
    assert parameter_rule(config, "b/w") == ".*/w"
    with pytest.raises(ValueError, match=mentions("'.*/w'", "'a/.*'", "'a/w'")):
        parameter_rule(config, "a/w")
    spec = parameter_spec(config, "b/w", ".*/w", (3, 4, 5), "params/b/w")
    assert (spec.kind, spec.axes, spec.rank, spec.scale) == ("parameter", "eio", 1, 16.0)
    with pytest.raises(ValueError, match=mentions("'.*/w'", "(4, 5)", 2, "'eio'")):
        parameter_spec(config, "b/w", ".*/w", (4, 5), "params/b/w")


def test_layers_and_modules_by_path():
    with pytest.raises(ValueError, match=mentions("'layers_3/sub_1/up'", "[3, 1]")):
        layer_index("layers_3/sub_1/up")
    config = LoRAPlusConfig(target_modules=["up"], modules_to_save=["b/head"])
    assert [saved_module_of(config, p) for p in ("a/b/head/out", "head")] == ["b/head", None]


def test_a_layer_used_with_two_equations_has_no_sides():
    with pytest.raises(ValueError, match=mentions("'q'", "'io'", "'oi'", "target_parameters")):
        TracedModule("Einsum", axes="io").record("einsum", "oi", "q")


def test_patterns_of_strangers_are_tried_elsewhere():
    try_rules("lora", LoRAPlusConfig(target_modules=["b"]).to_json(), ["b"])
    for field in ("target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=mentions("lora", "'('")):
            try_rules("lora", {field: "("}, ["b"])
    for field in ("target_parameters", "rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=mentions("lora", "rule")):
            try_rules("lora", {field: {"(": 2}}, ["b"])


def test_a_config_of_specs_gives_each_path_its_own_values():
    """Some paths end in others, which is all that a pattern looks at."""
    wanted = {"q": (4, 2.0), "x/q": (2, 1.0), "y/q": (2, 1.0), "y/z": (2, 1.0), "x/y/q": (8, 0.5)}
    specs = {
        path: AdapterSpec(
            leaf=f"params/{path}/kernel", kind="dense", axes="io", shape=(16, 16), rank=rank, scale=scale
        )
        for path, (rank, scale) in wanted.items()
    }
    config = config_of(specs)
    assert {path: (config.rank_of(path), config.scale_of(path)) for path in specs} == wanted
    assert config.rank_pattern.keys() == {"x/y/q", "x/q", "y/q", "q"}
    assert config.target_modules == "q|x/q|y/q|y/z|x/y/q"
