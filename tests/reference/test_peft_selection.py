"""`convert --to merged` computes what PEFT computes, for every option that selects modules, or raises.

The options are drawn by chance: PEFT makes an adapter with some; then one is changed in its file, as by hand.
The reference is `PeftModel.from_pretrained`, which the verification of a merged model does not use.
"""

import contextlib
import copy
import json
import random

import numpy as np
import peft
import pytest
import torch
import transformers

from loraplus_jax.inference.convert import convert

from ..inference.conversions import write_base

pytestmark = pytest.mark.slow

CHOICES = {
    "target_modules": (
        *(["q_proj"], ["q_proj", "v_proj"], ["self_attn.k_proj", "down_proj"], "all-linear"),
        *(r".*\.0\..*proj", r".*\.(q|up)_proj", ["model.layers.0.self_attn.q_proj", "v_proj"]),
        *(["lm_head", "q_proj"], ["embed_tokens", "o_proj"], ["embed_tokens", "lm_head", "v_proj"]),
    ),
    "exclude_modules": (None, None, ["v_proj"], ["0.self_attn.q_proj", "mlp"], r".*\.1\..*", "lm_head"),
    "layers_to_transform": (None, None, 0, [1], [0, 1]),
    "layers_pattern": (None, None, "layers", ["blocks", "layers"], "blocks"),
    "modules_to_save": (
        None,
        None,
        ["lm_head"],
        ["embed_tokens"],
        ["norm"],
        ["q_proj"],
        ["embed_tokens", "lm_head"],
    ),
    "ensure_weight_tying": (False, False, True),
    "rank_pattern": ({}, {}, {"v_proj": 3}, {r"layers\.0\..*": 1}),
    "use_rslora": (False, True),
}
LIMIT = 1e-4
"""Of logits up to 10, by float32; what an option selects changes them by 0.1 and more."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Without and with a tied head."""
    root = tmp_path_factory.mktemp("bases")
    return [write_base(root / str(tied), tie_word_embeddings=tied) for tied in (False, True)]


def model_of(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits.numpy()


def made_by_peft(base, options, directory):
    """An adapter with random values, as PEFT saves it; False if PEFT does not accept the options."""
    try:
        config = peft.LoraConfig(
            r=2, lora_alpha=3, task_type="CAUSAL_LM", **copy.deepcopy(options)
        )  # it changes lists
        model = peft.get_peft_model(model_of(base), config)
    except (ValueError, TypeError):
        return False
    generator = torch.Generator().manual_seed(0)
    for name, x in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            x.data.add_(
                0.2 * torch.randn(x.shape, generator=generator)
            )  # in place: tied factors share memory
    model.save_pretrained(directory)
    return True


def by_peft(base, directory):
    """PEFT's logits, or None if it rejects the options."""
    try:
        return logits(peft.PeftModel.from_pretrained(model_of(base), directory).eval())
    except KeyError as error:  # a module to save without its weight, of which it has no message
        pytest.skip(f"PEFT fails at {error}")
    except (ValueError, TypeError):
        return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(30))
def test_options_that_select_modules(seed, bases, tmp_path):
    draw, base = random.Random(seed), bases[seed % 2]
    options = {name: draw.choice(choices) for name, choices in CHOICES.items()}
    if not made_by_peft(base, options, tmp_path / "peft"):
        options |= {"layers_to_transform": None, "layers_pattern": None}
        if not made_by_peft(base, options, tmp_path / "peft"):
            pytest.skip("PEFT does not accept the options")
    changed = draw.choice([*4 * [None], *CHOICES])
    if changed:
        file = tmp_path / "peft/adapter_config.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {changed: draw.choice(CHOICES[changed])}))
    wanted = by_peft(base, tmp_path / "peft")
    with contextlib.ExitStack() as stack:
        if changed:
            stack.enter_context(contextlib.suppress(ValueError))
        convert(tmp_path / "peft", "merged", tmp_path / "out", base=str(base), no_verify=True)
        assert wanted is not None
        np.testing.assert_allclose(logits(model_of(tmp_path / "out")), wanted, rtol=0, atol=LIMIT)
