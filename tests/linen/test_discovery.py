"""Which layers a config's rules match in a model, and every way in which rules can be at odds with it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax import (
    LoRAPlusConfig,
    LoRAPlusDense,
    apply_lora_plus,
    combine,
    init_lora,
    lora_plus_adamw,
    merge,
    split_trainable,
)

from ..messages import mentions
from ..refusals import refusals
from ..zoo.linen_toys import Inside, Listed, Raw, Reversed, Setup, Stack, Standardized, Tied, Whitened
from ..zoo.properties import traced
from .models import KEY, X, config, prepared


@pytest.mark.parametrize(
    ("net", "rules", "paths"),
    [
        (Stack(), config("up", "head"), ["head", "layers/up"]),
        (Stack(), config("layers/up", "down"), ["layers/down", "layers/up"]),
        (Stack(), config(target_modules="layers/(up|down)"), ["layers/down", "layers/up"]),
        (Stack(), config(target_modules=".*p"), ["layers/up"]),
        (Stack(), config(target_modules=".*"), ["first", "head", "layers/down", "layers/up"]),
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
    lora, specs = traced(apply_lora_plus(net, rules), X)
    assert sorted(specs) == paths
    variables = {**jax.eval_shape(net.init, KEY, X), "lora": lora}
    assert combine(*split_trainable(variables, rules.modules_to_save)) == variables


@pytest.mark.slow
def test_only_the_chosen_layers_of_a_stack_are_ever_moved():
    rules = config("up", layers_to_transform=[2, 0])
    model, base, lora, specs = prepared(Stack(), rules)
    assert specs["layers/up"].layers == (2, 0)
    factors = lora["layers"]["up"]
    assert factors["lora_a"].shape == (3, 4, 2)
    np.testing.assert_array_equal(np.abs(factors["lora_a"]).sum((1, 2)) > 0, [True, False, True])
    tx = lora_plus_adamw(0.1, lr_ratio=4.0, weight_decay=0.1)

    @jax.jit
    def step(lora):
        grads = jax.grad(lambda lora: jnp.mean(model.apply({**base, "lora": lora}, X) ** 2))(lora)
        return optax.apply_updates(lora, tx.update(grads, tx.init(lora), lora)[0])

    lora = step(step(lora))
    moved = np.abs(lora["layers"]["up"]["lora_b"])
    np.testing.assert_array_equal(moved.sum((1, 2)) > 0, [True, False, True])
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


class Deep(nn.Module):
    """Numbers at two levels."""

    @nn.compact
    def __call__(self, x):
        for n in range(2):
            x = Listed(name=f"tower_{n}")(x) @ jnp.ones((2, 4))
        return x


class OnlyEncodes(nn.Module):
    backbone: nn.Module

    def __call__(self, x):
        return self.backbone.encode(x)


def start(net, *targets, x=X, method=None, **fields):
    return init_lora(apply_lora_plus(net, config(*targets, **fields)), KEY, x, method=method)


def start_encoder(*targets):
    return init_lora(OnlyEncodes(apply_lora_plus(Setup(), config(*targets))), KEY, X)


KERNEL = {"target_parameters": ["plain/kernel"]}
LINEAR_BUT_WORDS = {"target_modules": "all-linear", "exclude_modules": ["words"]}

test_rules_that_conflict_or_match_nothing_are_rejected = refusals(
    (lambda: start(Stack(), "up", exclude_modules="up"), "exclude_modules", "'up'", "[up]", "regular"),
    (lambda: start(Stack(), "up", layers_to_transform=[3]), "layers_to_transform", 3, "[0, 1, 2]"),
    (lambda: start(Listed(), "head", layers_to_transform=[0]), "'head'", "layers_to_transform"),
    (lambda: start(Stack(), "up", alpha_pattern={"upp": 1.0}), "alpha_pattern", "'upp'", "layers/up"),
    (lambda: start(Stack(), "head", modules_to_save=["head"]), "'head'", "modules_to_save"),
    (lambda: start(Raw(), target_parameters={"w": "oi", ".": "oi"}), "'w'", "'.'"),
    (lambda: start(Raw(), target_parameters={"w": "eio"}), "'w'", "(6, 4)", "'eio'"),
    (lambda: start(Raw(), target_parameters={"plain/bias": "io"}), "'plain/bias'", "(4,)", "'io'"),
    (lambda: start(Raw(), target_parameters=["w"], rank=5), "rank", 5, 4, "'w'"),
    (lambda: start(Raw(), "plain", **KERNEL), "'plain/kernel'", "target_modules", "'plain'"),
    (lambda: start(Deep(), "up", layers_to_transform=[0]), "'tower_0/layers_0/up'", "[0, 0]"),
    (lambda: start(Tied(), x=X.astype(int)[:1], **LINEAR_BUT_WORDS), "exclude_modules", "'words'"),
    (lambda: start(Reversed(), "both"), "'both'", "'io'", "'oi'"),
    (lambda: start(Setup(), "up", rank=5), "rank", 5, "'up'", "(4, 6)", 4),
    (lambda: start(Setup(), "up", "middle", method="encode"), "target_modules", "'middle'"),
    (lambda: start_encoder("up", "typo"), "target_modules", "'typo'"),
    (lambda: start_encoder("typo"), "target_modules", "'typo'"),
    error=ValueError,
)


@pytest.mark.parametrize(
    "layer", [nn.DenseGeneral(np.int64(3)), nn.DenseGeneral(3, axis=np.int64(-1)), nn.Dense(np.int32(3))]
)
def test_sizes_and_axes_may_be_whole_numbers_of_numpy(layer):
    lora, _ = init_lora(apply_lora_plus(layer, config(target_modules=".*")), KEY, X)
    assert jax.tree.map(jnp.shape, lora) == {"lora_a": (4, 2), "lora_b": (2, 3)}


NORMS = [nn.WeightNorm, nn.SpectralNorm]


@pytest.mark.parametrize("net", [Whitened, Inside])
@pytest.mark.parametrize("norm", NORMS)
def test_a_layer_in_a_norm_of_weights_is_rejected(net, norm):
    model = apply_lora_plus(net(norm), config(target_modules="all-linear"))
    message = mentions(f"nn.{norm.__name__}", "'all-linear'", "target_parameters", "exclude_modules")
    for call in (model.init, lambda *args: init_lora(model, *args)):
        with pytest.raises(ValueError, match=message):
            call(KEY, X)


def test_a_layer_beside_a_norm_is_adapted_as_any_other():
    for norm in NORMS:
        rules = config(target_modules="all-linear", exclude_modules=["up"])
        assert list(init_lora(apply_lora_plus(Whitened(norm), rules), KEY, X)[1]) == ["down"]


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


class OneWeight(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.ones, (4, 4))


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = OneWeight(name="raw")(nn.Dense(4, name="query")(x))
        x = nn.Einsum((4,), "ab,b->ab", use_bias=False, kernel_init=nn.initializers.ones, name="mean")(x)
        return nn.LayerNorm(name="norm")(x)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["qurey"], mentions("'qurey'", "'query'")),
        (["query", "nothing"], mentions("'nothing'", "query")),
        ("query/.*", mentions("'query/.*'", "'query'")),
        (["norm"], mentions("'norm'", "query")),
        (["raw"], mentions("'raw'", "OneWeight", "'w'", "target_parameters")),
        ("(query|raw)", mentions("'(query|raw)'", "'raw'", "OneWeight")),
        (["mean"], mentions("'mean'", "'ab,b->ab'")),
    ],
)
@pytest.mark.parametrize("start", ["init", "init_lora"])
def test_a_target_that_cannot_be_adapted_is_rejected(target, message, start):
    model = apply_lora_plus(Mixed(), LoRAPlusConfig(target_modules=target, rank=2))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, KEY, X) if start == "init" else init_lora(model, KEY, X)


class Unit(nn.Embed):
    """An embedding of vectors of length one."""

    def setup(self):
        super().setup()
        self.embedding = self.embedding / jnp.linalg.norm(self.embedding, axis=-1, keepdims=True)


class Dropped(nn.Embed):
    """An embedding with a submodule of its own, which reads its parameter as it stands."""

    def setup(self):
        super().setup()
        self.drop = nn.Dropout(0.1, deterministic=True)


def test_an_embedding_with_a_setup_of_its_own_is_adapted():
    model = apply_lora_plus(Dropped(7, 4), config(target_modules=".*"))
    assert list(init_lora(model, KEY, jnp.zeros((2,), jnp.int32))[1]) == [""]


def test_a_built_in_adapter_whose_layer_changes_its_weight_is_rejected():
    class Standard(Standardized, LoRAPlusDense):
        pass

    with pytest.raises(ValueError, match=mentions("Standard", "param", "apply_lora_plus")):
        Standard(4, rank=2).init(KEY, jnp.ones((2, 4)))


class Changes(nn.Module):
    """Two layers whose weights are not those in the variables."""

    @nn.compact
    def __call__(self, x):
        ids = jnp.zeros((2,), jnp.int32)
        return Standardized(4, name="up")(x) + Unit(7, 4, name="words")(ids)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (config("up"), ("'up'", "Standardized", "param")),
        (config(target_modules="all-linear"), ("'up'", "Standardized", "param")),
        (config("words"), ("'words'", "Unit", "setup")),
    ],
)
def test_a_layer_that_may_change_its_weight_is_rejected(rules, words):
    model, x = apply_lora_plus(Changes(), rules), jnp.ones((2, 4))
    for call in (model.init, lambda *args: init_lora(model, *args)):
        with pytest.raises(ValueError, match=mentions(*words, "target_parameters", "exclude_modules")):
            call(KEY, x)
