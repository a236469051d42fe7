"""keras's own LoRA under our optimizer: the recipe of docs/other_libraries.md, run as it stands there."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from loraplus_jax import lora_plus_adamw, merge, save_peft
from loraplus_jax.adapter import unflatten
from loraplus_jax.interop import load_peft
from loraplus_jax.interop.library_recipes import RECIPES, dense_changes, read_factors
from loraplus_jax.nnx import specs_of

from .harness import Loop, assert_equal, assert_trains_and_resumes, drawn

keras = pytest.importorskip("keras")  # conftest.py chose its backend

RECIPE = re.findall(
    r"```py\n(.*?)```",
    (Path(__file__).parents[2] / "docs/other_libraries.md")
    .read_text(encoding="utf-8")
    .partition("## keras\n")[2],
    flags=re.S,
)
IDS = np.arange(24).reshape(4, 6) % 11
TARGETS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def net():
    """Layers whose names are out of order, and a dropout with a seed among its variables."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Embedding(11, 8, name="words"),
        keras.layers.Dropout(0.1),
        keras.layers.EinsumDense("abc,cd->abd", (None, 7), activation="tanh", name="hidden"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(6, name="out"),
        keras.layers.Dense(3, name="head"),
    ]
    return keras.Sequential([keras.Input((6,)), *layers], name="net")


@pytest.fixture
def recipe():
    """The names of the recipe's first block, with factors that are not zero."""
    assert keras.backend.backend() == "jax"
    model = net()
    names = {"model": model, "layers": [model.get_layer(name) for name in ("words", "hidden", "out")]}
    names |= {"jax": jax, "jnp": jnp, "optax": optax, "lora_plus_adamw": lora_plus_adamw}
    exec(RECIPE[0], names)
    names["lora"] = drawn(names["lora"])
    return names


def test_the_recipe_trains_with_the_ratio_and_resumes(recipe, tmp_path):
    state = [recipe[name] for name in ("lora", "frozen", "opt_state")]
    assert len(state[0]) == 6
    make = functools.partial(Loop, lambda *state: recipe["step"](*state, IDS, TARGETS), *state)
    assert_trains_and_resumes(make, tmp_path, modules=2, steps=100, below=0.8, mean_of=20)


def test_a_peft_directory_comes_out_and_equals_the_merged_model(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = recipe["model"]
    exec(RECIPE[1], recipe | {"specs_of": specs_of, "save_peft": save_peft}, results := {})
    tree, specs = results["tree"], results["specs"]
    assert {path: (spec.kind, spec.shape, spec.scale) for path, spec in specs.items()} == {
        "net/words": ("embed", (11, 8), 2.0),
        "net/hidden": ("dense", (8, 7), 2.0),
        "net/out": ("dense", (7, 6), 2.0),
    }
    loaded = load_peft("adapter", specs, [("net/{name}", "{name}")]).lora
    assert_equal(loaded, tree)
    params = unflatten({v.path: v.value for v in model.variables if v.path.startswith("net/")})
    ours = merge({"params": params}, tree, specs)["params"]["net"]
    plain, tensors = net(), load_file("adapter/adapter_model.safetensors")
    for name, leaf in (("words", "embeddings"), ("hidden", "kernel"), ("out", "kernel")):
        form = "lora_embedding_{}" if name == "words" else "lora_{}.weight"
        a, b = (tensors[f"base_model.model.{name}.{form.format(side)}"] for side in "AB")
        variable = getattr(plain.get_layer(name), leaf)
        variable.assign(variable + 2.0 * (b @ a).T)
        np.testing.assert_allclose(ours[name][leaf], variable.value, rtol=0, atol=1e-6)
    adapted = np.asarray(model(IDS))
    assert np.abs(adapted - np.asarray(net()(IDS))).max() > 0.01
    np.testing.assert_allclose(plain(IDS), adapted, rtol=0, atol=1e-5)


LAYERS = {
    "self_attention/query": ("self_attn.q_proj", "bqm,muh->bquh", (12,), (None, 2, 4)),
    "self_attention/attention_output": ("self_attn.o_proj", "bquh,uhm->bqm", (2, 4), (None, 12)),
    "feedforward_gate_dense": ("mlp.gate_proj", None, (12,), 20),
}


@pytest.mark.parametrize("name", LAYERS)
def test_convert_reads_what_a_layer_computes(name):
    theirs, equation, inputs, outputs = LAYERS[name]
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
