"""AdaLoRA by hand and against the paper's equations in float64; what it is in every layout and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from loraplus_jax import describe, lora_plus_adamw
from loraplus_jax.optim.adalora import adalora, budget_at, most_important
from loraplus_jax.optim.roles import find_states

from ..refusals import refusals

RANK, STEPS = 4, 30
SCHEDULE = {"steps": STEPS, "target_rank": 2, "initial_steps": 5, "final_steps": 8, "every": 3}
"""Chooses at the steps 6, 9, ..., 21 and, for good, from 22 on."""
OFF = {"steps": 1000, "target_rank": RANK, "initial_steps": 999, "final_steps": 0, "orthogonality": 0.0}


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def factors(dtype=np.float32):
    """Two layers stacked in q, and v."""
    return {
        "q": {"lora_a": draw(2, 6, RANK, dtype=dtype), "lora_b": np.zeros((2, RANK, 5), dtype)},
        "v": {"lora_a": draw(5, RANK, seed=1, dtype=dtype), "lora_b": np.zeros((RANK, 7), dtype)},
    }


TARGETS = {"q": draw(2, 6, 5, seed=2, dtype=np.float64), "v": draw(5, 7, seed=3, dtype=np.float64)}


def slope(products, step):
    """The gradient by A B of half the squared distance to a target that shakes."""
    return {
        name: product - TARGETS[name] + 0.3 * draw(*product.shape, seed=100 + step, dtype=np.float64)
        for name, product in products.items()
    }


def gradients(params, step):
    params = {name: (np.asarray(pair["lora_a"]), np.asarray(pair["lora_b"])) for name, pair in params.items()}
    slopes = slope({name: a @ b for name, (a, b) in params.items()}, step)
    return {
        name: {
            "lora_a": jnp.asarray((slopes[name] @ b.swapaxes(-1, -2)).astype(a.dtype)),
            "lora_b": jnp.asarray((a.swapaxes(-1, -2) @ slopes[name]).astype(b.dtype)),
        }
        for name, (a, b) in params.items()
    }


def train(tx, params, steps=STEPS, grads=gradients, compilations=1):
    """The parameters and the state after every step."""
    params = jax.tree.map(jnp.asarray, params)
    update, state, history = jax.jit(tx.update), jax.jit(tx.init)(params), []
    for step in range(steps):
        updates, state = update(grads(params, step), state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    assert update._cache_size() == compilations
    return history


def usual(**more):
    return adalora(lora_plus_adamw(0.03, 4.0), optax.adam(0.05), **(SCHEDULE | more))


def test_a_step_by_hand():
    """Λ is (5, 2), Q [[.6, .8], [0, 1]], its gradient [[5, 6.6], [2.96, 3.28]], P's diag(0, 12) + 1, Λ's (1.4, 1).

    An importance is an eighth of (w g)²; that of the triplets is 8.49 and 43.42.
    """
    params = {"q": {"lora_a": jnp.diag(jnp.array([1.0, 2.0])), "lora_b": jnp.array([[3.0, 4.0], [0.0, 2.0]])}}
    grads = jax.tree.map(jnp.ones_like, params)
    settings = {"steps": 2, "initial_steps": 0, "final_steps": 0}
    settings |= dict.fromkeys(("beta1", "beta2", "orthogonality"), 0.5)
    for target, kept in ((2, 1.0), (1, 0.0)):
        tx = adalora(optax.sgd(0.1), optax.sgd(0.1), target_rank=target, **settings)
        updates, state = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
        found = optax.apply_updates(params, updates)["q"]
        np.testing.assert_allclose(found["lora_a"], [[0.9, -0.1], [-0.1, 0.7]], rtol=1e-5)
        np.testing.assert_allclose(
            found["lora_b"], [[0.486 * kept, 0.6804 * kept], [-0.5624, 1.2768]], rtol=1e-5
        )
        np.testing.assert_allclose(state.triplets.values["q/lora_b"], [4.86 * kept, 1.9], rtol=1e-5)
        np.testing.assert_allclose(state.sensitivity.values["q/lora_b"], [3.5, 1.0], rtol=1e-5)
        np.testing.assert_allclose(state.uncertainty.p["q/lora_a"], [[0.25, 0.0], [0.0, 6.5]], rtol=1e-5)


class Adam:
    """Adam of one array, from its paper."""

    def __init__(self, rate):
        self.rate, self.m, self.v, self.t = rate, 0.0, 0.0, 0

    def __call__(self, g):
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
        return -self.rate * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


class Reference:
    """One matrix with its triplets: sections 3.1 and 3.2, with the regularized loss in all gradients."""

    def __init__(self, p, q, rates, gamma, beta):
        self.weights = [p, np.zeros(RANK), q]
        self.adams, self.gamma, self.beta = [Adam(rate) for rate in rates], gamma, beta
        self.mean, self.spread = ([np.zeros_like(w) for w in self.weights] for _ in range(2))

    @property
    def product(self):
        p, values, q = self.weights
        return p @ np.diag(values) @ q

    def step(self, slope, learns):
        """Returns the importance of the triplets before Λ is masked."""
        p, values, q = self.weights
        eye = np.eye(RANK)
        grads = [
            slope @ q.T @ np.diag(values) + self.gamma * 4 * p @ (p.T @ p - eye),
            np.diag(p.T @ slope @ q.T),
            np.diag(values) @ p.T @ slope + self.gamma * 4 * (q @ q.T - eye) @ q,
        ]
        if learns:
            for n, (w, g) in enumerate(zip(self.weights, grads, strict=True)):
                now = np.abs(w * g)
                self.mean[n] = self.beta[0] * self.mean[n] + (1 - self.beta[0]) * now
                self.spread[n] = self.beta[1] * self.spread[n] + (1 - self.beta[1]) * np.abs(
                    now - self.mean[n]
                )
        self.weights = [w + adam(g) for w, g, adam in zip(self.weights, grads, self.adams, strict=True)]
        s = [m * u for m, u in zip(self.mean, self.spread, strict=True)]
        return s[1] + s[0].sum(0) / len(p) + s[2].sum(1) / q.shape[1]


def test_thirty_steps_are_the_papers_in_float64():
    """A and B after every step, through all phases; ranks differ in the end, and the reference's masks change."""
    with jax.enable_x64(True):
        params = factors(np.float64)
        tx = usual(beta1=0.8, beta2=0.7, orthogonality=0.1, seed=3)
        start = tx.init(params).triplets
        references = [
            Reference(
                np.asarray(start.p[f"{name}/lora_a"]).reshape(-1, n, RANK)[layer],
                np.asarray(start.q[f"{name}/lora_b"]).reshape(-1, RANK, m)[layer],
                (0.03, 0.05, 0.12),
                0.1,
                (0.8, 0.7),
            )
            for name, layer, (n, m) in (("q", 0, (6, 5)), ("q", 1, (6, 5)), ("v", 0, (5, 7)))
        ]
        history = train(tx, params)
        ranks = []
        for t, (found, _) in enumerate(history, 1):
            first, second, other = (reference.product for reference in references)
            slopes = slope({"q": np.stack([first, second]), "v": other}, t - 1)
            matrices = [*slopes["q"], slopes["v"]]
            scores = [r.step(g, t < 22) for r, g in zip(references, matrices, strict=True)]
            if t >= 22 or (t > 5 and t % 3 == 0):
                budget = 6 if t >= 22 else 6 + int(6 * (1 - (t - 5) / (30 - 8 - 5)) ** 3)
                worst = np.sort(np.concatenate(scores))[::-1][budget - 1]
                for reference, score in zip(references, scores, strict=True):
                    reference.weights[1] = np.where(score >= worst, reference.weights[1], 0)
                ranks.append([int((r.weights[1] != 0).sum()) for r in references])
            pairs = [*zip(found["q"]["lora_a"], found["q"]["lora_b"], strict=True)]
            pairs.append((found["v"]["lora_a"], found["v"]["lora_b"]))
            for (a, b), reference in zip(pairs, references, strict=True):
                p, values, q = reference.weights
                np.testing.assert_allclose(a, p, rtol=0, atol=1e-10)
                np.testing.assert_allclose(b, np.diag(values) @ q, rtol=0, atol=1e-10)
    assert [sum(r) for r in ranks] == [11, 8, 7, 6, 6, 6] + [6] * 9
    assert len(set(map(tuple, ranks))) == 4
    assert ranks[-1] != [2, 2, 2]


@pytest.mark.slow
def test_the_budget_and_its_choice():
    assert budget_at(jnp.array([1, 0.75, 0.5, 0.25, 0]), 12, 4).tolist() == [12, 7, 5, 4, 4]
    for total, phase in ((864, 1000), (14336, 777)):
        found = budget_at(jnp.arange(phase, -1, -1) / phase, total, total // 2)
        exact = [total // 2 + (total - total // 2) * n**3 // phase**3 for n in range(phase, -1, -1)]
        np.testing.assert_array_equal(found, exact)
    kept = most_important({"b": jnp.array([[2.0, 1.0], [1.0, 5.0]]), "a": jnp.array([1.0, 3.0])}, 4)
    assert kept["b"].tolist() == [[True, True], [False, True]]  # of equal ones the first
    assert kept["a"].tolist() == [False, True]


@pytest.mark.slow
def test_the_rank_goes_to_the_modules_that_need_it():
    """What is to be learned has rank 3 in the first module, 1 in the second and 0 in the third."""
    size, ranks = 16, (3, 1, 0)
    x = draw(256, size)
    weights = [draw(size, size, seed=n + 1) / 4 for n in range(3)]
    missing = [draw(size, r, seed=n + 5) @ draw(r, size, seed=n + 9) / 8 for n, r in enumerate(ranks)]
    names = [f"m{n}" for n in range(3)]

    def outputs(deltas):
        y = x
        for w, delta in zip(weights, deltas, strict=True):
            y = y + jnp.tanh(y @ (w + delta))
        return y

    goal = outputs(missing)

    def loss(params):
        return jnp.mean((outputs([2 * params[m]["lora_a"] @ params[m]["lora_b"] for m in names]) - goal) ** 2)

    a = {m: draw(size, 4, seed=n + 20) / 4 for n, m in enumerate(names)}
    params = {m: {"lora_a": jnp.asarray(a[m]), "lora_b": jnp.zeros((4, size))} for m in names}
    settings = {"steps": 600, "target_rank": 4 / 3, "initial_steps": 100, "final_steps": 200, "every": 10}
    tx = adalora(lora_plus_adamw(1e-2, 4.0), optax.adam(1e-2), **settings)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    train_all = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=600)[0][0])
    found = train_all(params)
    assert tuple(int(np.any(found[m]["lora_b"], -1).sum()) for m in names) == ranks
    assert loss(found) < 1e-3 * loss(params)


def views(a, b):
    """A (in, r) and B (r, out), as PEFT has them, and with several axes."""
    wide = {"lora_a": a.reshape(5, 1, RANK), "lora_b": b.reshape(RANK, 7, 1)}
    return {"p": {"lora_A": {"weight": a.T}, "lora_B": {"weight": b.T}}, "q": wide}


@pytest.mark.slow
def test_every_layout_takes_the_same_steps():
    """No pair is chosen from, so that each goes its own way."""
    pair = factors()["v"]["lora_a"], draw(RANK, 7, seed=8)
    tx, flat = adalora(optax.sgd(0.1), optax.sgd(0.1), **OFF), {"v": dict(zip("ab", pair, strict=True))}

    @jax.jit
    def step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    ends = []
    for view in (lambda a, b: {"v": {"lora_a": a, "lora_b": b}}, views):
        params = view(*pair)
        state = jax.jit(tx.init)(params)
        for n in range(3):
            params, state = step(params, view(draw(5, RANK, seed=n), draw(RANK, 7, seed=n)), state)
        ends.append(params)
    expected = views(ends[0]["v"]["lora_a"], ends[0]["v"]["lora_b"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ends[1], expected)
    assert np.abs(ends[0]["v"]["lora_a"] - flat["v"]["a"]).max() > 0.1


@pytest.mark.slow
def test_a_start_that_is_not_zero_is_kept():
    params = factors() | {"v": {"lora_a": np.zeros((5, RANK), np.float32), "lora_b": draw(RANK, 7)}}
    params["q"]["lora_b"] = draw(2, RANK, 5, seed=9)
    tx = adalora(optax.sgd(1.0), optax.sgd(1.0), **OFF)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), jax.jit(tx.init)(params), params)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(updates)) < 1e-6


@pytest.mark.slow
def test_layers_without_adapter_stay_zero_and_bfloat16_factors_are_the_state_rounded():
    params = factors()
    params["q"]["lora_a"][1] = 0
    params["v"]["lora_a"][:, 3] = 0  # as in a sweep over ranks
    history = train(usual(), jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    for found, state in history:
        triplets = jax.device_get(state.triplets)
        np.testing.assert_array_equal(found["v"]["lora_a"], triplets.p["v/lora_a"].astype(jnp.bfloat16))
        b = triplets.values["v/lora_b"][:, None] * triplets.q["v/lora_b"]
        np.testing.assert_array_equal(found["v"]["lora_b"], b.astype(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(state.sensitivity)} == {jnp.dtype("float32")}
    assert (int(state.initial_budget), int(state.target_budget)) == (7, 4)
    found = jax.device_get(found)
    assert not any(np.any(x[1]) for x in found["q"].values())
    assert not any(np.any(x) for x in (found["v"]["lora_a"][:, 3], found["v"]["lora_b"][3]))
    assert sum(int(np.any(pair["lora_b"], -1).sum()) for pair in found.values()) == 4


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_ranks_that_are_not_there():
    alone = factors()
    padded = jax.tree.map(lambda x: np.pad(x, [(0, 2 if n == RANK else 0) for n in x.shape]), alone)
    tx, other = usual(), adalora(optax.sgd(1.0), optax.sgd(1.0), **OFF, seed=1)
    drawn, more, others = (
        jax.jit(t.init)(x).triplets.q for t, x in ((tx, alone), (tx, padded), (other, alone))
    )
    for path, q in drawn.items():
        axis = next(n for n, size in enumerate(q.shape) if size == RANK)
        np.testing.assert_array_equal(q, np.take(more[path], range(RANK), axis))
        assert not np.allclose(q, others[path])


@pytest.mark.slow
def test_members_of_a_sweep_are_single_runs():
    rates, params = jnp.array([0.01, 0.03]), {"v": factors()["v"]}

    def member(rate):
        tx = adalora(lora_plus_adamw(rate, 4.0), optax.adam(rate), **SCHEDULE)
        state = tx.init(params)

        def step(carry, t):
            moved, state = carry
            updates, state = tx.update(jax.tree.map(lambda x: jnp.cos(3 * x + t), moved), state, moved)
            return (optax.apply_updates(moved, updates), state), None

        return jax.lax.scan(step, (params, state), jnp.arange(25))[0][0]

    together = jax.jit(jax.vmap(member))(rates)
    alone = jax.jit(member)(rates[1])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, atol=1e-5), together, alone)


@pytest.mark.slow
def test_on_a_mesh_it_takes_the_same_steps():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    params = {"q": {"lora_a": draw(2, 6, RANK), "lora_b": np.zeros((2, RANK, 8), np.float32)}}
    axes = {"lora_a": PartitionSpec(None, "fsdp"), "lora_b": PartitionSpec(None, None, "fsdp")}
    placed = jax.device_put(params, {"q": {name: NamedSharding(mesh, spec) for name, spec in axes.items()}})

    def grads(params, step):
        return jax.tree.map(lambda x: jnp.cos(3 * x + step), params)

    split, state = train(usual(), placed, grads=grads, compilations=2)[-1]  # the first state is replicated
    whole, _ = train(usual(), params, grads=grads)[-1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), split, whole)
    assert state.sensitivity.q["q/lora_b"].sharding.is_equivalent_to(placed["q"]["lora_b"].sharding, 3)


@pytest.mark.slow
def test_roles_and_rates_are_the_wrapped_optimizers():
    tx, params = usual(), {"lora": factors()}
    (state,) = find_states(tx.init(params))
    assert {role: float(rate) for role, rate in state.rates.items()} == pytest.approx({"a": 0.03, "b": 0.12})
    assert dict(state.roles)["lora/v/lora_b"] == "b"
    assert "0.12" in str(describe(params, tx))
    assert find_states(adalora(optax.sgd(1.0), optax.sgd(1.0), **SCHEDULE).init(params)) == []


test_bad_settings_of_adalora = refusals(
    (lambda: usual(initial_steps=20, final_steps=10), "initial_steps", 20, "final_steps", 10, 30),
    (lambda: usual(every=0), "every", 0),
    (lambda: usual(beta1=1.0), "beta1", "1.0"),
    (lambda: usual(orthogonality=-1.0), "orthogonality", "1.0"),
    (lambda: usual(target_rank=0), "target_rank", 0),
    (lambda: usual(target_rank=5).init({"v": factors()["v"]}), "target_rank", 4, 5),
    error=ValueError,
)
