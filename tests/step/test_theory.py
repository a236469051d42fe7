"""The terms of a step's change, against float64 matrices and the model itself; what is read from them."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax import LoRAPlusConfig, LoRAPlusDense, apply_lora_plus, init_lora, lora_plus_adamw
from loraplus_jax.adapter.lora import low_rank_output, scale_variables
from loraplus_jax.adapter.taps import TERMS, update_squares
from loraplus_jax.step.theory import BALANCED_RATIO, Balance, balance, make_theory, terms_by_layer

from ..marks import slow
from ..refusals import refusals

KEY = jax.random.key(0)


def total(model):
    """A loss whose value means nothing: it reaches the layers."""
    return lambda variables, x, rng: ((jnp.sum(model.apply(variables, x)), 1.0), {})


def drawn(tree, seed, size=1.0):
    """Other values for every leaf."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda leaf: size * np.asarray(jax.random.normal(next(keys), leaf.shape)), tree)


def inputs(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def adapted(net, x, seed=1, **fields):
    """A model with adapters, its base, the factors before and after a step, and the specs."""
    model = net
    if fields:
        model = apply_lora_plus(net, LoRAPlusConfig(**fields))
    params = drawn(jax.eval_shape(model.init, KEY, x)["params"], seed)
    lora, specs = init_lora(model, KEY, x)
    before = drawn(lora, seed + 1)
    after = jax.tree.map(np.add, before, drawn(lora, seed + 2, 1e-2))
    return model, {"params": params}, before, after, specs


def measured(model, base, before, after, specs, x):
    """Compiled, as it is used."""
    return jax.jit(make_theory(total(model), specs))({"lora": after}, before, base, x)


def root(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def explicit(x, before, after, scale):
    """The definitions, written out with matrices in float64."""
    given = (x, before["lora_a"], before["lora_b"], after["lora_a"], after["lora_b"])
    x, a0, b0, a, b = (np.asarray(v, np.float64) for v in given)
    return {
        "delta1": root(scale * x @ (a - a0) @ b0),
        "delta2": root(scale * x @ a0 @ (b - b0)),
        "delta3": root(scale * x @ (a - a0) @ (b - b0)),
        "z_a": root(x @ a),
        "z_b": root(scale * x @ a @ b),
    }


def close(found, expected, rtol=2e-4):
    assert list(found) == list(TERMS) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, err_msg=name)


class Net(nn.Module):
    """Two adapted layers, the second behind a nonlinearity."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="second")(nn.tanh(nn.Dense(6, name="first")(x)))


@pytest.mark.slow
def test_a_step_of_one_by_one_matrices_by_hand():
    """x = (1, -2) down the rows; A: 2 -> 5, B: 3 -> -1, s = 1/2."""
    x = jnp.array([[1.0], [-2.0]])
    model = apply_lora_plus(nn.Dense(1), LoRAPlusConfig(target_modules=".*", rank=1, alpha=0.5))
    _, specs = init_lora(model, KEY, x)
    one = jnp.ones((1, 1))
    base = {"params": {"kernel": one, "bias": jnp.zeros(1)}}
    before, after = {"lora_a": 2 * one, "lora_b": 3 * one}, {"lora_a": 5 * one, "lora_b": -one}
    size = 2.5**0.5  # the root mean square of x
    expected = {n: factor * size for n, factor in zip(TERMS, (4.5, 4, 6, 5, 2.5), strict=True)}
    close(measured(model, base, before, after, specs, x)[""], expected, rtol=1e-6)


@pytest.mark.slow
def test_every_layer_gets_its_own_inputs():
    """Those of the model after the step, with the new factors of the layers below."""
    x = inputs(7, 4)
    model, base, before, after, specs = adapted(Net(), x, target_modules=".*", rank=2, alpha=3.0)
    found = measured(model, base, before, after, specs, x)
    first, params = after["first"], base["params"]["first"]
    hidden = np.tanh(x @ params["kernel"] + params["bias"] + 1.5 * x @ first["lora_a"] @ first["lora_b"])
    close(found["first"], explicit(x, before["first"], first, 1.5))
    close(found["second"], explicit(hidden, before["second"], after["second"], 1.5))


LAYERS = {  # the layer, the shape of its inputs, and x A where it is written out
    "general": (nn.DenseGeneral((4, 5), axis=(-2, -1)), (2, 4, 6), lambda x, a: np.einsum("bij,ijr", x, a)),
    "einsum, batch": (nn.Einsum((3, 6, 5), "ebi,eio->ebo", use_bias=False), (3, 4, 6), None),
    "conv": (nn.Conv(6, (3,), padding="VALID"), (2, 7, 4), lambda x, a: np.einsum("bnwi,wir", windows(x), a)),
}


def windows(x):
    return np.stack([x[:, n : n + 3] for n in range(5)], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_the_terms_are_what_the_model_itself_makes_of_other_factors(name):
    """The low-rank term is bilinear: each delta is a difference of outputs, taken from the model from outside."""
    net, shape, features = LAYERS[name]
    x = inputs(*shape)
    model, base, before, after, specs = adapted(net, x, target_modules=".*", rank=2)
    after = jax.tree.map(lambda old, new: old + 50 * (new - old), before, after)  # for large differences

    def output(a, b):
        with_term = model.apply({**base, "lora": {"lora_a": a["lora_a"], "lora_b": b["lora_b"]}}, x)
        return np.asarray(with_term, np.float64) - np.asarray(net.apply(base, x), np.float64)

    old, new = before, after
    found = measured(model, base, before, after, specs, x)[""]
    expected = {
        "delta1": root(output(new, old) - output(old, old)),
        "delta2": root(output(old, new) - output(old, old)),
        "delta3": root(output(new, new) - output(new, old) - output(old, new) + output(old, old)),
        "z_a": root(features(x, after["lora_a"])) if features else found["z_a"],
        "z_b": root(output(new, new)),
    }
    close(found, expected, 1e-3)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4, name="fc")(x)), None


class Looped(nn.Module):
    """Three layers in a scan, each with weights of its own on the last axis, or all with the same."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        how = {"variable_broadcast": "params"} if self.shared else {"variable_axes": {"params": -1}}
        block = nn.scan(nn.remat(Block), split_rngs={"params": not self.shared}, length=3, **how)
        return block(name="layers")(x, None)[0]


@pytest.mark.slow
def test_a_layer_that_is_used_again_gives_the_mean_over_its_uses():
    """Weights shared by the turns of a loop, where nothing could be written into the model's variables."""
    x = inputs(5, 4)
    looped = Looped(shared=True)
    model, base, before, after, specs = adapted(looped, x, target_modules=["fc"], rank=2, alpha=2.0)
    found = measured(model, base, before, after, specs, x)["layers/fc"]
    params, old, new = (t["layers"]["fc"] for t in (base["params"], before, after))
    turns = []
    for _ in range(3):
        turns.append(explicit(x, old, new, 1.0))
        x = np.tanh(x @ params["kernel"] + params["bias"] + x @ new["lora_a"] @ new["lora_b"])
    close(found, {name: np.sqrt(np.mean([turn[name] ** 2 for turn in turns])) for name in TERMS})


@pytest.mark.slow
def test_our_own_layers_and_other_scales_are_measured_too():
    x = inputs(7, 4)
    model, base, before, after, specs = adapted(LoRAPlusDense(5, rank=2, alpha=4.0), x)
    close(measured(model, base, before, after, specs, x)[""], explicit(x, before, after, 2.0))
    model, base, before, after, specs = adapted(nn.Dense(5), x, target_modules=".*", rank=2)
    frozen = {**base, "lora_scale": scale_variables(specs, 0.25)}
    found = measured(model, frozen, before, after, specs, x)[""]
    close(found, explicit(x, before, after, 0.25))


@pytest.mark.slow
def test_layers_left_out_of_a_stack_are_left_out_of_the_metrics():
    x = inputs(5, 4)
    fields = {"target_modules": ["fc"], "rank": 2, "alpha": 3.0, "layers_to_transform": (0, 2)}
    model = apply_lora_plus(Looped(), LoRAPlusConfig(**fields))
    base = drawn({"params": jax.eval_shape(model.init, KEY, x)["params"]}, 3)
    lora, specs = init_lora(model, KEY, x)
    chosen = np.array([1, 0, 1], np.float32)
    before, after = (jax.tree.map(lambda leaf: chosen * leaf, drawn(lora, seed)) for seed in (4, 5))
    found = terms_by_layer(measured(model, base, before, after, specs, x), specs)
    assert list(found) == ["layers/fc/0", "layers/fc/2"]
    for n in range(3):
        trees = (base["params"], before, after)
        params, old, new = (jax.tree.map(lambda leaf: leaf[..., n], tree["layers"]["fc"]) for tree in trees)  # noqa: B023
        if n != 1:
            close(found[f"layers/fc/{n}"], explicit(x, old, new, 1.5))
        x = np.tanh(x @ params["kernel"] + params["bias"] + 1.5 * x @ new["lora_a"] @ new["lora_b"])


@pytest.mark.slow
def test_a_measurement_leaves_what_the_model_computes_bitwise_unchanged():
    """The value and the gradients are bitwise those without it."""
    x = inputs(7, 4)
    model, base, before, after, _ = adapted(Net(), x, target_modules=".*", rank=2)
    taps = {p: {"lora_tap": jnp.zeros((1, 6))} for p in ("first", "second")}
    olds = {p: {f"{k}_before": v for k, v in before[p].items()} for p in before}
    more = {p: after[p] | taps[p] | olds[p] for p in after}

    def loss(kernel, lora):
        params = base["params"] | {"first": base["params"]["first"] | {"kernel": kernel}}
        return jnp.sum(model.apply({"params": params, "lora": lora}, x) ** 2)

    kernel = base["params"]["first"]["kernel"]
    for one, other in zip(
        jax.value_and_grad(loss)(kernel, after), jax.value_and_grad(loss)(kernel, more), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def of_embedding():
    model = apply_lora_plus(nn.Embed(7, 4), LoRAPlusConfig(target_modules=".*", rank=2))
    return make_theory(total(model), init_lora(model, KEY, jnp.zeros((1, 2), jnp.int32))[1])


test_adapters_without_layer_inputs = refusals((of_embedding, "embeddings", "target_parameters"))


def balance_of(delta1, delta2, ratio, init):
    return balance({"q": {"delta1": delta1, "delta2": delta2}}, ratio, init)


@pytest.mark.parametrize(
    ("delta1", "delta2", "init", "share", "moves"),
    [
        (0.1, 0.9, "lora", 1 / 9, (9.0, 16 / 9)),
        (0.9, 0.1, "lora", 9.0, (1 / 9, 144.0)),
        (0.1, 0.9, "gaussian", 1 / 9, (9.0, 16 / 9)),
        (0.1, 0.9, "lora_b", 1 / 9, (None, 16 / 9)),
        (0.9, 0.1, "lora_b", 9.0, (None, 144.0)),
        (0.1, 0.9, None, 1 / 9, (9.0, 16 / 9)),
        (0.1, 0.2, "lora", 0.5, (None, None)),
    ],
)
def test_the_balance_and_the_rates_that_restore_it(delta1, delta2, init, share, moves):
    found = balance_of(delta1, delta2, 16.0, init)
    assert found.ratio == pytest.approx(share)
    assert (found.learning_rate_factor, found.lr_ratio) == pytest.approx(moves)
    line = str(found)
    assert "\n" not in line
    assert len(line) <= 100
    assert f"{share:.2g}" in line
    assert moves[1] is None or f": {'A' if share < 1 else 'B'} is" in line


def test_the_balance_of_layers_is_their_geometric_mean():
    layers = {"q": {"delta1": 0.8, "delta2": 0.1}, "v": {"delta1": 0.1, "delta2": 0.4}}
    assert balance(layers, 16.0, "lora").ratio == pytest.approx(2**0.5)  # of 8 and 1/4


@pytest.mark.parametrize("init", ["lora", "lora_b", None])
def test_no_lr_ratio_below_one_is_ever_suggested(init):
    assert balance_of(0.0, 0.2, 16.0, init) == Balance(None)  # of a factor that moved nothing, nothing is
    tried = [(delta, ratio) for ratio in (0.5, 1.0, 4.0) for delta in (1e-3, 0.1, 1.0, 10.0)]
    found = {case: balance_of(case[0], 1.0, case[1], init).lr_ratio for case in tried}
    # All but those of equal terms, and of an A that is behind at a ratio of 1 or less.
    ratios = [ratio for ratio in found.values() if ratio is not None]
    assert (len(ratios), min(ratios), found[0.1, 4.0], found[0.1, 1.0]) == (5, 1.0, 1.0, None)


@functools.partial(jax.jit, static_argnames="steps")
def shares(lora, rate, ratio, steps=40):
    """delta1 / delta2 in the two halves of a short run of Adam on y = tanh(x (W + D)) v, D of rank 4."""
    keys = jax.random.split(jax.random.key(3), 5)
    x, w = jax.random.normal(keys[0], (256, 64)), jax.random.normal(keys[1], (64, 64)) / 8
    change = jax.random.normal(keys[2], (64, 4)) @ jax.random.normal(keys[3], (4, 64)) / 128
    v = jax.random.normal(keys[4], (64, 3)) / 8
    tx = lora_plus_adamw(rate, lr_ratio=ratio)

    def loss(tree):
        out = jnp.tanh(x @ w + low_rank_output(x, tree["lora"]["lora_a"], tree["lora"]["lora_b"], 2.0)) @ v
        return jnp.mean((out - jnp.tanh(x @ (w + change)) @ v) ** 2)

    def step(carry, _):
        old, state = carry
        updates, state = tx.update(jax.grad(loss)(old), state, old)
        new = optax.apply_updates(old, updates)
        before, after = ((t["lora"]["lora_a"], t["lora"]["lora_b"]) for t in (old, new))
        squares = update_squares(low_rank_output, x, before, after, 2.0)
        return (new, state), jnp.sqrt(squares[:2])

    (tree, _), terms = jax.lax.scan(step, ({"lora": lora}, tx.init({"lora": lora})), length=steps)
    halves = terms.reshape(2, -1, 2).sum(axis=1)
    return halves[:, 0] / halves[:, 1], tree["lora"]


def first_factors(init):
    a = jax.random.uniform(jax.random.key(0), (64, 8), minval=-0.3, maxval=0.3)
    b = jax.random.uniform(jax.random.key(0), (8, 64), minval=-0.9, maxval=0.9)
    return {"lora_a": 0 * a if init == "lora_b" else a, "lora_b": b if init == "lora_b" else 0 * b}


def later(lora, rate, ratio):
    return float(shares(lora, rate, ratio)[0][1])


@pytest.mark.slow
def test_the_balance_follows_the_rate_of_the_factor_that_does_not_start_at_zero():
    """That of A where B starts at zero, of B where A does, and the ratio where neither does."""
    lora = first_factors("lora")
    assert 0.5 < later(lora, 2e-4, 16.0) / later(lora, 2e-4, 1.0) < 2
    assert later(lora, 8e-4, 1.0) > 2 * later(lora, 2e-4, 4.0)
    neither = shares(lora, 3e-3, 4.0)[1]
    assert 2.5 < later(neither, 1e-5, 4.0) / later(neither, 1e-5, 16.0) < 6
    assert 0.7 < later(neither, 4e-5, 4.0) / later(neither, 1e-5, 4.0) < 1.4
    lora = first_factors("lora_b")
    assert later(lora, 1e-4, 1.0) > 2 * later(lora, 1e-4, 4.0) > 4 * later(lora, 1e-4, 16.0)
    assert 0.5 < later(lora, 4e-4, 1.0) / later(lora, 1e-4, 4.0) < 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("init", "rate", "ratio"), [("lora", 5e-4, 16.0), slow("lora", 2e-4, 4.0), slow("lora_b", 1e-4, 4.0)]
)
def test_rates_changed_as_suggested_bring_the_two_closer(init, rate, ratio):
    lora = first_factors(init)
    share = later(lora, rate, ratio)
    assert not 1 / BALANCED_RATIO < share < BALANCED_RATIO
    found = balance_of(share, 1.0, ratio, init)
    factor, new = found.learning_rate_factor, found.lr_ratio
    moved = rate * (factor or 1.0)
    kept = (moved, rate) if factor is None else (moved * new, rate * ratio)
    assert kept[0] == pytest.approx(kept[1], rel=0.1)
    assert abs(math.log(later(lora, moved, new))) < abs(math.log(share)) / 1.5
