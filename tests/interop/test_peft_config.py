"""PEFT's options: what is read, and what is rejected."""

import json

import pytest

from loraplus_jax.interop.peft_config import read_options


def options_file(tmp_path, **changes):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be LORA"),
        ({"use_dora": True, "lora_bias": True}, "use_dora is True; lora_bias is True"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"corda_config": {"verbose": False}}, "corda_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, "changes the base"),
        ({"brand_new": 1}, "brand_new is 1, and not known here"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": None}, "r must be a whole number"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, "must be a whole number"),
        ({"alpha_pattern": [1]}, "must be a mapping"),
        ({"bias": "some"}, "bias must be one of"),
        ({"target_modules": 3}, "target_modules must be a list of names"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"base_model_name_or_path": 1}, "must be a text"),
    ],
)
def test_options_that_we_lack_or_that_are_odd_are_refused(changes, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        read_options(options_file(tmp_path, **changes))


def test_options_that_are_off_or_of_no_effect_are_not_in_the_way(tmp_path):
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
    assert [options.rank_of(n) for n in ("x.layers.0.q", "y.q", "my_q")] == [2, 3, 4]
    assert options.scale_of("x.layers.0.q") == 4.0
