"""Adapters that other libraries made themselves, converted for PEFT: PEFT computes what the library does."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from loraplus_jax.adapter import flatten, unflatten
from loraplus_jax.cli.commands import main
from loraplus_jax.interop.library_recipes import RECIPES, dense_changes, read_factors

from .test_gemma_peft import (
    HEADS,
    IDS,
    SIZE,
    WINDOW,
    check_peft,
    gemma_params,
    torch_model,
    tunix_gemma,
    tunix_inputs,
)
from .tiny_gemma import config_of
from .trees import drawn

pytestmark = pytest.mark.filterwarnings("ignore")


def convert(source, base, *words):
    out = base.with_name("converted")
    assert main(["convert", *map(str, (source, "--to", "peft", "--base", base, "--out", out, *words))]) == 0
    return out


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


@pytest.mark.parametrize(("version", "kv_heads"), [(2, 2), (3, 2), (3, 4)])
def test_qwix_in_tunix(version, kv_heads, tmp_path):
    qwix = pytest.importorskip("qwix")
    model, theirs = tunix_gemma(version, kv_heads, tmp_path / "base")
    plain = model(*tunix_inputs())[0]
    provider = qwix.LoraProvider(module_path=".*(_einsum|_proj)", rank=2, alpha=3.0)
    model = qwix.apply_lora_to_model(model, provider, *tunix_inputs(), rngs=nnx.Rngs(1))
    factors = drawn(nnx.state(model, nnx.LoRAParam))
    nnx.update(model, factors)
    source = save_orbax(tmp_path / "checkpoint/7/model_params", factors)
    out = convert(source, tmp_path / "base", "--alpha", "3")
    check_peft(theirs, plain, model(*tunix_inputs())[0], out)


@pytest.mark.parametrize(("kv_heads", "transposed"), [(2, True), (4, False)])
def test_gemma(kv_heads, transposed, tmp_path):
    gm = pytest.importorskip("gemma.gm")
    sizes = {"num_embed": 64, "num_heads": HEADS, "head_dim": SIZE, "num_kv_heads": kv_heads}
    rope = {"local_base_frequency": 10_000, "global_base_frequency": 1_000_000}
    config = config_of(gm, **sizes, **rope, sliding_window_size=WINDOW, transpose_gating_einsum=transposed)
    net = gm.nn.Transformer(config=config, dtype=jnp.float32)
    model = gm.nn.LoRA(rank=2, model=net, dtype=jnp.float32)
    theirs = torch_model(3, kv_heads, ("sliding", "full"))
    theirs.save_pretrained(tmp_path / "base")
    base = gemma_params(theirs, kv_heads, transposed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(IDS))["params"]
    params = unflatten(flatten(drawn(shapes)) | flatten(base))
    plain = net.apply({"params": base}, jnp.asarray(IDS)).logits
    adapted = model.apply({"params": params}, jnp.asarray(IDS)).logits
    # The whole checkpoint: its other tensors are the base's.
    source = save_orbax(tmp_path / "checkpoint", {"params": params})
    check_peft(theirs, plain, adapted, convert(source, tmp_path / "base"))


KERAS = {
    "self_attention/query": ("self_attn.q_proj", "bqm,muh->bquh", (12,), (None, 2, 4)),
    "self_attention/attention_output": ("self_attn.o_proj", "bquh,uhm->bqm", (2, 4), (None, 12)),
    "feedforward_gate_dense": ("mlp.gate_proj", None, (12,), 20),
}


@pytest.mark.parametrize("name", KERAS)
def test_keras_layers(name):
    keras = pytest.importorskip("keras")
    theirs, equation, inputs, outputs = KERAS[name]
    size = int(np.prod(inputs))
    x = np.eye(size, dtype=np.float32).reshape(1, size, *inputs)
    layer = keras.layers.EinsumDense(equation, outputs) if equation else keras.layers.Dense(outputs)
    before = np.asarray(layer(x))
    layer.enable_lora(3, lora_alpha=5)
    for n, variable in enumerate(layer.trainable_variables):
        if "lora" in variable.name:
            variable.assign(np.random.default_rng(n).normal(size=variable.shape))
    change = (np.asarray(layer(x)) - before).reshape(size, -1).T
    owner = f"transformer_layer_0/{name}"
    tree = {f"{owner}/lora_kernel_{s}": np.asarray(getattr(layer, f"lora_kernel_{s}")) for s in "ab"}
    recipe = next(recipe for recipe in RECIPES if recipe.name == "keras")
    module = f"model.layers.0.{theirs}"
    a, b, scale = read_factors(tree, recipe, alpha=5.0)[0][module]
    np.testing.assert_allclose(scale * b @ a, change, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        dict(dense_changes(tree, recipe, alpha=5.0))[module], change, rtol=0, atol=1e-4
    )
