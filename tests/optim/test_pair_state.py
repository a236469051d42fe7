"""What optimizers of pairs share: which axes of a factor are its rows, roots of Gram matrices, bad trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.optim.adalora import adalora
from loraplus_jax.optim.lora_muon import lora_muon
from loraplus_jax.optim.lora_rite import lora_rite
from loraplus_jax.optim.pair_state import inverse_root, pair_factors
from loraplus_jax.optim.riemannian import scale_by_riemannian

from ..messages import mentions

ADALORA = {"steps": 9, "target_rank": 1, "initial_steps": 1, "final_steps": 1}
MAKERS = {
    "riemannian": scale_by_riemannian,
    "rite": lambda **k: lora_rite(0.1, **k),
    "muon": lambda **k: lora_muon(0.1, **k),
    "adalora": lambda **k: adalora(optax.sgd(0.1), optax.sgd(0.1), **ADALORA, **k),
}
PAIR = {"q": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 5))}}
STACK = {"q": {"lora_a": jnp.ones((3, 4, 3)), "lora_b": jnp.ones((3, 3, 5))}}
SPEC = AdapterSpec(
    leaf="params/q/w", kind="dense", axes="io", shape=(3, 4, 5), rank=3, scale=1.0, stacked=(0,)
)


@pytest.mark.parametrize("name", MAKERS)
def test_trees_without_clear_pairs_are_rejected(name):
    tx = MAKERS[name]()
    for tree, words in (
        ({"head": jnp.ones((3, 4))}, ["pair", "head", "multi_transform"]),
        ({}, ["pair", "no leaves"]),
        (STACK, ["batch", "specs"]),
    ):
        with pytest.raises(ValueError, match=mentions(*words)):
            jax.eval_shape(tx.init, tree)
    jax.eval_shape(MAKERS[name](specs={"q": SPEC}).init, STACK)
    with pytest.raises(ValueError, match=mentions("q", "specs")):
        jax.eval_shape(MAKERS[name](specs={"w": SPEC}).init, PAIR)
    with pytest.raises(ValueError, match=mentions("params")):
        tx.update(PAIR, jax.jit(tx.init)(PAIR))


@pytest.mark.parametrize(
    ("a", "b", "rows"),
    [
        ((6, 2), (2, 5), ((2, 6), (2, 5))),
        ((4, 6, 2), (4, 2, 5), ((4, 2, 6), (4, 2, 5))),
        ((6, 3, 2), (2, 5, 4), ((2, 18), (2, 20))),
        ((2, 6), (5, 2), ((2, 6), (2, 5))),  # PyTorch's
        ((3, 3, 6, 8), (8, 3), ((8, 54), (8, 3))),  # a convolution's
    ],
)
def test_rows_are_rank_components(a, b, rows):
    leaves = {"q/lora_A": np.arange(np.prod(a)).reshape(a), "q/lora_B": np.arange(np.prod(b)).reshape(b)}
    (pair,) = pair_factors(leaves)
    for factor, shape in zip(pair, rows, strict=True):
        found = factor.rows(leaves[factor.path])
        assert found.shape == shape
        np.testing.assert_array_equal(factor.restore(found), leaves[factor.path])


def test_of_a_square_weight_the_rank_is_the_smaller_axis():
    a, b = np.arange(12).reshape(6, 2), np.arange(12, 24).reshape(2, 6)
    for leaves in ({"lora_A": a, "lora_B": b}, {"lora_A": a.T, "lora_B": b.T}):
        (pair,) = pair_factors(leaves)
        for factor, rows in zip(pair, (a.T, b), strict=True):
            np.testing.assert_array_equal(factor.rows(leaves[factor.path]), rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 7])
def test_what_float32_rounds_is_no_direction(rows):
    x = jnp.asarray(np.random.default_rng(rows).normal(size=(8, rows)), jnp.float32)
    gram = x @ x.T
    root = jax.jit(inverse_root)(gram)
    # The projection on the directions that the rows span.
    assert float(jnp.trace(root @ gram @ root)) == pytest.approx(rows, abs=1e-3)
    assert float(jnp.abs(root).max()) < 2 / float(jnp.linalg.svd(x)[1].min())


@pytest.mark.slow
def test_inverse_roots():
    matrix = np.random.default_rng(5).normal(size=(4, 4))
    matrix = jnp.asarray(matrix @ matrix.T, jnp.float32)
    root = jax.jit(inverse_root)(matrix)
    np.testing.assert_allclose(root @ matrix @ root, np.eye(4), atol=1e-3)
    np.testing.assert_array_equal(inverse_root(jnp.zeros((2, 3, 3))), 0)
