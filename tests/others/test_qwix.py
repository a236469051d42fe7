"""qwix's adapters on models that it quantized: trained by our optimizer, read into our specs, exported to PEFT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig, lora_plus_adamw, merge, save_peft
from loraplus_jax.interop.peft_files import load_peft
from loraplus_jax.nnx import apply_lora_plus, specs_of
from loraplus_jax.tree import leaf_path, leaves_by_path

from ..messages import mentions

qwix = pytest.importorskip("qwix")
qarray = pytest.importorskip("qwix._src.core.qarray")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

X = jax.random.normal(jax.random.key(1), (6, 16))
SCALE, RATIO = 2.0, 8.0
NAMES = [("{layer}", "model.{layer}")]
AXES = {"down/kernel": "ioo"}
TYPES = {"nf4": {"weight_qtype": "nf4", "tile_size": 8}, "int8": {"weight_qtype": "int8"}}


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 4), name="down")(jnp.tanh(nn.Dense(16, name="up")(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 16, rngs=rngs), nnx.LinearGeneral(16, (2, 4), rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def linen(provider):
    model = qwix.apply_lora_to_model(LinenModel(), provider)
    params = model.init(jax.random.key(0), X)["params"]
    return params, lambda params: model.apply({"params": params}, X)


def in_nnx(provider):
    model = qwix.apply_lora_to_model(NnxModel(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params: nnx.merge(graph, params, rest)(X)


def split(params):
    """The factors by path, and a function that puts them back."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    factors = {leaf_path(path): leaf for path, leaf in leaves if "_lora_" in leaf_path(path)}

    def join(factors):
        return structure.unflatten([factors.get(leaf_path(path), leaf) for path, leaf in leaves])

    return factors, join


@pytest.mark.parametrize("make", [linen, in_nnx])
@pytest.mark.parametrize("kind", TYPES)
def test_train_resume_and_export(make, kind, tmp_path):
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=2 * SCALE, **TYPES[kind])
    params, run = make(provider)
    factors, join = split(params)
    random = np.random.default_rng(0)
    first = {name: jnp.asarray(random.normal(size=x.shape) / 4, x.dtype) for name, x in factors.items()}
    tx = lora_plus_adamw(1e-3, lr_ratio=RATIO)

    @jax.jit
    def step(factors, state):
        loss, grads = jax.value_and_grad(lambda f: jnp.mean((run(join(f)) - 1) ** 2))(factors)
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state, loss

    state, losses, kept = (first, tx.init(first)), [], None
    for n in range(6):
        *state, loss = step(*state)
        losses.append(float(loss))
        if n == 0:
            moved = {name: float(jnp.sqrt(jnp.mean((x - first[name]) ** 2))) for name, x in state[0].items()}
        if n == 2:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "state", tuple(state))
    assert losses[-1] < losses[0]
    a = [name for name in moved if "lora_a" in name]
    assert [moved[name.replace("lora_a", "lora_b")] / moved[name] for name in a] == pytest.approx(
        [RATIO] * 2, rel=0.01
    )
    with ocp.StandardCheckpointer() as checkpointer:
        kept = checkpointer.restore(tmp_path / "state", tuple(state))
    for _ in range(3):
        *kept, _ = step(*kept)
    jax.tree.map(np.testing.assert_array_equal, kept, state)

    trained = join(state[0])
    lora, specs, config = specs_of(trained, scale=SCALE, axes=AXES)
    assert {path: (spec.axes, spec.shape) for path, spec in specs.items()} == {
        "down": ("ioo", (16, 2, 4)),
        "up": ("io", (16, 16)),
    }
    save_peft(tmp_path / "peft", lora, specs, config, NAMES)
    loaded = load_peft(tmp_path / "peft", specs, NAMES).lora
    # The plain model with dequantized weights and the loaded adapter merged into them.
    leaves = {path.removesuffix("/value"): leaf for path, leaf in leaves_by_path(trained).items()}
    plain = {
        name: {
            "bias": leaves[f"{name}/bias"],
            "kernel": qarray.dequantize(
                qarray.QArray(
                    *(leaves[f"{name}/kernel/array/{part}"] for part in ("qvalue", "scale")), qtype=kind
                )
            ),
        }
        for name in ("up", "down")
    }
    merged = merge({"params": plain}, loaded, specs)
    np.testing.assert_allclose(LinenModel().apply(merged, X), run(trained), rtol=0, atol=2e-5)


def test_a_model_that_qwix_quantized_is_named():
    provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*", **TYPES["int8"])])
    model = qwix.quantize_model(NnxModel(nnx.Rngs(0)), provider, X)
    config = LoRAPlusConfig(target_modules=["up"], rank=2)
    with pytest.raises(ValueError, match=mentions("Linear", "kernel", "qwix", "quantize_base")):
        apply_lora_plus(model, config, rngs=nnx.Rngs(1))
