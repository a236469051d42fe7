"""LoRA-RITE and LoRA-Muon: invariant to how A B is split, and their papers' equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax.optim.lora_muon import lora_muon, scale_by_lora_muon
from loraplus_jax.optim.lora_plus import lora_plus, lora_plus_adamw
from loraplus_jax.optim.lora_rite import lora_rite, scale_by_lora_rite

from ..refusals import refusals

INPUTS, RANK, OUTPUTS, STEPS = 7, 3, 5, 8
MAKERS = {"rite": lora_rite, "muon": lora_muon}
DIRECTIONS = {"rite": scale_by_lora_rite, "muon": scale_by_lora_muon}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


X, Y = draw(20, INPUTS), draw(20, OUTPUTS, seed=1)
A, B = draw(INPUTS, RANK, seed=2), draw(RANK, OUTPUTS, seed=3)


def loss(params):
    return jnp.mean((jnp.tanh(X @ params["q"]["lora_a"] @ params["q"]["lora_b"]) - Y) ** 2)


def train(tx, a, b, steps=STEPS):
    """A B after every step."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["q"]["lora_a"] @ params["q"]["lora_b"]

    params = {"q": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}
    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[1])
    return np.asarray(run(params))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_the_split_of_the_product_does_not_matter(name):
    """With Adam it does: the same change of the factors changes its products by far more than rounding."""
    turn = draw(RANK, RANK, seed=4) @ np.diag([0.1, 1.0, 5.0])
    with jax.enable_x64(True):
        tx = MAKERS[name](0.05, weight_decay=0.1)
        one, other = train(tx, A, B), train(tx, A @ turn, np.linalg.inv(turn) @ B)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-8)
        adam = [train(optax.adam(0.05), *pair)[-1] for pair in ((A, B), (A @ turn, np.linalg.inv(turn) @ B))]
        assert np.abs(adam[0] - adam[1]).max() > 0.1


def reference_muon(a, b, rate, b1):
    """The paper's step by singular value decompositions, with the paper's bases for A (in, r) and B (out, r)."""
    moments, a, bt = [np.zeros_like(a), np.zeros_like(b.T)], a, b.T
    for _ in range(STEPS):
        grads = jax.grad(loss)({"q": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(bt.T)}})["q"]
        slopes = np.asarray(grads["lora_a"]), np.asarray(grads["lora_b"]).T
        steps = []
        for n, (slope, other) in enumerate(zip(slopes, (bt, a), strict=True)):
            moments[n] = b1 * moments[n] + (1 - b1) * slope
            _, s, v = np.linalg.svd(other, full_matrices=False)
            root = v.T @ np.diag(1 / s) @ v  # (otherᵀ other)^(-1/2)
            left, _, right = np.linalg.svd(moments[n] @ root, full_matrices=False)
            steps.append(left @ right @ root)
        a, bt = a - rate / 2 * steps[0], bt - rate / 2 * steps[1]
    return a @ bt.T


def reference_rite(a, b, rate, b1, b2, eps):
    """Algorithm 1 in QR bases, for A (in, r) and B (out, r)."""
    factors = [a, b.T]
    moment, second, escaped = [0 * f for f in factors], [np.zeros((RANK, RANK))] * 2, [0.0, 0.0]
    bases = [0 * f for f in factors[::-1]]
    for count in range(1, STEPS + 1):
        pair = {"q": {"lora_a": jnp.asarray(factors[0]), "lora_b": jnp.asarray(factors[1].T)}}
        grads = jax.grad(loss)(pair)["q"]
        slopes, new = (np.asarray(grads["lora_a"]), np.asarray(grads["lora_b"]).T), list(factors)
        for n in range(2):
            basis, upper = np.linalg.qr(factors[1 - n])
            slope, turn = slopes[n] @ np.linalg.inv(upper), basis.T @ bases[n]
            bases[n] = basis
            turned = turn @ second[n] @ turn.T
            lost = np.linalg.eigvalsh(second[n]) - np.linalg.eigvalsh(turned)
            decay = [beta * (1 - beta ** (count - 1)) / (1 - beta**count) for beta in (b1, b2)]
            escaped[n] = decay[1] * (escaped[n] + max(lost.max(), 0))
            second[n] = decay[1] * turned + (1 - decay[1]) * slope.T @ slope / len(slope)
            values, vectors = np.linalg.eigh(second[n])
            scaled = slope @ vectors @ np.diag(1 / (np.sqrt(values.clip(0) + escaped[n]) + eps)) @ vectors.T
            moment[n] = decay[0] * moment[n] @ turn.T + (1 - decay[0]) * scaled
            new[n] = factors[n] - rate * moment[n] @ np.linalg.inv(upper).T
        factors = new
    return factors[0] @ factors[1].T


@pytest.mark.slow
def test_steps_are_those_of_the_papers_in_float64():
    with jax.enable_x64(True):
        expected = reference_muon(A, B, 0.05, 0.95)
        # A correction for the zero start changes the momentum's length, which msign ignores.
        np.testing.assert_allclose(train(lora_muon(0.05), A, B)[-1], expected, rtol=0, atol=1e-9)
        expected = reference_rite(A, B, 0.05, 0.9, 0.99, 1e-6)
        np.testing.assert_allclose(train(lora_rite(0.05, b2=0.99), A, B)[-1], expected, rtol=0, atol=1e-7)


def test_a_pair_by_hand():
    """B's rows have lengths 2 and 1, and A's gradient has one entry a row: both directions are known."""
    params = {"q": {"lora_a": jnp.eye(2), "lora_b": jnp.diag(jnp.array([2.0, 1.0]))}}
    grads = {"q": {"lora_a": jnp.diag(jnp.array([4.0, 3.0])), "lora_b": jnp.zeros((2, 2))}}
    both = scale_by_lora_muon(), scale_by_lora_rite()
    # R is 1/2 and 1 on the diagonal; msign of a diagonal is its signs.
    muon, rite = (jax.jit(lambda tx=tx: tx.update(grads, tx.init(params), params)[0])() for tx in both)
    np.testing.assert_allclose(muon["q"]["lora_a"], [[0.25, 0], [0, 0.5]], atol=1e-6)
    # R g is 2 and 3; divided by their roots of mean squares over 2 inputs, sqrt(2) each; times R.
    np.testing.assert_allclose(rite["q"]["lora_a"], [[0.5 * 2**0.5, 0], [0, 2**0.5]], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_a_zero_b_and_stacked_layers_and_a_head(name):
    """While B is zero, A has no gradient and stays; each layer of a stack goes its own way; the head is Adam's."""
    tx = MAKERS[name](0.1)
    a, b = draw(2, INPUTS, RANK), np.stack([0 * B, B])
    grads = {"q": {"lora_a": np.stack([0 * A, A]), "lora_b": np.stack([B, B])}, "head": draw(4)}
    params = {"q": {"lora_a": a, "lora_b": b}, "head": np.zeros(4)}
    grads, params = (jax.tree.map(lambda x: x.astype(np.float32), tree) for tree in (grads, params))
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params))
    updates, state = jax.device_get(update(grads, params))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
    np.testing.assert_array_equal(updates["q"]["lora_a"][0], 0)
    assert np.abs(updates["q"]["lora_b"][0]).max() > 1e-3
    for layer in range(2):
        one = jax.tree.map(lambda x: x[layer], (grads["q"], params["q"]))  # noqa: B023
        alone, _ = update({"q": one[0]}, {"q": one[1]})
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x[layer], y, atol=1e-5),  # noqa: B023
            updates["q"],
            alone["q"],
        )
    np.testing.assert_allclose(updates["head"], -0.1 * np.sign(grads["head"]), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_as_the_direction_of_grouped_rates(name):
    """Rates, decay and clipping by role, around the same steps; a head keeps its own rate."""
    grouped = lora_plus_adamw(0.05, 1.0, direction=DIRECTIONS[name](), head_learning_rate=0.5)
    np.testing.assert_allclose(train(grouped, A, B, 3), train(MAKERS[name](0.05), A, B, 3), rtol=1e-5)
    params = {"q": {"lora_a": jnp.asarray(A), "lora_b": jnp.asarray(B)}, "head": {"bias": jnp.ones(2)}}
    grads = jax.tree.map(jnp.ones_like, params)
    update, _ = jax.jit(grouped.update)(grads, grouped.init(params), params)
    np.testing.assert_allclose(update["head"]["bias"], [-0.5, -0.5], rtol=1e-4)


def with_ratio(tx):
    return tx.init({"q": {"lora_a": jnp.asarray(A), "lora_b": jnp.asarray(B)}})


test_bad_settings_and_a_ratio_of_rates = refusals(
    (lambda: lora_rite(0.1, b1=1.0), "b1", "1.0"),
    (lambda: lora_rite(0.1, eps=0.0), "eps"),
    (lambda: lora_muon(0.1, b1=-1.0), "b1", "-1.0"),
    (lambda: with_ratio(lora_plus(lora_rite(0.1), 4.0)), "lr_ratio", "4", "split"),
    (lambda: with_ratio(lora_plus_adamw(0.1, 4.0, direction=scale_by_lora_muon())), "lr_ratio", "4", "split"),
    error=ValueError,
)
