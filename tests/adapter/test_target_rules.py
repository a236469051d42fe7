"""Rules against the modules that a trace found; tests/linen/test_discovery.py runs them on models."""

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
from ..refusals import refusals


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


def test_rules_that_all_match_are_taken():
    check(UP, target_modules=["up"])
    check(UP, target_modules="all-linear", modules_to_save=["head"])
    check(UP[1:], target_modules=["up"], layers_to_transform=[1])


def check_up(**fields):
    check(UP, target_modules=["up"], **fields)


PARAMETERS = LoRAPlusConfig(target_parameters={".*/w": "eio", "a/.*": "io"}, rank=2, rank_pattern={"b/w": 1})
EINSUM = TracedModule("Einsum", axes="io")

test_every_rule_must_match_something_once = refusals(
    (lambda: check(UP, target_modules=["upp"]), "target_modules", "'upp'", "'up'"),
    (lambda: check(UP, target_modules="up"), "target_modules", "'up'", "regular", "[up]"),
    (lambda: check([], target_modules=["norm"]), "'norm'", "Own", "target_parameters"),
    (lambda: check(UP, target_modules=["up", "norm/w"]), "'norm/w'", "target_parameters"),
    (lambda: check([], target_modules=["up"], exclude_modules=["up"]), "'up'", "exclude_modules"),
    (lambda: check_up(exclude_modules=["head"]), "exclude_modules", "'head'"),
    (lambda: check_up(layers_to_transform=[0, 7]), "layers_to_transform", 7, "[0, 1]"),
    (lambda: check_up(rank_pattern={"head": 2}), "rank_pattern", "'head'"),
    (lambda: check_up(modules_to_save=["tail"]), "modules_to_save", "'tail'"),
    (lambda: check_up(modules_to_save=["layers_0"]), "layers_0/up", "modules_to_save"),
    (lambda: check_up(target_parameters=[".*/v"]), "target_parameters", "'.*/v'"),
    (lambda: check_up(target_parameters=[".*_0/up/kernel"]), "kernel", "'up'", "already"),
    (lambda: parameter_rule(PARAMETERS, "a/w"), "'.*/w'", "'a/.*'", "'a/w'"),
    (
        lambda: parameter_spec(PARAMETERS, "b/w", ".*/w", (4, 5), "float32", ""),
        "'.*/w'",
        "(4, 5)",
        2,
        "'eio'",
    ),
    (lambda: layer_index("layers_3/sub_1/up"), "'layers_3/sub_1/up'", "[3, 1]"),
    (lambda: EINSUM.record("einsum", "oi", "q"), "'q'", "'io'", "'oi'", "target_parameters"),
    error=ValueError,
)


def test_a_parameter_is_matched_by_one_rule_with_a_letter_an_axis():
    assert parameter_rule(PARAMETERS, "b/w") == ".*/w"
    spec = parameter_spec(PARAMETERS, "b/w", ".*/w", (3, 4, 5), "bfloat16", "params/b/w")
    assert (spec.kind, spec.axes, spec.rank, spec.scale) == ("parameter", "eio", 1, 16.0)


def test_the_module_to_save_of_a_path():
    config = LoRAPlusConfig(target_modules=["up"], modules_to_save=["b/head"])
    assert [saved_module_of(config, p) for p in ("a/b/head/out", "head")] == ["b/head", None]


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
