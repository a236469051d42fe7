"""Parameters in `target_parameters`: the merged model's values and gradients, at the cost of a layer's adapter."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, merge
from loraplus_jax.interpreter.low_rank import LowRankWeight
from loraplus_jax.step.theory import make_theory

KEY = jax.random.key(0, impl="rbg")
NORMAL = nn.initializers.normal()
IDS = jnp.arange(6).reshape(2, 3)


class Weight(nn.Module):
    """A parameter used by a function of the input and the parameter."""

    shape: tuple[int, ...]
    use: Any

    @nn.compact
    def __call__(self, x, *rest):
        y = self.use(x, self.param("w", NORMAL, self.shape, jnp.float32))
        return (y, None) if rest else y


def einsum(equation):
    return lambda x, w: jnp.einsum(equation, x, w)


def lifted(transform, shape=(4, 4), use=jnp.matmul, **options):
    """A model that runs the parameter's module by a transform of Flax's, in a loop if that is `nn.scan`."""

    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            part = transform(Weight, **options)(shape, lambda x, w: jnp.tanh(use(x, w)), name="part")
            return part(x, None)[0] if "length" in options else part(x)

    return Lifted()


class Reused(nn.Module):
    """A parameter that a loop reads at every step."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", NORMAL, (4, 4), jnp.float32)
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0]


class Changed(nn.Module):
    """A parameter that the model changes before a layer reads it."""

    @nn.compact
    def __call__(self, x):
        change = lambda variables: jax.tree.map(jnp.sin, variables)  # noqa: E731
        part = nn.map_variables(nn.Dense, "params", change, init=self.is_initializing())
        return part(5, use_bias=False, name="part")(x)


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, the rule, its input, and whether the whole W + s A B is needless."""

    net: nn.Module
    rules: Mapping[str, str]
    x: Any = None
    by_rank: bool = True

    @property
    def inputs(self):
        return np.random.default_rng(1).normal(size=(3, 4)) if self.x is None else self.x


def of(shape, use, axes, x=None, **options):
    return Row(Weight(shape, use), {"w": axes}, x, **options)


STACKED: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
SCANNED: Any = STACKED | {"length": 3}
LAST, MIDDLE = (SCANNED | {"variable_axes": {"params": axis}} for axis in (-1, 1))
ROWS = {
    "product": of((4, 5), lambda x, w: x @ w, "io"),
    "output first": of((5, 4), lambda x, w: x @ w.T, "oi"),
    "weight first": of((5, 4), lambda x, w: w @ x.T, "oi"),
    "other way round": of((5, 4), lambda x, w: x @ w.T, "io"),
    "heads": of((4, 2, 3), einsum("bi,inh->bnh"), "ioo"),
    "from heads": of((2, 3, 5), einsum("bnh,nho->bo"), "iio", np.ones((3, 2, 3))),
    "experts of one input": of((3, 4, 5), einsum("bi,eio->beo"), "eio"),
    "experts of their own inputs": of((3, 4, 5), einsum("ebi,eio->ebo"), "eio", np.ones((3, 2, 4))),
    "experts that are summed": of((3, 4, 5), einsum("ebi,eio->bo"), "eio", np.ones((3, 2, 4))),
    "experts, last": of((4, 5, 3), einsum("ebi,ioe->ebo"), "ioe", np.ones((3, 2, 4))),
    "rows": of((7, 4), lambda x, w: jnp.take(w, x, axis=0), "io", IDS),
    "rows by index": of((7, 4), lambda x, w: w[x], "io", IDS),
    "columns": of((4, 7), lambda x, w: w[:, x], "io", IDS, by_rank=False),
    "half": of((4, 5), lambda x, w: x @ w.astype(jnp.float16).astype(x.dtype), "io"),
    "kernel of a layer": Row(nn.Dense(5), {"kernel": "io"}),
    "embedding": Row(nn.Embed(7, 4), {"embedding": "io"}, IDS),
    "convolution": Row(nn.Conv(6, (3,)), {"kernel": "iio"}, np.ones((2, 5, 4))),
    "jit": Row(lifted(nn.jit), {"part/w": "io"}),
    "remat": Row(lifted(nn.remat), {"part/w": "io"}),
    "vmap": Row(lifted(nn.vmap, **STACKED), {"part/w": "eio"}, np.ones((3, 2, 4))),
    "scan": Row(lifted(nn.scan, **SCANNED), {"part/w": "eio"}),
    "scan of the last axis": Row(lifted(nn.scan, **LAST), {"part/w": "ioe"}),
    "scan backwards": Row(
        lifted(nn.scan, reverse=True, unroll=2, **MIDDLE), {"part/w": "ieo"}
    ),
    "scan of remat": Row(
        lifted(lambda part, **options: nn.scan(nn.remat(part), **options), **SCANNED),
        {"part/w": "eio"},
    ),
    "scan over the inputs": Row(
        lifted(nn.scan, **SCANNED), {"part/w": "ioo"}, by_rank=False
    ),
    "scan that only reads": Row(Reused(), {"w": "io"}),
    "stacked lookup": Row(
        lifted(
            nn.scan, (7, 4), lambda x, w: x + w[jnp.arange(3)], **SCANNED
        ),
        {"part/w": "eio"},
    ),
    "part of the inputs": of((2, 4, 5), einsum("bi,jio->bjo"), "iio", by_rank=False),
    "reshaped": of((2, 2, 5), lambda x, w: x @ w.reshape(4, 5), "iio", by_rank=False),
    "with itself": of((4, 5), lambda x, w: x @ (w @ w.T), "io", by_rank=False),
    "stopped": of((4, 5), lambda x, w: x @ (w + 2 * jax.lax.stop_gradient(w)), "io", by_rank=False),
    "stopped alone": of((4, 5), lambda x, w: x @ w + x @ jax.lax.stop_gradient(w), "io", by_rank=False),
    "whole numbers": of((4, 5), lambda x, w: x @ w.astype(int) + x @ w, "io", by_rank=False),
    "branch": of((4, 4), lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x), "io", by_rank=False),
    "changed": Row(Changed(), {"part/kernel": "io"}, by_rank=False),
    "result": of((4, 5), lambda x, w: (x @ w, w), "io", by_rank=False),
}  # fmt: skip


def prepared(net, x, **fields):
    """The model, and variables without zeros in float64."""
    model = apply_lora_plus(net, LoRAPlusConfig(**{"rank": 2, "alpha": 3.0} | fields))
    lora, specs = init_lora(model, KEY, x)
    random = np.random.default_rng(3)
    draw = lambda tree: jax.tree.map(lambda v: jnp.asarray(random.normal(size=v.shape)), tree)  # noqa: E731
    return model, {"params": draw(jax.eval_shape(net.init, KEY, x)["params"])}, draw(lora), specs


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected)


@pytest.fixture
def sums(monkeypatch):
    """Grows with every W + s A B that a model computes."""
    original, calls = LowRankWeight.sum, []
    monkeypatch.setattr(LowRankWeight, "sum", lambda self: (calls.append(1), original(self))[1])
    return calls


QUICK = ("product", "experts, last", "rows", "convolution", "vmap", "scan of remat", "reshaped", "changed")


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(
            pytest.param(name, marks=pytest.mark.long if n % 2 else pytest.mark.slow)
            for n, name in enumerate(ROWS)
            if name not in QUICK
        ),
    ],
)
def test_values_and_gradients_are_those_of_the_merged_model(name, sums):
    row = ROWS[name]
    with jax.enable_x64(True):
        model, base, lora, specs = prepared(row.net, row.inputs, target_parameters=row.rules)
        assert list(specs) == list(row.rules)
        size = lambda y: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(y))  # noqa: E731
        ours = lambda lora: model.apply({**base, "lora": lora}, row.inputs)  # noqa: E731
        merged = lambda lora: row.net.apply(merge(base, lora, specs), row.inputs)  # noqa: E731
        sums.clear()
        found = jax.jit(ours)(lora)
        assert bool(sums) is not row.by_rank
        if name == "half":  # rounds W, but not s A B
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), found, merged(lora))
            return
        assert_close(found, merged(lora))
        assert_close(
            jax.grad(lambda lora: size(ours(lora)))(lora), jax.grad(lambda lora: size(merged(lora)))(lora)
        )


def test_dora_of_a_product_that_sums_over_a_batch_axis():
    net = Weight((3, 4, 5), einsum("ebi,eio->bo"))
    with jax.enable_x64(True):
        x, rules = np.random.default_rng(0).normal(size=(3, 2, 4)), {"w": "eio"}
        model = apply_lora_plus(net, LoRAPlusConfig(rank=2, target_parameters=rules, variant="dora"))
        base = net.init(KEY, x)
        lora, specs = init_lora(model, KEY, x, base=base)
        lora = jax.tree.map(lambda v: v + 0.1, lora)
        assert_close(model.apply({**base, "lora": lora}, x), net.apply(merge(base, lora, specs), x))


def flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


WIDE = np.ones((256, 64), np.float32)
COSTLY = {
    "product": of((64, 64), lambda x, w: x @ w, "io", WIDE),
    "experts": of((3, 64, 64), einsum("bi,eio->beo"), "eio", WIDE),
    "rows": of((500, 64), lambda x, w: w[x], "io", np.arange(64)),
    "convolution": Row(nn.Conv(32, (3,)), {"kernel": "iio"}, np.ones((8, 32, 32), np.float32)),
    "scan": Row(lifted(nn.scan, (64, 64), **SCANNED), {"part/w": "eio"}, WIDE),
    "remat": Row(lifted(nn.remat, (64, 64)), {"part/w": "io"}, WIDE),
    "jit": Row(lifted(nn.jit, (64, 64)), {"part/w": "io"}, WIDE),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("product", "scan") else pytest.mark.slow) for name in COSTLY],
)
def test_the_gradient_of_the_whole_weight_is_not_computed(name):
    row = COSTLY[name]
    model, base, lora, specs = prepared(row.net, row.inputs, target_parameters=row.rules)
    x = jnp.asarray(row.inputs)
    ours = lambda lora, x: jnp.sum(model.apply({**base, "lora": lora}, x) ** 2)  # noqa: E731
    merged = lambda lora, x: jnp.sum(row.net.apply(merge(base, lora, specs), x) ** 2)  # noqa: E731
    costs = [flops(jax.value_and_grad(f), lora, x) for f in (ours, merged)]
    assert 0 < costs[0] < 0.8 * costs[1]


def test_a_parameter_of_a_layer_costs_what_the_adapter_of_the_layer_does():
    costs = []
    for fields in ({"target_parameters": {"kernel": "io"}}, {"target_modules": ".*"}):
        model, base, lora, _ = prepared(nn.Dense(64), WIDE, **fields)
        loss = lambda lora, x: jnp.sum(model.apply({**base, "lora": lora}, x) ** 2)  # noqa: B023, E731
        costs.append(flops(jax.value_and_grad(loss), lora, jnp.asarray(WIDE)))
    # But for two elementwise operations on the outputs, of 256 × 64 values.
    assert costs[0] == pytest.approx(costs[1], rel=0.02)


class Busy(nn.Module):
    """A parameter beside everything else that a module may have."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4, name="layer")(x))
        calls = self.variable("calls", "n", lambda: jnp.int32(0))
        calls.value += 1
        x = jnp.tanh(x @ self.param("w", NORMAL, (4, 4), jnp.float32))
        self.sow("intermediates", "w", x)
        return {"y": x + jax.random.normal(self.make_rng("noise"), x.shape), "name": "busy", "n": (2, None)}


RNGS = {"dropout": jax.random.key(5), "noise": jax.random.key(6)}


@pytest.mark.parametrize("jit", [False, True])
def test_rngs_collections_and_results_are_those_of_the_merged_model(jit):
    x, rngs = ROWS["product"].inputs, {"params": KEY, **RNGS}
    model = apply_lora_plus(Busy(), LoRAPlusConfig(target_parameters={"w": "io"}, rank=2, alpha=3.0))
    wrap = jax.jit if jit else lambda f: f
    with jax.enable_x64(True):
        variables = model.init(rngs, x)
        _, specs = init_lora(model, rngs, x)
        lora = jax.tree.map(jnp.ones_like, variables.pop("lora"))

        def run(net, variables):
            y, state = net.apply(variables, x, rngs=RNGS, mutable=["batch_stats", "calls", "intermediates"])
            assert (y.pop("name"), y.pop("n")) == ("busy", (2, None))
            return y, state

        found = wrap(lambda lora: run(model, {**variables, "lora": lora}))(lora)
        expected = run(Busy(), {**variables, **merge(variables, lora, specs)})
        assert_close(found, expected)
        assert int(found[1]["calls"]["n"]) == 2


class Both(nn.Module):
    """A parameter and a layer."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(x @ self.param("w", NORMAL, (4, 4), jnp.float32))
        return nn.Dense(5, name="layer")(x)


@pytest.fixture
def both():
    """A model with both adapters, one with the layer's and the parameter merged, and the variables of each."""
    with jax.enable_x64(True):
        x = jnp.asarray(ROWS["product"].inputs)
        fields = {"target_modules": ["layer"], "dropout": 0.5}
        model, base, lora, specs = prepared(Both(), x, target_parameters={"w": "io"}, **fields)
        other = apply_lora_plus(Both(), LoRAPlusConfig(rank=2, alpha=3.0, **fields))
        merged = merge(base, {"w": lora["w"]}, {"w": specs["w"]})
        yield x, specs, (model, base, lora), (other, merged, {"layer": lora["layer"]})


def test_the_dropout_of_layers_is_that_of_the_merged_model(both):
    x, _, *models = both
    run = lambda model, base, lora, **rngs: model.apply({**base, "lora": lora}, x, rngs=rngs)  # noqa: E731
    found, expected = (run(*model, dropout=RNGS["dropout"]) for model in models)
    assert_close(found, expected)
    assert float(jnp.abs(found - run(*models[0])).max()) > 0.1


def test_the_measurements_of_layers_are_those_of_the_merged_model(both):
    x, specs, *models = both
    results = []
    for model, base, lora in models:
        loss = lambda variables, x, rng: ((jnp.sum(model.apply(variables, x)), 1.0), {})  # noqa: B023, E731
        measure = make_theory(loss, {"layer": specs["layer"]})
        after = lora | {"layer": jax.tree.map(lambda v: 2 * v, lora["layer"])}
        results.append(measure({"lora": after}, lora, base, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)
    assert float(results[0]["layer"]["delta1"]) > 0


def test_dropout_keeps_the_mean_of_an_input():
    weight = LowRankWeight(w=None, dropout=0.75, key=KEY)
    kept = np.asarray(weight.low_rank_term(lambda x, a, b, scale: x, jnp.ones(4000)))
    assert set(kept.tolist()) == {0.0, 4.0}
    assert kept.mean() == pytest.approx(1.0, abs=0.1)
    ids = jnp.arange(3)  # of a lookup
    assert weight.low_rank_term(lambda x, a, b, scale: x, ids).tolist() == [0, 1, 2]
