"""What a config's rules mean on a model: parameters, layers, patterns, exclusions, and every way to be at odds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    combine,
    disabled,
    init_lora,
    lora_plus_adamw,
    merge,
    split_trainable,
)
from loraplus_jax.adapter.lora import scale_variables

from ..messages import mentions

KEY = jax.random.key(0, impl="rbg")
X = jax.random.normal(jax.random.key(1), (2, 4))


class Raw(nn.Module):
    """Weights of a user's own: output first, with a batch axis, and one in a module without a method of Flax's."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (6, 4))
        x = jnp.tanh(x @ w.T)
        x = nn.Dense(4, name="plain")(x)
        experts = self.param("experts", nn.initializers.normal(), (3, 4, 5))
        return jnp.einsum("bi,eio->beo", x, experts).sum(1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(4, name="down")(jnp.tanh(nn.Dense(6, name="up")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, name="head")(scanned(name="layers")(x, None)[0])


class Listed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(3):
            x, _ = Block(name=f"layers_{n}")(x)
        return nn.Dense(2, name="head")(x)


def config(*targets, **fields):
    return LoRAPlusConfig(**{"target_modules": targets, "rank": 2, "alpha": 3.0} | fields)


def drawn(tree, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def prepared(net, rules):
    """The model, random base and factors, and the table; factors that are zero by rule stay so."""
    model = apply_lora_plus(net, rules)
    lora, specs = init_lora(model, KEY, X)
    base = {"params": drawn(jax.eval_shape(net.init, KEY, X)["params"])}
    return model, base, lora, specs


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


def test_the_base_comes_back_as_it_was_when_parameters_are_mutable():
    model, base, lora, _ = prepared(Raw(), config(target_parameters={"w": "oi"}))
    _, state = model.apply({**base, "lora": drawn(lora)}, X, mutable=["params"])
    jax.tree.map(np.testing.assert_array_equal, state["params"], base["params"])


def test_base_parameters_start_as_without_adapters():
    rules = config("plain", target_parameters={"w": "oi", "experts": "eio"})
    found = apply_lora_plus(Raw(), rules).init(KEY, X)["params"]
    jax.tree.map(np.testing.assert_array_equal, found, Raw().init(KEY, X)["params"])


def test_scales_of_parameters_can_be_replaced():
    model, base, lora, specs = prepared(Raw(), config(target_parameters={"w": "oi"}))
    lora = drawn(lora)
    off = {**base, "lora": lora, "lora_scale": scale_variables(specs, 0.0)}
    np.testing.assert_allclose(model.apply(off, X), Raw().apply(base, X), rtol=1e-6)


# which layers


@pytest.mark.parametrize(
    ("net", "rules", "paths"),
    [
        (Stack(), config("up", "head"), ["head", "layers/up"]),
        (Stack(), config(target_modules="all-linear"), ["first", "head", "layers/down", "layers/up"]),
        (
            Stack(),
            config(target_modules="all-linear", modules_to_save=["head"], exclude_modules=["first"]),
            ["layers/down", "layers/up"],
        ),
        (Listed(), config("up", layers_to_transform=[0, 2]), ["layers_0/up", "layers_2/up"]),
        (Listed(), config("up", exclude_modules="layers_[01]/.*"), ["layers_2/up"]),
        (
            Listed(),
            config(target_modules="all-linear", layers_to_transform=1),
            ["layers_1/down", "layers_1/up"],
        ),
        (Stack(), config(target_modules="all-linear", layers_to_transform=[1]), ["layers/down", "layers/up"]),
    ],
)
def test_the_layers_that_rules_match(net, rules, paths):
    _, _, lora, specs = prepared(net, rules)
    assert sorted(specs) == paths
    trained, frozen = split_trainable({**net.init(KEY, X), "lora": lora}, rules.modules_to_save)
    assert combine(trained, frozen)["lora"] == lora


@pytest.mark.slow
def test_only_the_chosen_layers_of_a_stack_are_ever_moved():
    rules = config("up", layers_to_transform=[2, 0])
    model, base, lora, specs = prepared(Stack(), rules)
    assert specs["layers/up"].layers == (2, 0)
    factors = lora["layers"]["up"]
    assert factors["lora_a"].shape == (3, 4, 2)
    np.testing.assert_array_equal(jnp.abs(factors["lora_a"]).sum((1, 2)) > 0, [True, False, True])
    jax.tree.map(np.testing.assert_array_equal, apply_lora_plus(Stack(), rules).init(KEY, X)["lora"], lora)
    tx = lora_plus_adamw(0.1, lr_ratio=4.0, weight_decay=0.1)
    state = tx.init(lora)
    gradients = jax.jit(jax.grad(lambda lora: jnp.mean(model.apply({**base, "lora": lora}, X) ** 2)))
    for _ in range(3):
        grads = gradients(lora)
        updates, state = tx.update(grads, state, lora)
        lora = jax.tree.map(jnp.add, lora, updates)
    moved = lora["layers"]["up"]["lora_b"]
    np.testing.assert_array_equal(jnp.abs(moved).sum((1, 2)) > 0, [True, False, True])
    merged = merge(base, lora, specs)["params"]["layers"]["up"]["kernel"]
    np.testing.assert_array_equal(merged[1], base["params"]["layers"]["up"]["kernel"][1])


def test_patterns_give_ranks_and_scales_by_path():
    rules = config(
        target_modules="all-linear",
        target_parameters=(),
        rank_pattern={"layers_0/up": 1, "up": 3},
        alpha_pattern={"layers_1/.*": 8.0},
        use_rslora=True,
    )
    _, _, lora, specs = prepared(Listed(), rules)
    root = np.sqrt
    assert {path: (spec.rank, spec.scale) for path, spec in specs.items()} == {
        "layers_0/up": (1, 3.0),
        "layers_0/down": (2, 3 / root(2)),
        "layers_1/up": (3, 8 / root(3)),
        "layers_1/down": (2, 8 / root(2)),
        "layers_2/up": (3, 3 / root(3)),
        "layers_2/down": (2, 3 / root(2)),
        "head": (2, 3 / root(2)),
    }
    assert lora["layers_0"]["up"]["lora_a"].shape == (4, 1)


@pytest.mark.parametrize(
    ("net", "rules", "message"),
    [
        (
            Stack(),
            config("up", exclude_modules=["downn"]),
            mentions("exclude_modules", "'downn'", "'down'"),
        ),
        (Stack(), config("up", exclude_modules=["down"]), mentions("exclude_modules", "'down'")),
        (Stack(), config(target_modules="up"), mentions("target_modules", "'up'", "[up]", "regular")),
        (Stack(), config("up", exclude_modules="up"), mentions("exclude_modules", "'up'", "[up]", "regular")),
        (
            Stack(),
            config("up", exclude_modules=["up"]),
            mentions("'up'", "exclude_modules", "layers/up"),
        ),
        (
            Stack(),
            config("up", layers_to_transform=[3]),
            mentions("layers_to_transform", 3, "[0, 1, 2]"),
        ),
        (Listed(), config("up", layers_to_transform=[0, 7]), mentions("layers_to_transform", 7)),
        (Listed(), config("head", layers_to_transform=[0]), mentions("'head'", "layers_to_transform")),
        (Stack(), config("up", rank_pattern={"down": 1}), mentions("rank_pattern", "'down'")),
        (
            Stack(),
            config("up", alpha_pattern={"upp": 1.0}),
            mentions("alpha_pattern", "'upp'", "layers/up"),
        ),
        (
            Stack(),
            config("head", modules_to_save=["head"]),
            mentions("'head'", "modules_to_save"),
        ),
        (
            Stack(),
            config("up", modules_to_save=["layers"]),
            mentions("'layers/up'", "modules_to_save", "'layers'"),
        ),
        (Raw(), config(target_parameters=["v"]), mentions("target_parameters", "'v'", "w")),
        (Raw(), config(target_parameters={"w": "oi", ".": "oi"}), mentions("'w'", "'.'")),
        (
            Raw(),
            config(target_parameters={"w": "eio"}),
            mentions("'w'", "(6, 4)", "'eio'"),
        ),
        (
            Raw(),
            config(target_parameters={"plain/bias": "io"}),
            mentions("'plain/bias'", "(4,)", "'io'"),
        ),
        (Raw(), config(target_parameters=["w"], rank=5), mentions("rank", 5, 4, "'w'")),
        (
            Raw(),
            config("plain", target_parameters=["plain/kernel"]),
            mentions("'plain/kernel'", "target_modules", "'plain'"),
        ),
    ],
)
def test_rules_that_conflict_or_match_nothing_are_rejected(net, rules, message):
    with pytest.raises(ValueError, match=message):
        init_lora(apply_lora_plus(net, rules), KEY, X)


@pytest.mark.parametrize(
    ("rules", "change", "message"),
    [
        (config("plain"), lambda lora: {}, mentions("'plain'", "target_modules")),
        (
            config(target_parameters={"w": "oi"}),
            lambda lora: {},
            mentions("'w'", "target_parameters"),
        ),
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


def test_a_parameter_of_several_arrays_is_rejected():
    with pytest.raises(ValueError, match=mentions("target_parameters", "'w'", "tuple")):
        init_lora(apply_lora_plus(Pair(), config(target_parameters=["w"])), KEY, X)


@pytest.mark.parametrize(
    "layer", [nn.DenseGeneral(np.int64(3)), nn.DenseGeneral(3, axis=np.int64(-1)), nn.Dense(np.int32(3))]
)
def test_sizes_and_axes_may_be_whole_numbers_of_numpy(layer):
    lora, _ = init_lora(apply_lora_plus(layer, config(target_modules=".*")), KEY, X)
    assert jax.tree.map(jnp.shape, lora) == {"lora_a": (4, 2), "lora_b": (2, 3)}


# off


def test_adapters_are_off_in_one_call_and_nothing_is_compiled_again():
    model, base, lora, _ = prepared(Raw(), config("plain", target_parameters={"w": "oi"}))
    apply = jax.jit(model.apply)
    on = apply({**base, "lora": drawn(lora)}, X)
    off = apply({**base, "lora": disabled(lora)}, X)
    assert apply._cache_size() == 1
    np.testing.assert_allclose(off, jax.jit(Raw().apply)(base, X), rtol=1e-6)
    assert float(jnp.abs(on - off).max()) > 0.1


# modules of a user's own making


class OwnApply(nn.Module):
    """A submodule used through its own `.apply`: with variables of this module, and with constants."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(4, parent=None)
        params = self.param("inner", lambda key: inner.init(key, x)["params"])
        x = inner.apply({"params": params}, x)
        constant = nn.Dense(4, parent=None).apply({"params": {"kernel": jnp.eye(4), "bias": jnp.ones(4)}}, x)
        return nn.Dense(4, name="last")(constant)


def test_a_module_run_by_its_own_apply_does_not_disturb():
    model, base, lora, specs = prepared(OwnApply(), config("last"))
    assert sorted(specs) == ["last"]
    lora = drawn(lora)
    found = model.apply({**base, "lora": lora}, X)
    np.testing.assert_allclose(found, OwnApply().apply(merge(base, lora, specs), X), rtol=1e-5, atol=1e-5)


def test_a_module_run_by_its_own_apply_on_parameters_of_ours_is_adapted_by_parameter():
    model, base, lora, specs = prepared(OwnApply(), config(target_parameters=["inner/kernel"]))
    lora = drawn(lora)
    found = model.apply({**base, "lora": lora}, X)
    np.testing.assert_allclose(found, OwnApply().apply(merge(base, lora, specs), X), rtol=1e-5, atol=1e-5)


class Passed(nn.Module):
    """A submodule given from outside, and called twice."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(self.layer(x))


class Passing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Passed(nn.Dense(4, name="given"), name="user")(x)


@pytest.mark.parametrize("net", [Passed(nn.Dense(4)), Passing()], ids=["outer", "inner"])
def test_a_submodule_passed_as_an_argument_has_one_adapter(net):
    model, base, lora, specs = prepared(net, config(target_modules=".*(given|layer)"))
    assert len(specs) == 1
    lora = drawn(lora)
    found = model.apply({**base, "lora": lora}, X)
    np.testing.assert_allclose(found, net.apply(merge(base, lora, specs), X), rtol=1e-4, atol=1e-4)


class SharedScope(nn.Module):
    """A wrapper of the user's own whose inner module's parameters stand at its own level."""

    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return 2 * self.inner(x)


def test_a_wrapper_with_a_shared_scope():
    net = SharedScope(nn.Dense(4, name="fc"))
    model, base, lora, specs = prepared(net, config(target_modules=".*"))
    assert set(lora) == {"lora_a", "lora_b"}
    assert list(specs) == [""]
    lora = drawn(lora)
    found = model.apply({**base, "lora": lora}, X)
    np.testing.assert_allclose(found, net.apply(merge(base, lora, specs), X), rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    """Head and embedding share a matrix; parameters are named lazily."""

    def setup(self):
        self.words = nn.Embed(7, 4)
        self.layers = [nn.Dense(4) for _ in range(2)]
        self.norm = nn.BatchNorm(use_running_average=False)

    def __call__(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.words.attend(self.norm(x))


def test_tied_weights_lazy_names_and_batch_statistics():
    ids = jnp.array([[1, 2, 3]])
    rules = config("words", "layers_0", "layers_1", rank=2)
    model = apply_lora_plus(Tied(), rules)
    lora, specs = init_lora(model, KEY, ids)
    assert sorted(specs) == ["layers_0", "layers_1", "words"]
    variables = Tied().init(KEY, ids)
    lora = jax.tree.map(lambda x: 0.3 * x, drawn(lora))
    found, state = model.apply({**variables, "lora": lora}, ids, mutable=["batch_stats"])
    merged = merge({"params": variables["params"]}, lora, specs)
    expected, other = Tied().apply({**variables, **merged}, ids, mutable=["batch_stats"])
    np.testing.assert_allclose(
        found, expected, rtol=1e-3, atol=1e-3
    )  # three rows: the norm divides by little
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, other)


# what a review brought to light


class Unbound(nn.Module):
    """A submodule taken apart and run by its own `.apply` with its own variables, adapters among them."""

    @nn.compact
    def __call__(self, x):
        up = nn.Dense(4, name="up")
        x = up(x)
        module, variables = up.unbind()
        return module.apply(variables, x)


def test_an_adapted_module_taken_apart_keeps_its_adapter():
    model, base, lora, specs = prepared(Unbound(), config("up"))
    lora = drawn(lora)
    found = model.apply({**base, "lora": lora}, X)
    np.testing.assert_allclose(found, Unbound().apply(merge(base, lora, specs), X), rtol=1e-4, atol=1e-4)
    rules = config("up", alpha_pattern={"up": 50.0})
    with pytest.raises(ValueError, match=mentions("alpha_pattern", "Dense")):
        apply_lora_plus(Unbound(), rules).apply({**base, "lora": lora}, X)


class OwnInit(nn.Module):
    """Initializes a module inside, only to count its weights."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(4, parent=None)
        size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(inner.init, jax.random.key(0), x)))
        return nn.Dense(size, name="made")(x)


def test_a_module_initialized_inside_gets_no_factors():
    model, base, _, specs = prepared(OwnInit(), config(target_modules=".*"))
    assert base["params"]["made"]["kernel"].shape == (4, 20)
    assert list(specs) == ["made"]
    found = model.init(KEY, X)["params"]
    jax.tree.map(np.testing.assert_array_equal, found, OwnInit().init(KEY, X)["params"])


def test_adapters_that_no_rule_names_are_rejected():
    model, base, lora, _ = prepared(Listed(), config("layers_0/up", "layers_1/up"))
    other = apply_lora_plus(Listed(), config("layers_1/up"))
    with pytest.raises(ValueError, match=mentions("'layers_0/up'", "config")):
        other.apply({**base, "lora": lora}, X)
    assert model.apply({**base, "lora": lora}, X).shape == (2, 2)


def test_layers_to_transform_without_adapters_is_an_error_and_not_the_plain_model():
    for net in (Listed(), Stack()):
        model, base, _, _ = prepared(net, config("up", layers_to_transform=[1]))
        for variables in (base, {**base, "lora": {}}):
            with pytest.raises(ValueError, match=mentions("up", "init_lora")):
                model.apply(variables, X)


class Reversed(nn.Module):
    """One kernel with two equations."""

    @nn.compact
    def __call__(self, x):
        kernel = nn.Einsum((4, 4), use_bias=False, name="both")
        return kernel(x, "bi,io->bo") + kernel(x, "bi,oi->bo")


def test_a_kernel_used_from_both_sides_is_rejected_and_can_be_adapted_by_parameter():
    with pytest.raises(ValueError, match=mentions("'both'", "'io'", "'oi'")):
        init_lora(apply_lora_plus(Reversed(), config("both")), KEY, X)
    model, base, lora, specs = prepared(Reversed(), config(target_parameters=["both/kernel"]))
    lora = drawn(lora)
    found = model.apply({**base, "lora": lora}, X)
    np.testing.assert_allclose(found, Reversed().apply(merge(base, lora, specs), X), rtol=1e-4, atol=1e-4)


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


class Normed(nn.Module):
    """Flax's own WeightNorm has a parameter whose name holds a slash."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.WeightNorm(nn.Dense(4, name="up"))(x))


def test_names_that_hold_a_slash():
    model, base, lora, specs = prepared(Normed(), config("down"))
    lora = drawn(lora)
    merged = merge(base, lora, specs)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    found = model.apply({**base, "lora": lora}, X)
    np.testing.assert_allclose(found, Normed().apply(merged, X), rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, combine(*split_trainable(base)), base)


class Deep(nn.Module):
    """Numbers at two levels."""

    @nn.compact
    def __call__(self, x):
        for n in range(2):
            x = Listed(name=f"tower_{n}")(x) @ jnp.ones((2, 4))
        return x


@pytest.mark.parametrize(
    ("net", "rules", "message"),
    [
        (
            Deep(),
            config("up", layers_to_transform=[0]),
            mentions("'tower_0/layers_0/up'", "[0, 0]"),
        ),
        (
            Stack(),
            config("up", modules_to_save=["haed"]),
            mentions("modules_to_save", "'haed'", "'head'"),
        ),
        (
            Tied(),
            config(target_modules="all-linear", exclude_modules=["words"]),
            mentions("exclude_modules", "'words'"),
        ),
    ],
)
def test_more_rules_that_are_rejected(net, rules, message):
    with pytest.raises(ValueError, match=message):
        init_lora(apply_lora_plus(net, rules), KEY, jnp.array([[1, 2]]) if isinstance(net, Tied) else X)


class Whitened(nn.Module):
    """A layer in a norm of its weights, and a module that scales what it stores."""

    norm: type[nn.Module]
    arguments: dict

    @nn.compact
    def __call__(self, x):
        x = self.norm(nn.Dense(4, name="up"), name="norm")(x, **self.arguments)
        return nn.Dense(3, name="down")(x)


class Inside(nn.Module):
    """The normed layer's parameters stand below the norm."""

    norm: type[nn.Module]
    arguments: dict

    def setup(self):
        self.normed = self.norm(nn.Dense(4))

    def __call__(self, x):
        return self.normed(x, **self.arguments)


NORMS = [(nn.WeightNorm, {}), (nn.SpectralNorm, {"update_stats": False})]


@pytest.mark.parametrize("net", [Whitened, Inside])
@pytest.mark.parametrize(("norm", "arguments"), NORMS)
def test_a_layer_in_a_norm_of_weights_is_rejected(net, norm, arguments):
    model = apply_lora_plus(net(norm, arguments), config(target_modules="all-linear"))
    message = mentions(f"nn.{norm.__name__}", "'all-linear'", "target_parameters", "exclude_modules")
    for call in (model.init, lambda *args: init_lora(model, *args)):
        with pytest.raises(ValueError, match=message):
            call(KEY, X)


@pytest.mark.parametrize("net", [Whitened, Inside])
@pytest.mark.parametrize(("norm", "arguments"), NORMS)
def test_a_weight_below_a_norm_is_adapted_by_parameter(net, norm, arguments):
    plain = net(norm, arguments)
    model = apply_lora_plus(plain, config(target_parameters=[".*(up|layer_instance)/kernel"]))
    variables = plain.init(KEY, X)
    found = dict(model.init(KEY, X))
    lora, specs = init_lora(model, KEY, X)
    jax.tree.map(np.testing.assert_array_equal, found.pop("lora"), lora)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    lora = drawn(lora)
    adapted, kept = model.apply({**variables, "lora": lora}, X, mutable=True)
    np.testing.assert_allclose(adapted, plain.apply(merge(variables, lora, specs), X), rtol=1e-4, atol=1e-4)
    assert jax.tree.structure(kept) == jax.tree.structure({**variables, "lora": lora})
    assert float(jnp.abs(adapted - plain.apply(variables, X)).max()) > 0.01


def test_a_layer_beside_a_norm_is_adapted_as_any_other():
    for norm, arguments in NORMS:
        rules = config(target_modules="all-linear", exclude_modules=["up"])
        assert list(init_lora(apply_lora_plus(Whitened(norm, arguments), rules), KEY, X)[1]) == ["down"]


class Halved(nn.Module):
    """Stores half of the weight that its layer has."""

    @nn.compact
    def __call__(self, x):
        mapped = nn.map_variables(
            nn.Dense,
            "params",
            lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree),
            lambda tree: jax.tree.map(lambda leaf: leaf / 2, tree),
            init=self.is_initializing(),
            mutable=True,
        )
        return nn.Dense(3, name="last")(mapped(5, name="first")(x))


def test_a_mapping_of_the_model_s_own_acts_once():
    plain = Halved()
    model, variables, lora, specs = prepared(plain, config("last", target_parameters=["first/kernel"]))
    jax.tree.map(np.testing.assert_array_equal, model.init(KEY, X)["params"], plain.init(KEY, X)["params"])
    lora = drawn(lora)
    found = model.apply({**variables, "lora": lora}, X)
    np.testing.assert_allclose(found, plain.apply(merge(variables, lora, specs), X), rtol=1e-4, atol=1e-4)


class Numbered(nn.Module):
    """A layer as Flax names it, `Dense_0`; in a stack this is no layer's number."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(4)(x), None


class NumberedStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Numbered, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="layers")(x, None)[0]


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2)])
def test_a_number_from_flax_is_no_layer_of_a_stack(layers):
    model = apply_lora_plus(NumberedStack(), config("Dense_0", layers_to_transform=layers))
    lora, specs = init_lora(model, KEY, X)
    assert specs["layers/Dense_0"].layers == layers
    a = np.asarray(lora["layers"]["Dense_0"]["lora_a"])
    assert [n for n in range(3) if a[n].any()] == list(layers)


class Part(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Numbered(name="body_0")(x)[0]


class Whole(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Part(name="part_1")(x)


def test_numbers_of_many_segments_matter_only_where_layers_are_chosen():
    _, specs = init_lora(apply_lora_plus(Whole(), config("Dense_0")), KEY, X)
    assert list(specs) == ["part_1/body_0/Dense_0"]


def test_a_layer_left_out_stays_so_when_everything_is_mutable():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="layer_1")(Block(name="layer_0")(x)[0])[0]

    model = apply_lora_plus(Two(), config("up", layers_to_transform=[1]))
    variables = model.init(KEY, X)
    assert list(variables["lora"]) == ["layer_1"]
    _, after = model.apply(variables, X, mutable=True)
    jax.tree.map(np.testing.assert_array_equal, after, variables)


class Weight(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.lecun_normal(), (4, 4))


@pytest.mark.parametrize("inner", [nn.jit(Weight)(), Weight()], ids=["jit", "plain"])
def test_a_weight_with_an_adapter_comes_out_as_it_went_in(inner):
    model = apply_lora_plus(inner, config(target_parameters=["w"]))
    variables = model.init(KEY, X)
    variables["lora"] = drawn(variables["lora"])
    y, after = model.apply(variables, X, mutable=True)
    jax.tree.map(np.testing.assert_array_equal, after, variables)
    np.testing.assert_array_equal(y, model.apply(variables, X))
