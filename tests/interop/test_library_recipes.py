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

from ..messages import mentions
from .library_trees import HEAD, HEADS, HIDDEN, LIBRARIES, RANK, maxtext

CONFIG = {"model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": HEADS}


@pytest.fixture
def made(request):
    library = LIBRARIES[request.param]
    tree, changes = library.make(np.random.default_rng(0))
    return request.param, clean_paths(tree), changes, {**library.options, "config": CONFIG}


@pytest.mark.parametrize("made", LIBRARIES, indirect=True)
def test_factors_and_products_are_what_the_library_computes(made):
    name, tree, changes, options = made
    recipe = find_recipe(factor_pairs(tree))
    assert recipe.name == name.removeprefix("old ")
    factors, others = read_factors(tree, recipe, **options)
    assert others == {}
    assert factors.keys() == changes.keys()
    dense = dict(dense_changes(tree, recipe, **options))
    for module, change in changes.items():
        a, b, scale = factors[module]
        np.testing.assert_allclose(scale * b @ a, change, rtol=0, atol=2e-6, err_msg=module)
        np.testing.assert_allclose(dense[module], change, rtol=0, atol=2e-6, err_msg=module)


def test_only_llama_3_1_of_maxtext_is_interleaved():
    tree, changes = maxtext(np.random.default_rng(0), interleaved=True)
    config = CONFIG | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    tree = clean_paths(tree)
    recipe, options = find_recipe(factor_pairs(tree)), {**LIBRARIES["maxtext"].options, "config": config}
    factors, _ = read_factors(tree, recipe, **options)
    dense = dict(dense_changes(tree, recipe, **options))
    for module, change in changes.items():
        a, b, scale = factors[module]
        np.testing.assert_allclose(scale * b @ a, change, rtol=0, atol=2e-6, err_msg=module)
        np.testing.assert_allclose(dense[module], change, rtol=0, atol=2e-6, err_msg=module)


class Block(nnx.Module):
    """A layer of each kind that flax has for LoRA."""

    def __init__(self, rngs):
        options = {"rngs": rngs, "b_initializer": nnx.initializers.normal(0.3)}
        self.q_proj = nnx.LoRA(8, 2, 6, base_module=nnx.Linear(8, 6, rngs=rngs), **options)
        self.up_proj = nnx.LoRALinear(8, 5, lora_rank=2, **options)


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


def test_ranks_of_openpi_are_those_of_its_heads():
    tree, _ = LIBRARIES["openpi"].make(np.random.default_rng(0))
    tree = clean_paths(tree)
    factors, _ = read_factors(tree, find_recipe(factor_pairs(tree)), scale=1.0)
    q, o, gate = (
        factors[f"paligemma_with_expert.gemma_expert.model.layers.1.{name}_proj"]
        for name in ("self_attn.q", "self_attn.o", "mlp.gate")
    )
    assert (len(q.a), len(o.a), len(gate.a)) == (HEADS * RANK, RANK, RANK)
    assert q.b.shape == (HEADS * HEAD, HEADS * RANK)
    # One block a head.
    blocks = q.b.reshape(HEADS, HEAD, HEADS, RANK)
    assert all((blocks[n, :, m] != 0).all() == (n == m) for n in range(HEADS) for m in range(HEADS))


def changed(tree, **values):
    return {path: values.get(path.rpartition("/")[2], leaf) for path, leaf in tree.items()}


def test_trees_that_do_not_fit():
    tree = clean_paths(LIBRARIES["qwix"].make(np.random.default_rng(0))[0])
    recipe = find_recipe(factor_pairs(tree))
    with pytest.raises(ValueError, match=mentions("qwix", "--scale", "--alpha")):
        read_factors(tree, recipe)
    with pytest.raises(ValueError, match=mentions("--scale", "--alpha")):
        read_factors(tree, recipe, scale=1.0, alpha=1.0)
    partner = "layers/0/attn/q_proj/w_lora_b"
    with pytest.raises(ValueError, match=mentions("layers/0/attn/q_proj/w", "lora_b")):
        read_factors({path: x for path, x in tree.items() if path != partner}, recipe, scale=1.0)
    stray = {f"layers/0/attn/z/w_lora_{s}": np.ones((4, 4)) for s in "ab"}
    with pytest.raises(ValueError, match=mentions("layers/0/other/attn/z/w", "--path_map")):
        read_factors(
            tree | {k.replace("attn/z", "other/attn/z"): x for k, x in stray.items()}, recipe, scale=1.0
        )
    names = {"other/w": "model.other"}
    more = tree | {f"other/w_lora_{s}": np.ones((4, 4), np.float32) for s in "ab"}
    factors, _ = read_factors(more, recipe, scale=1.0, path_map=[*names.items()])
    assert factors["model.other"].a.shape == (4, 4)
    with pytest.raises(ValueError, match=mentions("--path_map", "another/w")):
        read_factors(tree, recipe, scale=1.0, path_map=[("another/w", "model.other")])
    with pytest.raises(ValueError, match=mentions(partner, "finite")):
        read_factors(tree | {partner: np.full_like(tree[partner], np.nan)}, recipe, scale=1.0)


def test_a_tree_of_no_library():
    with pytest.raises(ValueError, match=mentions("what/q_lora_a", "--from", "qwix", "--path_map")):
        find_recipe(factor_pairs({"what/q_lora_a": np.ones((4, 2)), "what/q_lora_b": np.ones((2, 4))}))
    with pytest.raises(ValueError, match=mentions("LoRA")):
        find_recipe({})


def test_another_model_or_scale():
    tree = clean_paths(LIBRARIES["maxtext"].make(np.random.default_rng(0))[0])
    with pytest.raises(ValueError, match=mentions("maxtext", "llama", "qwen3", "gemma2")):
        read_factors(tree, find_recipe(factor_pairs(tree)), scale=1.0, config={"model_type": "gemma2"})
    tree = clean_paths(LIBRARIES["gemma"].make(np.random.default_rng(0))[0])
    with pytest.raises(ValueError, match=mentions("gemma", "--scale")):
        read_factors(tree, find_recipe(factor_pairs(tree)), scale=2.0)


def test_shapes_that_do_not_fit():
    tree = clean_paths(LIBRARIES["openpi"].make(np.random.default_rng(0))[0])
    recipe = find_recipe(factor_pairs(tree))
    path = "PaliGemma/llm/layers/mlp/linear_lora_b"
    with pytest.raises(
        ValueError, match=mentions("PaliGemma/llm/layers/mlp/linear", f"(1, {RANK}, {HIDDEN})")
    ):
        read_factors(tree | {path: tree[path][:1]}, recipe, scale=1.0)
