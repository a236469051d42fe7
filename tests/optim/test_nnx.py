"""Under `nnx.Optimizer`: labels see through Variables, rates can be changed, and describe reads its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loraplus_jax import describe, lora_plus_adamw


class Net(nnx.Module):
    def __init__(self, make):
        self.layers = nnx.List([make(nnx.Rngs(n)) for n in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
def test_the_realised_ratio_is_that_of_the_optimizer_with_the_layers_of_flax():
    net = Net(lambda rngs: nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs))
    for layer in net.layers:
        layer.lora.lora_b[...] = jnp.full((2, 4), 0.5, jnp.float32)
    injected = optax.inject_hyperparams(lora_plus_adamw, static_args=("b1", "b2", "eps", "specs"))
    tx = injected(learning_rate=1e-3, lr_ratio=8.0, eps=1e-30)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.LoRAParam)
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        gradients = nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)

    def moved():
        """The largest change of each factor by a step."""
        before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(net, nnx.LoRAParam)))
        step(net, optimizer, jnp.ones((3, 4)))
        after = nnx.to_pure_dict(nnx.state(net, nnx.LoRAParam))
        return jax.tree.leaves(jax.tree.map(lambda x, y: abs(x - y).max(), after, before))

    def told():
        return [row.rate for row in describe(nnx.state(net, nnx.LoRAParam), optimizer.opt_state).rows]

    np.testing.assert_allclose(moved(), [1e-3, 8e-3] * 2, rtol=1e-3)
    assert told() == pytest.approx([1e-3, 8e-3] * 2)
    optimizer.opt_state.hyperparams["lr_ratio"][...] = jnp.float32(2.0)
    first, second, *_ = moved()
    assert second / first == pytest.approx(2.0, rel=0.2)  # of moments that remember the step before
    assert told()[1] == pytest.approx(2e-3)
    assert len(traces) == 1
