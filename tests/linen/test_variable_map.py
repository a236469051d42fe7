"""Variables on their way into a wrapped model and back: parameters with adapters, and trees that do not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import apply_lora_plus, combine, disabled, split_trainable
from loraplus_jax.adapter.lora import scale_variables
from loraplus_jax.adapter.tree import unflatten

from ..messages import mentions
from ..refusals import refusals
from ..zoo.linen_toys import Listed, Raw, Setup
from .models import CONFIG, KEY, X, assert_equal, config, drawn, prepared, variables_of


def test_a_plain_list_means_input_then_output_and_combines_with_layers():
    _, _, lora, specs = prepared(Raw(), config("plain", target_parameters=["w"]))
    assert {path: spec.axes for path, spec in specs.items()} == {"w": "io", "plain": "io"}
    assert lora["w"]["lora_a"].shape == (6, 2)


class Deeper(nn.Module):
    """As deep as wanted, with a method of its own and a part that a call may leave out."""

    depth: int

    def setup(self):
        self.layers = [nn.Dense(4) for _ in range(self.depth)]
        self.head = nn.Dense(3)

    def encode(self, x):
        for layer in self.layers:
            x = nn.relu(layer(x))
        return x

    def __call__(self, x, whole=True):
        return self.head(self.encode(x)) if whole else self.encode(x)


@pytest.mark.slow
def test_adapters_of_a_deeper_model_are_rejected_by_every_method():
    rules = config(target_modules="all-linear")
    _, _, lora, _ = prepared(Deeper(3), rules)
    model, base, own, specs = prepared(Deeper(2), rules)
    scale = scale_variables({"zzz": specs["head"]}, 1.0)
    for variables, word in (
        ({"lora": lora}, "layers_2"),
        ({"lora": {**own, "head": {**own["head"], "lora_c": X}}}, "head/lora_c"),
        ({"lora": own, "lora_scale": scale}, "zzz"),
    ):
        with pytest.raises(ValueError, match=f"'{word}'"):
            model.apply({**base, **variables}, X, method="encode")


@pytest.mark.parametrize("where", ["head", "head/kernel"])
def test_magnitudes_of_a_config_without_them_are_rejected(where):
    rules = config(target_parameters=[where]) if "/" in where else config(where)
    model, base, lora, _ = prepared(Deeper(1), rules)
    path = f"{where}/lora_magnitude"
    with pytest.raises(ValueError, match=mentions(repr(path), "lora")):
        model.apply({**base, "lora": combine(lora, unflatten({path: jnp.ones((1, 3))}))}, X)


def test_a_call_may_leave_out_an_adapted_layer():
    model, base, lora, _ = prepared(Deeper(2), config(target_modules="all-linear"))
    variables = {**base, "lora": drawn(lora)}
    one, other = model.apply(variables, X, whole=False), model.apply(variables, X, method="encode")
    np.testing.assert_array_equal(one, other)


class Pair(nn.Module):
    """A parameter that is two arrays."""

    @nn.compact
    def __call__(self, x):
        w, b = self.param("w", lambda key: (jnp.ones((4, 4)), jnp.ones(4)))
        return x @ w + b[None]


W = config(target_parameters={"w": "oi"})


def two_layers_for_one():
    _, base, lora, _ = prepared(Listed(), config("layers_0/up", "layers_1/up"))
    return apply_lora_plus(Listed(), config("layers_1/up")).apply({**base, "lora": lora}, X)


def factors_for(rules, change):
    model, base, lora, _ = prepared(Raw(), rules)
    model.apply({**base, "lora": change(lora)}, X)


def one_layer_for_two():
    variables = variables_of(apply_lora_plus(Setup(), CONFIG))
    return apply_lora_plus(Setup(), config("up", "down")).apply(variables, X, method="encode")


test_adapters_and_rules_that_do_not_fit_each_other = pytest.mark.slow(
    refusals(
        (lambda: prepared(Pair(), config(target_parameters=["w"])), "target_parameters", "'w'", "tuple"),
        (two_layers_for_one, "'layers_0/up'", "config"),
        (one_layer_for_two, "target_modules", "'down'"),
        (lambda: factors_for(config("plain"), lambda lora: {}), "'plain'", "target_modules", "init_lora"),
        (lambda: factors_for(W, lambda lora: {}), "'w'", "target_parameters"),
        (
            lambda: factors_for(W, lambda lora: {"w": {**lora["w"], "lora_b": jnp.ones((3, 6))}}),
            *("lora_b", "'w'", "(3, 6)", "(2, 6)", "target_parameters"),
        ),
        error=ValueError,
    )
)


@pytest.mark.slow
def test_adapters_are_off_in_one_call_and_nothing_is_compiled_again():
    model, base, lora, _ = prepared(Raw(), config("plain", target_parameters={"w": "oi"}))
    apply = jax.jit(model.apply)
    on = apply({**base, "lora": drawn(lora)}, X)
    off = apply({**base, "lora": disabled(lora)}, X)
    assert apply._cache_size() == 1
    np.testing.assert_allclose(off, jax.jit(Raw().apply)(base, X), rtol=1e-6)
    assert float(jnp.abs(on - off).max()) > 0.1


class OwnLora(nn.Module):
    """Somebody's own parameter with a name of ours."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="up")(x) @ self.param("lora_a", nn.initializers.ones, (4, 4))


@pytest.mark.slow
def test_a_parameter_that_is_called_as_ours_stays_where_it_is():
    model = apply_lora_plus(OwnLora(), config("up"))
    variables = model.init(KEY, X)
    assert set(variables["params"]) == {"up", "lora_a"}
    assert set(variables["lora"]) == {"up"}
    np.testing.assert_allclose(
        model.apply(variables, X), OwnLora().apply({"params": variables["params"]}, X), rtol=1e-6
    )


def test_names_that_hold_a_slash_stay_in_trees():
    base = {"params": {"norm": {"up/kernel/scale": jnp.ones(3)}}}  # as nn.WeightNorm names them
    assert_equal(combine(*split_trainable(base)), base)


@pytest.mark.slow
def test_everything_mutable_gives_the_variables_back():
    model = apply_lora_plus(nn.jit(Raw)(), config("plain", target_parameters={"w": "oi"}))
    variables = variables_of(model)
    y, after = model.apply(variables, X, mutable=True)
    assert_equal(after, variables)
    np.testing.assert_array_equal(y, model.apply(variables, X))
