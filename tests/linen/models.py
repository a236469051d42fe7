"""What the tests of Linen models share beside the toys of tests/zoo: random variables, and comparisons."""

import jax
import jax.numpy as jnp
import numpy as np

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora

KEY = jax.random.key(0, impl="rbg")
X = jax.random.normal(jax.random.key(1), (2, 4))


def config(*targets, **fields):
    return LoRAPlusConfig(**{"target_modules": targets, "rank": 2, "alpha": 3.0} | fields)


def drawn(tree, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def prepared(net, rules):
    """The model, random base and factors, and the table; factors that are zero by rule stay so."""
    model = apply_lora_plus(net, rules)
    lora, specs = init_lora(model, KEY, X)
    base = {"params": drawn(jax.eval_shape(net.init, KEY, X)["params"])}
    return model, base, lora, specs


CONFIG = LoRAPlusConfig(target_modules=["up"], rank=2, alpha=3.0)


def variables_of(model):
    """Random variables of a model, made without compiling its `init`."""
    return drawn(jax.eval_shape(model.init, KEY, X))


def adapters_of(model):
    """Random adapters of a model, and the specs."""
    specs = {}

    def trace(key):
        lora, found = init_lora(model, key, X)
        specs.update(found)
        return lora

    return drawn(jax.eval_shape(trace, KEY)), specs


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)
