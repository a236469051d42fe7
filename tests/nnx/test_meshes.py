"""Adapters lie on a mesh as their weights do, and train there as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from loraplus_jax import LoRAPlusConfig, lora_plus_adamw
from loraplus_jax.nnx import apply_lora_plus, lora_tree, merge

pytestmark = pytest.mark.slow

X = jax.random.normal(jax.random.key(3), (8, 8))
CONFIG = LoRAPlusConfig(target_modules=["up", "down"], rank=2, lr_ratio=4.0, variant="dora")
SPECS = {
    ("up", "lora_a"): ("fsdp", None),
    ("up", "lora_b"): (None, "tensor"),
    ("down", "lora_a"): ("tensor", None),
    ("down", "lora_b"): (None, "fsdp"),
}


class Net(nnx.Module):
    def __init__(self, rngs, named=True):
        init = nnx.initializers.lecun_normal()
        names = lambda *axes: nnx.with_partitioning(init, axes) if named else init  # noqa: E731
        self.up = nnx.Linear(8, 16, use_bias=False, kernel_init=names("fsdp", "tensor"), rngs=rngs)
        self.down = nnx.Linear(16, 8, use_bias=False, kernel_init=names("tensor", "fsdp"), rngs=rngs)

    def __call__(self, x, explicit=False):
        # Explicit types ask for the layout of every product that contracts a sharded axis.
        layouts = [PartitionSpec("fsdp", name) if explicit else None for name in ("tensor", None)]
        return self.down(jnp.tanh(self.up(x, out_sharding=layouts[0])), out_sharding=layouts[1])


def make(named=True):
    model = Net(nnx.Rngs(0), named)
    apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))
    return model


def train(model, x, explicit=False):
    optimizer = nnx.Optimizer(model, lora_plus_adamw(1e-2, lr_ratio=4.0), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x, explicit) - 1) ** 2), argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer, x)) for _ in range(4)]


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=str)
def mesh(request):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(request.param,) * 2)


def layout(model):
    """The mesh axes of each factor, with those that a spec leaves out at its end; magnitudes lie as B."""
    specs = {key: getattr(getattr(model, key[0]), key[1])[...].sharding.spec for key in SPECS}
    for module in ("up", "down"):
        magnitude = getattr(model, module).lora_magnitude[...].sharding.spec
        assert (*magnitude, None)[1] == SPECS[module, "lora_b"][1]
    return {key: (*spec, *(None,) * (2 - len(spec))) for key, spec in specs.items()}


def test_one_device_and_a_mesh_agree(mesh):
    explicit = AxisType.Explicit in mesh.axis_types
    expected = train(one := nnx.jit(lambda: make(named=False))(), X)
    with jax.set_mesh(mesh):
        model = nnx.jit(make)()
        assert layout(model) == SPECS
        x = jax.device_put(X, PartitionSpec("fsdp", None))
        np.testing.assert_allclose(train(model, x, explicit), expected, rtol=1e-5)
        assert layout(model) == SPECS
        np.testing.assert_allclose(merge(model)(x, explicit), model(x, explicit), rtol=0, atol=1e-5)
        graph, state = nnx.split(model)
        np.testing.assert_array_equal(nnx.merge(graph, state)(x, explicit), model(x, explicit))
    for found, value in zip(*map(jax.tree.leaves, (lora_tree(model), lora_tree(one))), strict=True):
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-5)


def test_a_model_on_a_mesh_is_adapted_outside_its_context(mesh):
    with jax.set_mesh(mesh):
        model = Net(nnx.Rngs(0))
    apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))
    assert layout(model) == SPECS
