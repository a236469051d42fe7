"""Recipes against the libraries' own equations."""

import numpy as np
import pytest
from flax import nnx

from loraplus_jax.adapter import flatten
from loraplus_jax.interop.library_recipes import (
    NAMES,
    RECIPES,
    clean_paths,
    dense_changes,
    find_recipe,
    read_factors,
)
from loraplus_jax.optim.find_pairs import factor_pairs

from ..refusals import refusals
from .library_trees import HEADS, HIDDEN, LIBRARIES, RANK, maxtext

CONFIG = {"model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": HEADS}


def made(name):
    tree, changes = LIBRARIES[name].make(np.random.default_rng(0))
    return clean_paths(tree), changes


def assert_adds(tree, changes, **options):
    """The factors and the dense changes of a tree are these."""
    recipe = find_recipe(factor_pairs(tree))
    factors, others = read_factors(tree, recipe, **options)
    assert others == {}
    assert factors.keys() == changes.keys()
    dense = dict(dense_changes(tree, recipe, **options))
    for module, change in changes.items():
        a, b, scale = factors[module]
        np.testing.assert_allclose(scale * b @ a, change, rtol=0, atol=2e-6, err_msg=module)
        np.testing.assert_allclose(dense[module], change, rtol=0, atol=2e-6, err_msg=module)


@pytest.mark.parametrize("name", LIBRARIES)
def test_factors_and_products_are_what_the_library_computes(name):
    tree, changes = made(name)
    assert find_recipe(factor_pairs(tree)).name == name.removeprefix("old ")
    assert_adds(tree, changes, **LIBRARIES[name].options, config=CONFIG)


def test_only_llama_3_1_of_maxtext_is_interleaved():
    tree, changes = maxtext(np.random.default_rng(0), interleaved=True)
    config = CONFIG | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    assert_adds(clean_paths(tree), changes, **LIBRARIES["maxtext"].options, config=config)


class Block(nnx.Module):
    """A layer of each kind that flax has for LoRA."""

    def __init__(self, rngs):
        options = {"rngs": rngs, "b_initializer": nnx.initializers.normal(0.3)}
        self.q_proj = nnx.LoRA(8, 2, 6, base_module=nnx.Linear(8, 6, rngs=rngs), **options)
        self.up_proj = nnx.LoRALinear(8, 5, lora_rank=2, **options)


@pytest.mark.slow
def test_flax_itself():
    block = Block(nnx.Rngs(0))
    x = np.eye(8, dtype=np.float32)
    state = nnx.to_pure_dict(nnx.state(block, nnx.LoRAParam))
    tree = {
        f"layers/0/{path.replace('q_proj', 'self_attn/q_proj').replace('up', 'mlp/up')}": leaf
        for path, leaf in flatten(state).items()
    }
    recipe = find_recipe(factor_pairs(tree))
    changes = dict(dense_changes(tree, recipe))
    q = block.q_proj(x) - block.q_proj.base_module(x)
    up = block.up_proj(x) - nnx.Linear.__call__(block.up_proj, x)
    np.testing.assert_allclose(changes["model.layers.0.self_attn.q_proj"], q.T, atol=1e-5)
    np.testing.assert_allclose(changes["model.layers.0.mlp.up_proj"], up.T, atol=1e-5)


def test_every_library_is_tested():
    assert {name.removeprefix("old ") for name in LIBRARIES} == set(NAMES)
    assert all(recipe.version and recipe.leaves_out for recipe in RECIPES)


def test_a_module_that_only_a_path_map_places():
    tree, names = made("qwix")[0], [("other/w", "model.other")]
    recipe = find_recipe(factor_pairs(tree))
    more = tree | {f"other/w_lora_{s}": np.ones((4, 4), np.float32) for s in "ab"}
    factors, _ = read_factors(more, recipe, scale=1.0, path_map=names)
    assert factors["model.other"].a.shape == (4, 4)


def reading(library, changes=(), **options):
    """Reads a library's tree with some leaves changed, or left out where the change is None."""

    def read():
        tree = made(library)[0]
        recipe = find_recipe(factor_pairs(tree))
        leaves = tree | {path: change and change(tree.get(path)) for path, change in dict(changes).items()}
        read_factors({path: x for path, x in leaves.items() if x is not None}, recipe, **options)

    return read


PARTNER = "layers/0/attn/q_proj/w_lora_b"
STRAY = {f"layers/0/other/attn/z/w_lora_{side}": lambda _: np.ones((4, 4)) for side in "ab"}
NAN = {PARTNER: lambda x: np.full_like(x, np.nan)}
LINEAR = "PaliGemma/llm/layers/mlp/linear"
test_trees_that_do_not_fit_are_rejected = refusals(
    (reading("qwix"), "qwix", "--scale", "--alpha"),
    (reading("qwix", scale=1.0, alpha=1.0), "--scale", "--alpha"),
    (reading("qwix", {PARTNER: None}, scale=1.0), "layers/0/attn/q_proj/w", "lora_b"),
    (reading("qwix", STRAY, scale=1.0), "layers/0/other/attn/z/w", "--path_map"),
    (reading("qwix", scale=1.0, path_map=[("another/w", "model.other")]), "--path_map", "another/w"),
    (reading("qwix", NAN, scale=1.0), PARTNER, "finite"),
    (
        reading("maxtext", scale=1.0, config={"model_type": "gemma2"}),
        *("maxtext", "llama", "qwen3", "gemma2"),
    ),
    (reading("gemma", scale=2.0), "gemma", "--scale"),
    (
        reading("openpi", {f"{LINEAR}_lora_b": lambda x: x[:1]}, scale=1.0),
        *(LINEAR, f"(1, {RANK}, {HIDDEN})"),
    ),
    (
        lambda: find_recipe(factor_pairs({f"what/q_lora_{side}": np.ones((4, 4)) for side in "ab"})),
        *("what/q_lora_a", "--from", "qwix", "--path_map"),
    ),
    (lambda: find_recipe({}), "LoRA"),
)
