"""Twenty steps with the Riemannian preconditioner are those of PEFT's optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from peft.optimizers import create_riemannian_optimizer

from loraplus_jax.optim.riemannian import scale_by_riemannian

pytestmark = pytest.mark.slow

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}, optax.sgd(0.01, momentum=0.9)),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.01}, optax.adamw(0.01, weight_decay=0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_are_those_of_peft(name):
    cls, options, base = OPTIMIZERS[name]
    random = np.random.default_rng(0)
    x, y, w, a, b = (random.normal(size=shape) for shape in ((16, 6), (16, 5), (6, 5), (6, 3), (3, 5)))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)).double()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=6)).double()
    layer = adapted.base_model.model[0]
    for parameter, value in (
        (layer.base_layer, w),
        (layer.lora_A["default"], a),
        (layer.lora_B["default"], b),
    ):
        parameter.weight.data = torch.from_numpy(value.T.copy())
    theirs = create_riemannian_optimizer(adapted, cls, lr=0.01, reg=1e-2, **options)
    with jax.enable_x64(True):
        params = {"q": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}
        tx = optax.chain(scale_by_riemannian(1e-2), base)
        state = tx.init(params)
        loss = lambda p: jnp.mean((x @ w + 2 * (x @ p["q"]["lora_a"]) @ p["q"]["lora_b"] - y) ** 2)  # noqa: E731
        for _ in range(20):
            theirs.zero_grad()
            torch.mean((adapted(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).backward()
            theirs.step()
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        for side, parameter in (("lora_a", layer.lora_A), ("lora_b", layer.lora_B)):
            expected = parameter["default"].weight.detach().numpy().T
            np.testing.assert_allclose(params["q"][side], expected, rtol=0, atol=1e-6)
