"""LoRAPlusConfig: visible defaults, checked values, and which module paths a rule names."""

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.adapter.config import matches

from ..messages import mentions


def test_defaults_are_the_documented_ones():
    assert LoRAPlusConfig(target_modules=["query"]).to_json() == {
        "target_modules": ["query"],
        "exclude_modules": [],
        "target_parameters": {},
        "layers_to_transform": None,
        "rank": 8,
        "alpha": 16.0,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_iterations": None,
        "dropout": 0.0,
        "lr_ratio": 4.0,
        "init": "lora",
        "variant": "lora",
        "modules_to_save": [],
        "bias": "none",
    }


def test_target_modules_is_required_and_fields_are_keywords():
    with pytest.raises(ValueError, match="target_modules"):
        LoRAPlusConfig()
    with pytest.raises(TypeError, match="positional"):
        LoRAPlusConfig(["query"])


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAPlusConfig(target_modules=["query"]).rank = 4


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        *[("rank", value, ValueError) for value in (0, -1)],
        *[("rank", value, TypeError) for value in (2.0, True, "8", None)],
        *[("alpha", value, ValueError) for value in (0.0, -1.0, math.nan, math.inf)],
        *[("alpha", value, TypeError) for value in (True, "16", None)],
        *[("lr_ratio", value, ValueError) for value in (0, -16.0, math.nan, math.inf)],
        *[("lr_ratio", value, TypeError) for value in ("16", True, jnp.float32(4.0), np.ones(()))],
        *[("dropout", value, ValueError) for value in (-0.1, 1.0, math.nan)],
        ("dropout", "0", TypeError),
        *[("init", value, ValueError) for value in ("he", "", None)],
        *[("target_modules", value, ValueError) for value in ((), "", "(", ["q", "q"])],
        *[("target_modules", value, TypeError) for value in (None, 3, [3], [""], ["q", "/"], {"q": 4})],
        *[("modules_to_save", value, TypeError) for value in ("head", {"head": 2})],
        ("exclude_modules", "(", ValueError),
        ("exclude_modules", [3], TypeError),
        *[("layers_to_transform", value, ValueError) for value in ([], [-1], [1, 1])],
        *[("layers_to_transform", value, TypeError) for value in ([1.5], [True])],
        *[("layers_to_transform", value, TypeError) for value in ("1", {1: 2})],
        *[("target_parameters", value, TypeError) for value in ("w", 3, [3], {"": "io"}, None, [["w"]])],
        *[
            ("target_parameters", value, ValueError)
            for value in (["("], {"w": "ii"}, {"w": "iO"}, {"w": 3}, ["w", "w"])
        ],
        *[("rank_pattern", value, ValueError) for value in ({"q": 0}, {"(": 2})],
        ("rank_pattern", {"q": 1.5}, TypeError),
        *[("rank_pattern", value, TypeError) for value in (["q"], 3, {3: 2})],
        *[("alpha_pattern", value, ValueError) for value in ({"q": 0.0}, {"q": math.nan})],
        ("alpha_pattern", {"q": "2"}, TypeError),
        ("use_rslora", 1.5, TypeError),
        ("bias", "some", ValueError),
        ("modules_to_save", ["head", "head"], ValueError),
    ],
)
def test_a_bad_value_is_rejected_by_name(field, value, error):
    with pytest.raises(error, match=field):
        LoRAPlusConfig(**{"target_modules": ["query"], field: value})


@pytest.mark.parametrize(
    ("init", "ratio"), [("lora", 4.0), ("he_uniform", 4.0), ("gaussian", 4.0), ("lora_b", 16.0)]
)
def test_the_default_ratio_follows_the_init(init, ratio):
    config = LoRAPlusConfig(target_modules=["q"], init=init)
    assert config.lr_ratio == ratio
    assert LoRAPlusConfig(target_modules=["q"], init=init, lr_ratio=2.0).lr_ratio == 2.0
    assert LoRAPlusConfig.from_json(config.to_json()) == config
    docs = (Path(__file__).parents[2] / "docs" / "choosing_lambda.md").read_text()
    assert f"| `{init}` | {ratio:g} |" in docs


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match=mentions("'lora_alpha'", "'alpha'")):
        LoRAPlusConfig.from_json({"target_modules": ["q"], "lora_alpha": 16})


@pytest.mark.parametrize(
    ("rule", "path", "expected"),
    [
        (("query",), "query", True),
        (("query",), "layers/attention/query", True),
        (("query",), "layers/my_query", False),
        (("query",), "query/dense", False),
        (("attention/query",), "layers/attention/query", True),
        (("attention/query",), "layers/cross_attention/query", False),
        (("value", "query"), "layers/query", True),
        (("q.*",), "query", False),
        (".*query", "layers/my_query", True),
        ("query", "layers/query", False),
        ("layers_[0-3]/query", "layers_3/query", True),
        ("layers_[0-3]/query", "layers_4/query", False),
        (".*", "", True),
        ((), "query", False),
    ],
)
def test_matches(rule, path, expected):
    assert matches(rule, path) is expected


def test_patterns_are_those_of_peft():
    config = LoRAPlusConfig(
        target_modules=["q"],
        rank=8,
        alpha=16.0,
        rank_pattern={"layers_0/.*": 2, "q": 4},
        alpha_pattern={"k": 3.0, "layers_[0-9]/v": 5.0},
    )
    ranks = {
        "layers_0/q": 2,
        "layers_1/q": 4,
        "q": 4,
        "my_q": 8,
        "layers_0/q/x": 2,
        "x/layers_0/q": 2,
        "v": 8,
    }
    assert {path: config.rank_of(path) for path in ranks} == ranks
    scales = {"layers_1/k": 3 / 8, "layers_1/v": 5 / 8, "layers_0/v": 5 / 2, "v": 16 / 8}
    assert {path: config.scale_of(path) for path in scales} == scales


@pytest.mark.parametrize(("use_rslora", "scales"), [(False, (1.5, 6 / 9)), (True, (3.0, 2.0))])
def test_scale_is_alpha_over_the_rank_or_its_root(use_rslora, scales):
    fields = {"rank": 4, "alpha": 6, "rank_pattern": {"k": 9}}
    config = LoRAPlusConfig(target_modules=["q"], use_rslora=use_rslora, **fields)
    assert (config.scale, config.scale_of("k")) == scales


def test_json_round_trip_with_every_field_and_hash():
    config = LoRAPlusConfig(
        target_modules="all-linear",
        exclude_modules=["head"],
        target_parameters={".*/w": "eio"},
        layers_to_transform=[1, 2],
        rank=3,
        alpha=np.float32(2.0),  # numbers of NumPy are saved as JSON's
        rank_pattern={"q": 2},
        alpha_pattern={"q": np.float32(3.0)},
        dropout=0.5,
        init="lora_b",
        modules_to_save=["norm"],
        bias="lora_only",
    )
    values = json.loads(json.dumps(config.to_json()))
    assert LoRAPlusConfig.from_json(values) == config
    assert hash(LoRAPlusConfig.from_json(values)) == hash(config)
    assert LoRAPlusConfig(target_parameters=["w"]).target_parameters == {"w": "io"}
