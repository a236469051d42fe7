"""PEFT's options: what is read, and what is rejected."""

import json

import pytest

from loraplus_jax.interop.peft_adapter_config import read_options

from ..messages import mentions


def options_file(tmp_path, **changes):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "LOHA"}, mentions("peft_type", "LORA", "'LOHA'")),
        ({"use_qalora": True, "lora_bias": True}, mentions("use_qalora", "lora_bias", True)),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"corda_config": {"verbose": False}}, "corda_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, mentions("init_lora_weights", "'pissa'")),
        ({"init_lora_weights": "olora"}, mentions("init_lora_weights", "'olora'")),
        ({"brand_new": 1}, mentions("brand_new", 1)),
        ({"r": 0}, mentions("r", 1, 0)),
        ({"r": None}, mentions("r", 1, None)),
        ({"lora_alpha": "8"}, mentions("lora_alpha", "'8'")),
        ({"rank_pattern": {"(": 2}}, mentions("rank_pattern", "'('")),
        ({"rank_pattern": {"q": 0}}, mentions("rank_pattern", "q", 1, 0)),
        ({"alpha_pattern": [1]}, mentions("alpha_pattern", "mapping", "[1]")),
        ({"bias": "some"}, mentions("bias", "none", "all", "lora_only", "'some'")),
        ({"target_modules": 3}, mentions("target_modules", 3)),
        ({"modules_to_save": "head"}, mentions("modules_to_save", "'head'")),
        ({"use_rslora": "yes"}, mentions("use_rslora", "true", "false", "'yes'")),
        ({"use_dora": 1}, mentions("use_dora", "true", "false", 1)),
        ({"base_model_name_or_path": 1}, mentions("base_model_name_or_path", 1)),
    ],
)
def test_unsupported_or_invalid_options_are_rejected(changes, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        read_options(options_file(tmp_path, **changes))


def test_options_that_are_off_or_without_effect_are_accepted(tmp_path):
    path = options_file(
        tmp_path,
        use_dora=False,
        loftq_config={},
        eva_config=None,
        layers_pattern=None,
        inference_mode=True,
        init_lora_weights="gaussian",
        megatron_core="megatron.core",
        qalora_group_size=16,
        rank_pattern={"layers.0.*": 2, "q": 3},
    )
    options = read_options(path)
    names = ("x.layers.0.q", "y.q", "my_q")
    assert options.ranks_and_alphas(names) == {"x.layers.0.q": (2, 8), "y.q": (3, 8), "my_q": (4, 8)}
    assert options.scale(2, 8) == 4.0


@pytest.mark.parametrize(
    ("targets", "excluded", "idle"),
    [
        (["q", "k"], None, ["k"]),
        (["q", "k"], ["k"], []),
        (["q", "attn.k"], ["k"], []),
        (["q", "k"], r".*\.attn\.k", []),
        (["q", "k", "v"], ["k"], ["v"]),
        ("all-linear", ["k"], []),
        (r".*\.(q|k)", r".*\.k", []),
        (r".*\.k", None, [r".*\.k"]),
    ],
)
def test_targets_without_factors_are_those_that_exclude_modules_does_not_name(
    targets, excluded, idle, tmp_path
):
    options = read_options(options_file(tmp_path, target_modules=targets, exclude_modules=excluded))
    assert options.missing_targets(["layers.0.attn.q", "layers.1.attn.q"]) == idle
