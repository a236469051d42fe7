"""The names that our maps give to modules are those of transformers' models."""

import re

import pytest
import torch
import transformers

from loraplus_jax.interop import library_path_maps

pytestmark = pytest.mark.slow

SIZES = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
TEXT = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32}


def gemma3():
    vision = SIZES | {"image_size": 8, "patch_size": 2}
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=vision)
    return transformers.Gemma3ForConditionalGeneration(config)


MODELS = {
    "TUNIX_LLAMA": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT)),
    "BONSAI_QWEN3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT)),
    "BONSAI_GEMMA3": gemma3,
    "BONSAI_VIT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_rule_names_a_module(name):
    with torch.device("meta"):
        model = MODELS[name]()
    modules = [path for path, module in model.named_modules() if hasattr(module, "weight")]
    for _, theirs, *_ in getattr(library_path_maps, name):
        pattern = re.sub(r"\\{\w+\\}", r"[^.]+", re.escape(theirs))
        assert any(re.fullmatch(pattern, path) for path in modules), theirs
