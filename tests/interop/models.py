"""What the tests of PEFT's files share: specs with random factors, and a user's own model."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.adapter.spec import AdapterSpec


def spec_of(kind, axes, shape, rank=2, leaf="params/m/kernel", scale=1.5, **more):
    return AdapterSpec(leaf=leaf, kind=kind, axes=axes, shape=shape, rank=rank, scale=scale, **more)


def factors(spec, seed=0):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in spec.factor_shapes)
    return {"m": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.Dense(8, name="fc")(nn.LayerNorm(name="norm")(x))
        return x, None


class Net(nn.Module):
    """A user's own model: stacked blocks between an embedding and two heads."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(10, 8, name="embed")(ids)
        layers = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=3
        )
        x, _ = layers(name="blocks")(x, None)
        return nn.Dense(4, name="head")(x), nn.Dense(2, name="other_head")(x)


PATHS = (
    ("embed", "emb"),
    ("blocks/{part}", "layers.{layer}.{part}"),
    ("head", "out.0"),
    ("other_head", "out.1"),
)


IDS = jnp.zeros((1, 3), jnp.int32)


def net(**fields):
    """Config, factors, specs and weights of the model; the same arrays for the same fields."""
    return _net(json.dumps({"target_modules": ["embed", "fc", "head"], "rank": 2} | fields))


@functools.cache
def _net(fields):
    config = LoRAPlusConfig(**json.loads(fields))
    model = apply_lora_plus(Net(), config)
    lora, specs = init_lora(model, jax.random.key(0), IDS)
    shapes = jax.eval_shape(Net().init, jax.random.key(1), IDS)["params"]
    params = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape), x.dtype), shapes
    )
    return config, jax.tree.map(lambda x: x + 1, lora), specs, params


def accept_changes(directory):
    """Removes the digest, as the message about a changed file says."""
    path = directory / "loraplus.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "digest"}))
    return directory
