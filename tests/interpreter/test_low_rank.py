"""Parameters in `target_parameters`: the merged model's values and gradients, at the cost of a layer's adapter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, merge
from loraplus_jax.interpreter.weight import LowRankWeight
from loraplus_jax.step.theory import make_theory

from ..marks import slow
from ..zoo.linen_toys import WEIGHTS, lifted, part, steps, used
from ..zoo.properties import KEY, Toy, close, drawn, modules, of_linen, parameters, prove, traced

QUICK = ("rows", "reshaped")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in WEIGHTS])
def test_any_use_of_a_weight(name, tmp_path):
    prove(WEIGHTS[name], tmp_path)


WIDE = np.ones((256, 64), np.float32)
COSTLY = {
    "product": used((64, 64), jnp.matmul, "io", WIDE),
    "experts": used((3, 64, 64), "bi,eio->beo", "eio", WIDE),
    "rows": used((500, 64), lambda x, w: w[x], "io", np.arange(64)),
    "scan": part(lifted(nn.scan, (64, 64), **steps()), "eio", WIDE),
}


def costs(net, model, x):
    """FLOPs of a step of the adapted model and, of `net`, of the merged one."""
    lora, specs = traced(model, x)
    base = {"params": jax.eval_shape(net.init, KEY, x)["params"]}
    ours = lambda lora, base: jnp.sum(model.apply({**base, "lora": lora}, x) ** 2)  # noqa: E731
    merged = lambda lora, base: jnp.sum(net.apply(merge(base, lora, specs), x) ** 2)  # noqa: E731
    steps = [jax.jit(jax.value_and_grad(f)).lower(lora, base).compile() for f in (ours, merged)]
    return [step.cost_analysis()["flops"] for step in steps]


@pytest.mark.parametrize("name", [name if name == "product" else slow(name) for name in COSTLY])
def test_the_gradient_of_the_whole_weight_is_not_computed(name):
    toy = COSTLY[name]
    ours, merged = costs(toy.make, apply_lora_plus(toy.make, toy.config()), jnp.asarray(toy.args[0]))
    assert 0 < ours < 0.8 * merged


@pytest.mark.slow
def test_a_parameter_of_a_layer_costs_what_the_adapter_of_the_layer_does():
    found = [
        costs(
            nn.Dense(64), apply_lora_plus(nn.Dense(64), LoRAPlusConfig(rank=2, **rules)), jnp.asarray(WIDE)
        )[0]
        for rules in ({"target_parameters": {"kernel": "io"}}, {"target_modules": ".*"})
    ]
    # But for two elementwise operations on the outputs, of 256 × 64 values.
    assert found[0] == pytest.approx(found[1], rel=0.02)


class Both(nn.Module):
    """A parameter and a layer."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(x @ self.param("w", nn.initializers.normal(), (4, 4), jnp.float32))
        return nn.Dense(5, name="layer")(x)


@pytest.fixture
def both():
    """A model with both adapters, one with the layer's and the parameter merged, and the variables of each."""
    with jax.enable_x64(True):
        toy = Toy(Both(), "layer w", modules("layer", dropout=0.5) | parameters(w="io"), (np.ones((3, 4)),))
        _, _, base, lora, specs, config, (x,), _ = of_linen(toy)
        lora = drawn(lora)
        model = apply_lora_plus(Both(), config)
        other = apply_lora_plus(Both(), toy.config(target_parameters=()))
        merged = merge(base, {"w": lora["w"]}, {"w": specs["w"]})
        yield jnp.asarray(x), specs, (model, base, lora), (other, merged, {"layer": lora["layer"]})


@pytest.mark.slow
def test_the_dropout_of_layers_is_that_of_the_merged_model(both):
    x, _, *models = both
    run = lambda model, base, lora, **rngs: model.apply({**base, "lora": lora}, x, rngs=rngs)  # noqa: E731
    found, expected = (run(*model, dropout=KEY) for model in models)
    close(found, expected, 1e-9)
    assert float(jnp.abs(found - run(*models[0])).max()) > 0.1


@pytest.mark.slow
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
