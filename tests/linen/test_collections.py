"""Variables on their way into a wrapped model and back: parameters with adapters, and trees that do not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import apply_lora_plus, combine, disabled, init_lora, merge, split_trainable
from loraplus_jax.adapter.lora import scale_variables

from ..messages import mentions
from ..refusals import refusals
from .models import (
    CONFIG,
    KEY,
    Listed,
    Raw,
    Scanned,
    Setup,
    Stack,
    X,
    assert_equal,
    config,
    drawn,
    prepared,
    variables_of,
)

PARAMETERS = {
    "w": ("oi", (6, 4), {"lora_a": (4, 2), "lora_b": (2, 6)}),
    "experts": ("eio", (3, 4, 5), {"lora_a": (3, 4, 2), "lora_b": (3, 2, 5)}),
    "plain/kernel": ("io", (6, 4), {"lora_a": (6, 2), "lora_b": (2, 4)}),
}


@pytest.mark.parametrize("path", PARAMETERS)
@pytest.mark.parametrize("jit", [False, True])
def test_a_parameter_is_adapted_whatever_owns_it(path, jit):
    axes, shape, factors = PARAMETERS[path]
    model, base, lora, specs = prepared(Raw(), config(target_parameters={path: axes}))
    assert list(specs) == [path]
    spec = specs[path]
    assert (spec.leaf, spec.kind, spec.axes, spec.shape) == (f"params/{path}", "parameter", axes, shape)
    tree = lora
    for segment in path.split("/"):
        tree = tree[segment]
    assert jax.tree.map(jnp.shape, tree) == factors
    apply = jax.jit(model.apply) if jit else model.apply
    np.testing.assert_allclose(apply({**base, "lora": lora}, X), Raw().apply(base, X), atol=1e-6)
    lora = drawn(lora, 5)
    found = apply({**base, "lora": lora}, X)
    np.testing.assert_allclose(found, Raw().apply(merge(base, lora, specs), X), rtol=1e-5, atol=1e-4)
    assert float(jnp.abs(found - Raw().apply(base, X)).max()) > 0.1


def test_the_delta_of_a_parameter_by_hand():
    model = apply_lora_plus(Raw(), config(target_parameters={"w": "oi"}))
    _, specs = init_lora(model, KEY, X)
    base = {"params": drawn(jax.eval_shape(Raw().init, KEY, X)["params"])}
    a, b = np.arange(8.0).reshape(4, 2), np.arange(12.0).reshape(2, 6)
    lora = {"w": {"lora_a": jnp.float32(a), "lora_b": jnp.float32(b)}}
    merged = merge(base, lora, specs)
    expected = np.float64(base["params"]["w"]) + 1.5 * (a @ b).T
    np.testing.assert_allclose(merged["params"]["w"], expected, rtol=1e-6)


def test_a_plain_list_means_input_then_output_and_combines_with_layers():
    _, _, lora, specs = prepared(Raw(), config("plain", target_parameters=["w"]))
    assert {path: spec.axes for path, spec in specs.items()} == {"w": "io", "plain": "io"}
    assert lora["w"]["lora_a"].shape == (6, 2)


def test_gradients_of_parameter_factors_are_those_of_the_merged_form():
    model, base, lora, specs = prepared(Raw(), config(target_parameters={"w": "oi", "experts": "eio"}))
    mean = lambda y: jnp.mean(jnp.sin(y))  # noqa: E731
    with jax.enable_x64(True):
        base, lora, x = jax.tree.map(lambda v: v.astype(jnp.float64), (base, drawn(lora, 5), X))
        found = jax.grad(lambda lora: mean(model.apply({**base, "lora": lora}, x)))(lora)
        expected = jax.grad(lambda lora: mean(Raw().apply(merge(base, lora, specs), x)))(lora)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


@pytest.mark.parametrize(
    ("rules", "change", "message"),
    [
        (config("plain"), lambda lora: {}, mentions("'plain'", "target_modules")),
        (config(target_parameters={"w": "oi"}), lambda lora: {}, mentions("'w'", "target_parameters")),
        (
            config(target_parameters={"w": "oi"}),
            lambda lora: {"w": {**lora["w"], "lora_b": jnp.ones((3, 6))}},
            mentions("lora_b", "'w'", "(3, 6)", "(2, 6)", "target_parameters"),
        ),
        (
            config("plain"),
            lambda lora: {"plain": {**lora["plain"], "lora_a": jnp.ones((6, 3))}},
            mentions("lora_a", "'plain'", "target_modules", "(6, 3)", "(6, 2)"),
        ),
        (
            config(target_modules="all-linear"),
            lambda lora: {**lora, "more": lora["plain"]},
            mentions("'more'", "model", "config"),
        ),
        (
            config(target_parameters={"w": "oi"}),
            lambda lora: {**lora, "v": lora["w"]},
            mentions("'v'", "model", "config"),
        ),
        (
            config("plain"),
            lambda lora: {"plain": {**lora["plain"], "lora_c": jnp.ones((4, 2))}},
            mentions("'plain/lora_c'", "lora_a", "lora_b", "lora_scale"),
        ),
    ],
)
def test_a_tree_that_changed_since_init_is_rejected(rules, change, message):
    model, base, lora, _ = prepared(Raw(), rules)
    with pytest.raises(ValueError, match=message):
        model.apply({**base, "lora": change(lora)}, X)


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


@pytest.mark.parametrize("method", [None, "encode"])
def test_adapters_of_a_deeper_model_are_rejected_by_every_method(method):
    rules = config(target_modules="all-linear")
    _, _, lora, _ = prepared(Deeper(3), rules)
    model, base, own, specs = prepared(Deeper(2), rules)
    with pytest.raises(ValueError, match="'layers_2'"):
        model.apply({**base, "lora": lora}, X, method=method)
    with pytest.raises(ValueError, match="'zzz'"):
        model.apply({**base, "lora": {**own, "zzz": own["head"]}}, X, method=method)
    with pytest.raises(ValueError, match="'head/lora_c'"):
        model.apply({**base, "lora": {**own, "head": {**own["head"], "lora_c": X}}}, X, method=method)
    scale = scale_variables({"zzz": specs["head"]}, 1.0)
    with pytest.raises(ValueError, match="'zzz'"):
        model.apply({**base, "lora": own, "lora_scale": scale}, X, method=method)


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


def two_layers_for_one():
    _, base, lora, _ = prepared(Listed(), config("layers_0/up", "layers_1/up"))
    return apply_lora_plus(Listed(), config("layers_1/up")).apply({**base, "lora": lora}, X)


def one_layer_for_two():
    variables = variables_of(apply_lora_plus(Setup(), CONFIG))
    return apply_lora_plus(Setup(), config("up", "down")).apply(variables, X, method="encode")


test_adapters_and_rules_that_do_not_fit_each_other = refusals(
    (lambda: prepared(Pair(), config(target_parameters=["w"])), "target_parameters", "'w'", "tuple"),
    (two_layers_for_one, "'layers_0/up'", "config"),
    (one_layer_for_two, "target_modules", "'down'"),
    error=ValueError,
)


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


def test_a_parameter_that_is_called_as_ours_stays_where_it_is():
    model = apply_lora_plus(OwnLora(), config("up"))
    variables = model.init(KEY, X)
    assert set(variables["params"]) == {"up", "lora_a"}
    assert set(variables["lora"]) == {"up"}
    np.testing.assert_allclose(
        model.apply(variables, X), OwnLora().apply({"params": variables["params"]}, X), rtol=1e-6
    )


@pytest.mark.parametrize("net", [Listed(), Stack()])
@pytest.mark.parametrize("layers", [None, [1]])
def test_missing_factors_are_an_error_and_not_a_plain_model(net, layers):
    base = variables_of(net)
    for variables in (base, {**base, "lora": {}}):
        with pytest.raises(ValueError, match=mentions("up", "init_lora")):
            apply_lora_plus(net, config("up", layers_to_transform=layers)).apply(variables, X)


def test_mutable_collections_work_as_in_the_inner_model():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(6, name="up")(x))

    model = apply_lora_plus(Normed(), CONFIG)
    variables = variables_of(model)
    assert variables.keys() == {"params", "lora", "batch_stats"}
    variables["lora"]["up"]["lora_b"] *= 0
    plain = {name: variables[name] for name in ("params", "batch_stats")}
    got = model.apply(variables, X, mutable=["batch_stats"])
    expected = Normed().apply(plain, X, mutable=["batch_stats"])
    assert_equal(got, expected)
    assert (got[1]["batch_stats"]["norm"]["mean"] != plain["batch_stats"]["norm"]["mean"]).all()


def test_names_that_hold_a_slash_stay_in_trees():
    base = {"params": {"norm": {"up/kernel/scale": jnp.ones(3)}}}  # as nn.WeightNorm names them
    assert_equal(combine(*split_trainable(base)), base)


@pytest.mark.parametrize(
    ("net", "rules"),
    [
        (Scanned(), CONFIG),
        (Listed(), config("up", layers_to_transform=[1])),
        (Raw(), config("plain", target_parameters={"w": "oi"})),
        (nn.jit(Raw)(), config(target_parameters={"w": "oi"})),
    ],
)
def test_everything_mutable_gives_the_variables_back(net, rules):
    model = apply_lora_plus(net, rules)
    variables = variables_of(model)
    y, after = model.apply(variables, X, mutable=True)
    assert_equal(after, variables)
    np.testing.assert_array_equal(y, model.apply(variables, X))
