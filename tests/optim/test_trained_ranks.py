"""Ranks after training, and adapters without the components that are 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, load_adapter, save_adapter
from loraplus_jax.adapter.lora import weight_delta
from loraplus_jax.optim.trained_ranks import final_ranks, prune


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="fc")(x), None


class Net(nn.Module):
    """Three stacked layers, a layer with two output axes, and one whose path ends and precedes the first's."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(5, name="fc")(nn.DenseGeneral((2, 3), name="heads")(x).reshape(-1, 6))


X = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
ZEROS = {"layers/fc": [[0], [0, 1, 2, 3], [1, 2]], "fc": [1], "heads": [0, 1, 2, 3]}
"""The components that are 0, by module and layer."""


def net(**fields):
    """The model, its factors with zeros in B, the table and the config."""
    config = LoRAPlusConfig(**{"target_modules": ["fc", "heads"], "rank": 4, "alpha": 7.0} | fields)
    model = apply_lora_plus(Net(), config)
    lora, specs = init_lora(model, jax.random.key(0), X)
    random = np.random.default_rng(1)
    lora = jax.tree.map(lambda x: random.normal(size=x.shape, scale=0.3).astype(np.float32), lora)
    for layer, zeros in enumerate(ZEROS["layers/fc"]):
        lora["layers"]["fc"]["lora_b"][layer, zeros] = 0
    lora["fc"]["lora_b"][ZEROS["fc"]] = 0
    lora["heads"]["lora_b"][ZEROS["heads"]] = 0
    return model, lora, specs, config


def test_ranks_are_counted_by_layer():
    _, lora, specs, _ = net()
    assert final_ranks(lora, specs) == {"layers/fc": [3, 0, 2], "fc": 3, "heads": 0}
    assert final_ranks({"lora": lora}, specs)["fc"] == 3


@pytest.mark.slow
def test_a_pruned_adapter_is_plain_lora_with_the_same_outputs(tmp_path):
    model, lora, specs, config = net(alpha_pattern={"heads": 3.0})
    params = jax.jit(Net().init)(jax.random.key(2), X)["params"]
    small, table, pruned_config = prune(lora, specs, config)
    assert {module: spec.rank for module, spec in table.items()} == {"layers/fc": 3, "fc": 3, "heads": 1}
    for module, spec in specs.items():
        assert pruned_config.rank_of(module) == table[module].rank
        assert pruned_config.scale_of(module) == table[module].scale == pytest.approx(spec.scale, rel=1e-15)
    pruned = apply_lora_plus(Net(), pruned_config)
    _, made = init_lora(pruned, jax.random.key(0), X)
    assert made == table
    outputs = jax.jit(model.apply)({"params": params, "lora": lora}, X)
    found = jax.jit(pruned.apply)({"params": params, "lora": small}, X)
    np.testing.assert_allclose(found, outputs, rtol=1e-5, atol=1e-5)
    for module, spec in specs.items():
        before, after = (
            weight_delta(*(jnp.asarray(x) for x in at(tree, module).values()), s)
            for tree, s in ((lora, spec), (small, table[module]))
        )
        np.testing.assert_allclose(before, after, atol=1e-6)
    assert final_ranks(small, table) == final_ranks(lora, specs)
    save_adapter(tmp_path / "a", small, table, pruned_config)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "a").lora, small)


def at(tree, module):
    for name in module.split("/"):
        tree = tree[name]
    return tree


@pytest.mark.slow
def test_the_adapter_of_a_single_layer_can_be_pruned():
    config = LoRAPlusConfig(target_modules=".*", rank=3, use_rslora=True)
    model = apply_lora_plus(nn.Dense(5), config)
    lora, specs = init_lora(model, jax.random.key(0), X)
    lora["lora_b"] = jnp.ones((3, 5)).at[0].set(0)
    small, _, found = prune(lora, specs, config)
    assert (small["lora_a"].shape, found.rank_of("")) == ((6, 2), 2)
    assert found.scale_of("") == pytest.approx(specs[""].scale, rel=1e-15)
    np.testing.assert_array_equal(small["lora_a"], lora["lora_a"][:, 1:])
