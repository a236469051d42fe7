"""Transforms that see A with B, against their equations in float64, and optimizers that keep float32 copies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax import lora_plus_adamw
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.optim.keep_float32 import keep_float32
from loraplus_jax.optim.lora_muon import scale_by_lora_muon
from loraplus_jax.optim.lora_rite import scale_by_lora_rite
from loraplus_jax.optim.riemannian import scale_by_riemannian

from ..messages import mentions
from ..refusals import refusals


def draw(shapes, seed=0):
    random = np.random.default_rng(seed)
    made = lambda shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(made, shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_a_pair_by_hand():
    """B Bᵀ is 4 and 1 on the diagonal, Aᵀ A is 1 and 9; with reg 1 the gradients shrink by 5, 2 and by 2, 10."""
    params = {
        "lora": {"q": {"lora_a": jnp.diag(jnp.array([1.0, 3.0])), "lora_b": jnp.diag(jnp.array([2.0, 1.0]))}}
    }
    grads = jax.tree.map(jnp.ones_like, params)
    params["head"], grads["head"] = jnp.ones(3), jnp.arange(3.0)
    found, _ = jax.jit(scale_by_riemannian(1.0).update)(grads, optax.EmptyState(), params)
    np.testing.assert_array_equal(found["head"], [0, 1, 2])  # it is no factor
    np.testing.assert_allclose(found["lora"]["q"]["lora_a"], [[0.2, 0.5], [0.2, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(found["lora"]["q"]["lora_b"], [[0.5, 0.5], [0.1, 0.1]], rtol=1e-6)


FIELDS = {
    "leaf": "params/q/kernel",
    "kind": "dense_general",
    "axes": "iio",
    "shape": (3, 2, 3, 5),
    "stacked": (0,),
}
SPECS = {"q": AdapterSpec(rank=3, scale=1.0, **FIELDS)}
LAYOUTS = {
    "stacked": ({"q": {"lora_a": (4, 6, 3), "lora_b": (4, 3, 5)}}, None, "lir,lro"),
    "several axes, stacked": ({"q": {"lora_a": (3, 2, 3, 3), "lora_b": (3, 3, 5)}}, SPECS, "lijr,lro"),
    "qwix": ({"q": {"kernel_lora_a": (6, 3), "kernel_lora_b": (3, 2, 5)}}, None, "ir,rop"),
    "PEFT": ({"q": {"lora_A": {"weight": (3, 6)}, "lora_B": {"weight": (5, 3)}}}, None, "ri,or"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_equation_in_float64(name):
    shapes, specs, letters = LAYOUTS[name]
    params, grads = draw(shapes), draw(shapes, 1)
    tx = optax.chain(scale_by_riemannian(0.1, specs=specs), optax.scale(1.0))
    found, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    (a, b), (ga, gb), new = (
        [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (params, grads, found)
    )
    la, lb = letters.split(",")
    batch = "".join(c for c in la if c in lb and c != "r")

    def gram(x, side):
        return np.einsum(f"{side},{side.replace('r', 'R')}->{batch}rR", x, x) + 0.1 * np.eye(3)

    for grad, side, other, other_side, result in ((ga, la, b, lb, new[0]), (gb, lb, a, la, new[1])):
        inverse = np.linalg.inv(gram(other, other_side))
        expected = np.einsum(f"{side},{batch}rR->{side.replace('r', 'R')}", grad, inverse)
        np.testing.assert_allclose(result, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("tx", [scale_by_riemannian(), scale_by_lora_rite(), scale_by_lora_muon()])
def test_updates_keep_the_dtype_of_the_gradients(tx):
    params = {"q": {"lora_a": jnp.ones((4, 2), jnp.bfloat16), "lora_b": jnp.ones((2, 5), jnp.bfloat16)}}
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


REST = optax.multi_transform({"x": scale_by_riemannian(), "y": optax.sgd(1.0)}, "y")

test_what_it_does_not_transform = refusals(
    (lambda: scale_by_riemannian(0.0), "reg", "0.0"),
    (lambda: REST.init(draw(LAYOUTS["PEFT"][0])), "pair", "no leaves"),
    error=ValueError,
)


def train(tx, params, steps=200):
    """Moves one parameter from 1 towards 1.02, which is less than three steps of bfloat16 away."""
    state = tx.init(params)
    for _ in range(steps):
        grads = jax.tree.map(lambda p: (p.astype(jnp.float32) - 1.02).astype(p.dtype), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_a_bfloat16_run_that_stalls_goes_on_with_float32_copies():
    start = {"w": jnp.ones((), jnp.bfloat16)}
    stalled, _ = train(optax.sgd(0.05), start)
    assert float(stalled["w"]) == 1.0  # 0.05 x 0.02 is below half of 1/128
    found, state = train(keep_float32(optax.sgd(0.05)), start)
    assert found["w"].dtype == jnp.bfloat16
    assert float(state.masters["w"]) == pytest.approx(1.02, abs=4e-3)
    np.testing.assert_array_equal(found["w"], state.masters["w"].astype(jnp.bfloat16))


@pytest.mark.slow
def test_float32_copies_change_nothing_in_float32_and_moments_are_float32():
    params = jax.tree.map(jnp.asarray, draw({"lora": {"q": {"lora_a": (4, 2), "lora_b": (2, 5)}}}))
    results = []
    for tx in (lora_plus_adamw(1e-2, 4.0), keep_float32(lora_plus_adamw(1e-2, 4.0))):
        p, state, update = params, jax.jit(tx.init)(params), jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(jax.tree.map(np.sin, p), state, p)
            p = optax.apply_updates(p, updates)
        results.append(p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *results)
    masters = keep_float32(optax.sgd(1.0)).init(params).masters
    pairs = zip(jax.tree.leaves(masters), jax.tree.leaves(params), strict=True)
    assert not any(a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in pairs)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    moments = [x for x in jax.tree.leaves(keep_float32(lora_plus_adamw(1e-2, 4.0)).init(half)) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match=mentions("params")):
        keep_float32(optax.sgd(1.0)).update(half, keep_float32(optax.sgd(1.0)).init(half))


def test_the_wrapped_optimizer_of_float32_copies_sees_float32():
    """Squares of bfloat16 gradients would already be rounded."""
    seen = []
    tx = keep_float32(optax.stateless(lambda updates, params: seen.extend((updates, params)) or updates))
    half = {"w": jnp.ones(2, jnp.bfloat16)}
    tx.update(half, tx.init(half), half)
    assert [tree["w"].dtype for tree in seen] == [jnp.float32, jnp.float32]
