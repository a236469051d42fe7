"""keras's own LoRA under our optimizer: the recipe of docs/other_libraries.md, run as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from loraplus_jax import lora_plus_adamw, merge, save_peft
from loraplus_jax.adapter import unflatten
from loraplus_jax.interop import load_peft
from loraplus_jax.nnx import specs_of

from .trees import assert_equal, drawn, ratios

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


def run(names, state, steps):
    losses = []
    for _ in range(steps):
        *state, loss = names["step"](*state, IDS, TARGETS)
        losses.append(float(loss))
    return state, losses


def test_the_recipe_trains_with_the_ratio_and_resumes(recipe, tmp_path):
    state = [recipe[name] for name in ("lora", "frozen", "opt_state")]
    assert len(state[0]) == 6
    after, _ = run(recipe, state, 1)
    assert ratios(nested(state[0]), nested(after[0])) == pytest.approx([8.0, 8.0], rel=0.01)
    middle, losses = run(recipe, state, 20)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", middle)
    end, more = run(recipe, middle, 80)
    assert np.mean(more[-20:]) < 0.8 * np.mean(losses)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", middle)
    resumed, again = run(recipe, restored, 80)
    assert again == more
    assert_equal(resumed, end)


def nested(lora):
    """Our names in place of keras's, for `ratios`."""
    return {path.replace("lora_kernel_", "lora_"): value for path, value in lora.items()}


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
