"""PiSSA and OLoRA start as PEFT's do."""

import jax
import numpy as np
import peft
import pytest
import torch
from flax import linen as nn

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.inits.from_weights import olora, pissa

pytestmark = pytest.mark.slow

STARTS = {"pissa": pissa, "olora": olora}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_that_of_peft(name):
    x = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    model = apply_lora_plus(nn.Dense(9, name="0"), LoRAPlusConfig(target_modules=".*", rank=4, alpha=6))
    base = {"params": nn.Dense(9).init(jax.random.key(0), x)["params"]}
    _, specs = init_lora(model, jax.random.key(1), x)
    rest, lora = STARTS[name](base, specs)
    theirs = torch.nn.Sequential(torch.nn.Linear(12, 9))
    with torch.no_grad():
        theirs[0].weight.copy_(torch.from_numpy(np.asarray(base["params"]["kernel"]).T.copy()))
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6, init_lora_weights=name)
    )
    layer = adapted.base_model.model[0]
    tolerance = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(
        rest["params"]["kernel"], layer.base_layer.weight.detach().numpy().T, **tolerance
    )
    a, b = (part["default"].weight.detach().numpy().T for part in (layer.lora_A, layer.lora_B))
    np.testing.assert_allclose(lora["lora_a"] @ lora["lora_b"], a @ b, **tolerance)
    # Singular vectors and QR have free signs.
    np.testing.assert_allclose(np.abs(lora["lora_a"]), np.abs(a), **tolerance)
