"""One step, worked by hand; the same however a batch is cut; the base neither copied nor differentiated."""

import flax.jax_utils
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    init_lora,
    init_state,
    jit_step,
    lora_plus,
    lora_plus_adamw,
    make_eval,
    make_mesh,
    pmap_step,
)
from loraplus_jax.plan.hlo import collectives
from loraplus_jax.step.sharding import replicate
from loraplus_jax.step.train_step import make_step, weighted_means

from ..marks import slow
from ..refusals import refusals

KEY = jax.random.key(0)


def squares(variables, batch, rng):
    """Weighted squares of x (w + A B) - y."""
    q = variables["lora"]["q"]
    error = batch["x"] @ (variables["params"]["w"] + q["lora_a"] @ q["lora_b"]) - batch["y"]
    weight = batch["weight"][:, None]
    off = jnp.sum(abs(error)), jnp.sum(weight * 0 + 1)
    return (jnp.sum(weight * error**2), jnp.sum(weight)), {"off": off}


def scalars(b=0.0):
    """w = 1, A = 2, B = b; two examples of weights 1 and 3."""
    trainable = {"lora": {"q": {"lora_a": jnp.array([[2.0]]), "lora_b": jnp.array([[b]])}}}
    frozen = {"params": {"w": jnp.array([[1.0]])}}
    batch = {"x": jnp.array([[1.0], [3.0]]), "y": jnp.array([[0.0], [1.0]]), "weight": jnp.array([1.0, 3.0])}
    return trainable, frozen, batch


@pytest.mark.slow
def test_an_optimizer_with_arrays_of_its_own_trains_twice():
    trainable, frozen, batch = scalars()
    injected = optax.inject_hyperparams(lora_plus_adamw)(learning_rate=jnp.float32(0.1), lr_ratio=4.0)
    tx = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), injected)
    step = jit_step(squares, tx)
    moved = [step(init_state(trainable, tx, KEY), frozen, batch)[0].trainable for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *moved)


@pytest.mark.slow
def test_an_optimizer_that_takes_the_loss_gets_its_mean():
    trainable, frozen, batch = scalars()
    tx = optax.chain(
        lora_plus(optax.sgd(0.1), lr_ratio=4.0),
        optax.contrib.reduce_on_plateau(factor=0.5, patience=1, accumulation_size=1),
    )
    state, metrics = jit_step(squares, tx)(init_state(trainable, tx, KEY), frozen, batch)
    assert float(state.opt_state[1].best_value) == pytest.approx(float(metrics["loss"]))


def test_a_step_by_hand():
    # errors 1 and 2, loss (1 + 3 * 4) / 4; d loss / d(AB) = (2 * 1 * 1 + 3 * 2 * 2 * 3) / 4 = 9.5;
    # so dA = 9.5 * 0, dB = 9.5 * 2 = 19, and B's rate is 0.4.
    trainable, frozen, batch = scalars()
    tx = lora_plus(optax.sgd(0.1), lr_ratio=4.0)
    state, metrics = jit_step(squares, tx)(init_state(trainable, tx, KEY), frozen, batch)
    q = state.trainable["lora"]["q"]
    assert q["lora_a"].item() == 2.0
    np.testing.assert_allclose(q["lora_b"], [[-7.6]], rtol=1e-6)
    assert (int(state.step), state.step.dtype) == (1, jnp.int32)
    expected = {"loss": 3.25, "off": 1.5, "grad_norm/a": 0.0, "grad_norm/b": 19.0}
    expected |= {"update_norm/a": 0.0, "update_norm/b": 7.6}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
        assert metrics[name].dtype == jnp.float32
        assert metrics[name].shape == ()


def problem(examples=16):
    """A regression with unequal weights, B not zero."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    trainable = {"lora": {"q": {"lora_a": draw(6, 2), "lora_b": draw(2, 3)}}}
    weight = jnp.arange(examples, dtype=jnp.float32)
    batch = {"x": draw(examples, 6), "y": draw(examples, 3), "weight": weight}
    return trainable, {"params": {"w": draw(6, 3)}}, batch


def assert_close(got, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, expected)


TX = lora_plus_adamw(1e-2, lr_ratio=4.0, weight_decay=0.01, max_grad_norm=1.0)


@pytest.mark.slow
def test_jit_pmap_and_mesh_agree_at_every_step():
    trainable, frozen, batch = problem(32)
    mesh = make_mesh()
    assert mesh.size == 8
    one = jit_step(squares, TX)
    meshed = jit_step(squares, TX, mesh=mesh, accumulate=2)
    mapped = pmap_step(squares, TX, accumulate=2)
    spread = jax.tree.map(lambda x: x.reshape(8, 4, *x.shape[1:]), batch)
    places = (lambda x: x), (lambda x: replicate(mesh, x)), flax.jax_utils.replicate
    _, on_mesh, on_all = (place(frozen) for place in places)
    state = init_state(trainable, TX, KEY)
    for _ in range(3):
        # every step from the same state, so that rounding does not pile up
        here, there, all_over = (place(jax.tree.map(jnp.array, state)) for place in places)
        state, metrics = one(here, frozen, batch)
        by_mesh = meshed(there, on_mesh, batch)
        by_pmap = flax.jax_utils.unreplicate(mapped(all_over, on_all, spread))
        for other in (by_mesh, by_pmap):
            assert_close(without_key(other[0]), without_key(state))
            assert_close(other[1], metrics)


def without_key(state):
    return state.replace(rng=jax.random.key_data(state.rng))


def test_accumulation_changes_nothing():
    trainable, frozen, batch = problem()
    whole, cut = jit_step(squares, TX), jit_step(squares, TX, accumulate=4)
    got, expected = (step(init_state(trainable, TX, KEY), frozen, batch) for step in (cut, whole))
    assert_close(without_key(got[0]), without_key(expected[0]))
    assert_close(got[1], expected[1])


@pytest.mark.slow
def test_accumulation_moves_no_row_between_devices():
    """Every micro-batch is split as the batch is: only sums of gradients and metrics are communicated."""
    trainable, frozen, batch = problem(32)
    mesh = make_mesh(2, 2, 1)
    step = jit_step(squares, TX, mesh=mesh, accumulate=4)
    program = step.lower(init_state(trainable, TX, KEY), frozen, batch).compile().as_text()
    found = collectives(program)
    assert {(one.kind, one.group) for one in found} == {("all-reduce", mesh.size)}
    assert sum(one.bytes for one in found) < sum(leaf.nbytes for leaf in batch.values()) / 4


def first_step(loss_fn=squares, more=None, **options):
    trainable, frozen, batch = problem()
    return jit_step(loss_fn, TX, **options)(init_state(trainable, TX, KEY), frozen, batch | (more or {}))


def with_loss_among_metrics(variables, batch, rng):
    loss, _ = squares(variables, batch, rng)
    return loss, {"loss": loss}


test_what_a_step_refuses = refusals(
    (lambda: first_step(accumulate=0), "accumulate", 1, 0),
    (lambda: first_step(accumulate=3), "accumulate", 3, 16),
    (lambda: first_step(accumulate=2, more={"scale": 0.5}), "accumulate", "every leaf", 2, "1, 16"),
    (lambda: first_step(mesh=jax.sharding.Mesh(jax.devices(), ("model",))), "'data'", "'model'"),
    (lambda: first_step(loss_fn=with_loss_among_metrics), "'loss'"),
    error=ValueError,
)


def test_a_batch_of_no_weight_changes_nothing():
    trainable, frozen, batch = scalars(b=1.0)
    batch["weight"] = jnp.zeros(2)
    tx = lora_plus(optax.sgd(0.1), 16.0)
    state, metrics = jit_step(squares, tx)(init_state(trainable, tx, KEY), frozen, batch)
    assert metrics["loss"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.trainable, trainable)


@pytest.mark.slow
def test_the_state_is_donated_and_the_callers_arrays_are_not():
    trainable, frozen, batch = problem()
    state = init_state(trainable, TX, KEY)
    pure, _ = make_step(squares, TX)(state, frozen, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(without_key(state)))
    moved, _ = jit_step(squares, TX)(state, frozen, batch)
    assert_close(moved.trainable, pure.trainable)
    # The rates of the last update are only written: XLA drops the old ones before it can take their memory.
    state = state.replace(opt_state=state.opt_state.inner_state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.trainable, state.opt_state, state.step)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((trainable, frozen, batch, KEY)))


def test_steps_share_one_compilation():
    trainable, frozen, batch = problem()
    traces, mesh = [], make_mesh()

    def loss_fn(*args):
        traces.append(1)
        return squares(*args)

    state, frozen = replicate(mesh, (init_state(trainable, TX, KEY), frozen))
    step = jit_step(loss_fn, TX, mesh=mesh)
    for _ in range(3):
        state, _ = step(state, frozen, batch)
    assert (len(traces), int(state.step)) == (1, 3)


def test_every_step_device_and_part_has_a_key_of_its_own():
    def loss_fn(variables, batch, rng):
        one = jnp.ones(())
        return (jnp.sum(variables["lora"]["q"]["lora_a"]) * 0, one), {"draw": (jax.random.uniform(rng), one)}

    trainable, frozen, batch = problem()
    tx = optax.sgd(1.0)
    step = jit_step(loss_fn, tx)
    state, draws = init_state(trainable, tx, KEY), []
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        draws.append(float(metrics["draw"]))
    halves = jit_step(loss_fn, tx, accumulate=2)(init_state(trainable, tx, KEY), frozen, batch)[1]
    state = flax.jax_utils.replicate(init_state(trainable, tx, KEY))
    spread = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    mean = pmap_step(loss_fn, tx)(state, flax.jax_utils.replicate(frozen), spread)[1]["draw"][0]
    assert len({*draws, float(halves["draw"]), float(mean)}) == 5
    again = jit_step(loss_fn, tx)(init_state(trainable, tx, KEY), frozen, batch)[1]
    assert float(again["draw"]) == draws[0]


def test_full_training_needs_no_adapters():
    def loss_fn(variables, batch, rng):
        return (jnp.sum((batch @ variables["params"]["w"]) ** 2), batch.shape[0]), {}

    tx = lora_plus_adamw(0.1, 16.0, eps=1e-30)
    state = init_state({"params": {"w": jnp.array([[1.0]])}}, tx, KEY)
    state, metrics = jit_step(loss_fn, tx)(state, {}, jnp.array([[2.0], [4.0]]))
    np.testing.assert_allclose(state.trainable["params"]["w"], [[0.9]], rtol=1e-5)
    assert metrics.keys() == {"loss", "grad_norm/extra", "update_norm/extra", "rate/extra"}
    assert metrics["loss"] == 10.0


@pytest.mark.parametrize("mesh", [None, 8])
def test_eval_gives_sums_and_weights(mesh):
    trainable, frozen, batch = problem()
    mesh = mesh and make_mesh(mesh)
    (loss, weight), metrics = squares({**trainable, **frozen}, batch, None)
    totals = make_eval(squares, mesh=mesh)(trainable, frozen, batch)
    assert_close(totals, {"loss": (loss, weight), "off": metrics["off"]})
    np.testing.assert_allclose(weighted_means(totals)["loss"], loss / weight, rtol=1e-6)


# What the base costs

WIDTH, LAYERS, TOKENS, RANK = 512, 4, 16, 4


@pytest.fixture(scope="module")
def compiled():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            for n in range(LAYERS):
                x = nn.relu(nn.Dense(WIDTH, use_bias=False, name=f"layer_{n}")(x))
            return x

    model = apply_lora_plus(Mlp(), LoRAPlusConfig(target_modules="layer_.*", rank=RANK))
    x = jnp.ones((TOKENS, WIDTH))
    base = jax.eval_shape(Mlp().init, KEY, x)
    lora, _ = init_lora(model, KEY, x)

    def loss_fn(variables, batch, rng):
        return (jnp.sum(model.apply(variables, batch) ** 2), TOKENS), {}

    tx = lora_plus_adamw(1e-3, 16.0)
    state = init_state({"lora": lora}, tx, KEY)
    return jit_step(loss_fn, tx).lower(state, base, x).compile(), state


def test_flops_are_those_of_a_step_that_never_differentiates_the_base(compiled):
    base, adapters = LAYERS * WIDTH * WIDTH, LAYERS * 2 * WIDTH * RANK
    flops = compiled[0].cost_analysis()["flops"]
    assert 3.5 * base * TOKENS < flops <= 1.05 * (4 * base * TOKENS + 6 * adapters * TOKENS)


def test_memory_holds_no_copy_of_the_base(compiled):
    memory, state = compiled[0].memory_analysis(), compiled[1]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(without_key(state)))
    base = LAYERS * WIDTH * WIDTH * 4
    assert memory.temp_size_in_bytes < base / LAYERS  # not even one kernel
    assert memory.output_size_in_bytes < size + 2000
    assert memory.alias_size_in_bytes >= size - 100  # the new state lies where the old one was


@pytest.mark.parametrize(("bad", "pmapped"), [(jnp.nan, False), slow(jnp.inf, True)])
def test_a_step_that_is_not_finite_is_skipped_and_counted(bad, pmapped):
    def loss_fn(variables, batch, rng):
        total = jnp.sum(variables["params"]["w"] * batch)
        return (total, jnp.float32(1.0)), {}

    tx = optax.adam(0.1)
    make = pmap_step if pmapped else jit_step
    step = make(loss_fn, tx, skip_nonfinite=True)
    lift = (lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 8), tree)) if pmapped else lambda tree: tree
    state = lift(init_state({"params": {"w": jnp.ones(2)}}, tx, jax.random.key(0)))
    state, metrics = step(state, {}, lift(jnp.ones(2)))
    assert np.all(metrics["skipped"] == 0)
    before = jax.device_get((state.trainable, state.opt_state))
    spoiled = lift(jnp.array([1.0, bad]))
    if pmapped:  # one device alone spoils the step of all
        spoiled = jnp.ones((8, 2)).at[3, 1].set(bad)
    state, metrics = step(state, {}, spoiled)
    assert np.all(metrics["skipped"] == 1)
    assert np.all(state.step == 2)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.trainable, state.opt_state)))
    state, metrics = step(state, {}, lift(jnp.ones(2)))
    assert np.all(metrics["skipped"] == 0)
    assert np.all(np.asarray(state.trainable["params"]["w"]) < 0.85)


def test_a_step_whose_loss_alone_is_not_finite_is_skipped_too():
    def loss_fn(variables, batch, rng):
        return (jnp.sum(variables["params"]["w"]) + jax.lax.stop_gradient(batch), jnp.float32(1.0)), {}

    tx = optax.sgd(0.5)
    state = init_state({"params": {"w": jnp.ones(2)}}, tx, KEY)
    state, metrics = jit_step(loss_fn, tx, skip_nonfinite=True)(state, {}, jnp.array(jnp.inf))
    assert (metrics["skipped"], metrics["grad_norm/extra"]) == (1, np.float32(np.sqrt(2)))
    np.testing.assert_array_equal(state.trainable["params"]["w"], [1, 1])


def test_a_step_whose_update_is_not_finite_is_skipped_too():
    # A gradient of 2 is finite, 2 * 2e38 is not.
    def loss_fn(variables, batch, rng):
        return (jnp.sum(variables["params"]["w"] * batch), jnp.float32(1.0)), {}

    tx = optax.sgd(2e38)
    state = init_state({"params": {"w": jnp.ones(2)}}, tx, KEY)
    state, metrics = jit_step(loss_fn, tx, skip_nonfinite=True)(state, {}, jnp.full(2, 2.0))
    assert (metrics["skipped"], metrics["grad_norm/extra"]) == (1, np.float32(np.sqrt(8)))
    assert jnp.isinf(metrics["update_norm/extra"])
    np.testing.assert_array_equal(state.trainable["params"]["w"], [1, 1])


@pytest.mark.slow
def test_lambda_costs_nothing():
    """The compiled steps of lambda 16 and 4 have the same operations, bytes and memory.

    That of lambda 1, where A and B share an AdamW, has one bias correction and one counter less.
    """
    net = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(8)])
    model = apply_lora_plus(net, LoRAPlusConfig(target_modules=["layers_0", "layers_2"], rank=4))
    x = jnp.ones((16, 32))
    frozen, (lora, specs) = net.init(KEY, x), init_lora(model, KEY, x)

    def loss_fn(variables, batch, rng):
        return (jnp.sum(model.apply(variables, batch) ** 2), jnp.float32(batch.shape[0])), {}

    def cost(ratio):
        tx = lora_plus_adamw(1e-3, lr_ratio=ratio, specs=specs)
        step = jit_step(loss_fn, tx).lower(init_state({"lora": lora}, tx, KEY), frozen, x).compile()
        memory, costs = step.memory_analysis(), step.cost_analysis()
        sizes = memory.temp_size_in_bytes, memory.argument_size_in_bytes
        return costs["flops"], costs["bytes accessed"], *sizes

    assert cost(16.0) == cost(4.0)
    flops, *_, arguments = cost(16.0)
    flops_of_one, *_, arguments_of_one = cost(1.0)
    assert flops - flops_of_one <= 8
    assert arguments - arguments_of_one == np.int32().nbytes
