"""Under `nnx.Optimizer`: labels see through Variables, rates can be changed, and describe reads its state."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loraplus_jax import describe, lora_plus_adamw

inject = optax.inject_hyperparams


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def net():
    model = Net(nnx.Rngs(0))
    for layer in model.layers:
        layer.lora.lora_b[...] = jnp.full((2, 4), 0.5, jnp.float32)
    return model


@pytest.mark.parametrize("make", [lora_plus_adamw, inject(lora_plus_adamw, static_args=("b1", "b2", "eps"))])
def test_the_realised_ratio_is_that_of_the_optimizer(net, make):
    tx = make(learning_rate=1e-3, lr_ratio=8.0, eps=1e-30)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.LoRAParam)
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        gradients = nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)

    def moved():
        before = [np.array(layer.lora.lora_a[...]) for layer in net.layers]
        other = [np.array(layer.lora.lora_b[...]) for layer in net.layers]
        step(net, optimizer, jnp.ones((3, 4)))
        return [
            (abs(layer.lora.lora_a[...] - a).max(), abs(layer.lora.lora_b[...] - b).max())
            for layer, a, b in zip(net.layers, before, other, strict=True)
        ]

    np.testing.assert_allclose(moved(), [(1e-3, 8e-3)] * 2, rtol=1e-3)
    rows = {row.path: row.rate for row in describe(nnx.state(net, nnx.LoRAParam), optimizer.opt_state).rows}
    assert {path.split("/")[3]: rate for path, rate in rows.items()} == pytest.approx(
        {"lora_a": 1e-3, "lora_b": 8e-3}
    )
    if make is not lora_plus_adamw:
        optimizer.opt_state.hyperparams["lr_ratio"][...] = jnp.float32(2.0)
        (first, second), *_ = moved()
        assert second / first == pytest.approx(2.0, rel=0.2)  # of moments that remember the step before
        rows = describe(nnx.state(net, nnx.LoRAParam), optimizer.opt_state).rows
        assert rows[1].rate == pytest.approx(2e-3)
        assert len(traces) == 1
