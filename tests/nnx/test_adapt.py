"""apply_lora_plus on NNX models: the base untouched, the adapters equal to merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.nnx import apply_lora_plus, base_variables, lora_tree, set_lora

from ..marks import slow
from ..messages import mentions
from ..refusals import refusals
from ..zoo.nnx_toys import ATTENTION, LINEAR, MODELS, Bare, One, Stack, X
from ..zoo.properties import prove
from .models import build, randomise


@pytest.mark.slow
def test_the_base_keeps_its_paths_class_and_checkpoints():
    plain = ATTENTION.make(nnx.Rngs(0))
    model = build(ATTENTION)
    base = nnx.state(model, nnx.Not(nnx.LoRAParam))
    assert [p for p, _ in nnx.to_flat_state(base)] == [p for p, _ in nnx.to_flat_state(nnx.state(plain))]
    randomise(model)
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(plain)))  # a checkpoint made without adapters
    kernel = plain.layer.query.kernel[...]
    np.testing.assert_array_equal(model.layer.query.kernel[...], kernel + 1)
    assert base_variables(model)["params"]["layer"]["query"]["kernel"].shape == kernel.shape


QUICK = ("under nnx.jit", "checkpoint, loop and branch", "a list")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in MODELS])
def test_any_model(name, tmp_path):
    prove(MODELS[name], tmp_path)


@pytest.mark.slow
def test_layers_to_transform_within_a_stack():
    model = Stack(nnx.Rngs(0))
    fields = {"rank": 2, "init": "orthogonal"}  # in which neither factor is zero
    config = LoRAPlusConfig(target_modules=["up"], layers_to_transform=[1], **fields)
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    assert specs["blocks/up"].layers == (1,)
    for factor in lora_tree(model)["blocks"]["up"].values():
        assert [bool(np.any(layer)) for layer in factor] == [False, True, False]
    whole = Stack(nnx.Rngs(0))
    apply_lora_plus(whole, LoRAPlusConfig(target_modules=["up"], **fields), rngs=nnx.Rngs(1))
    first, second, _ = np.asarray(lora_tree(whole)["blocks"]["up"]["lora_a"])
    assert not np.array_equal(first, second)  # a draw for every layer


@pytest.mark.slow
def test_factors_of_a_bfloat16_base_are_float32_and_its_mesh_axes_are_carried():
    metadata = {"kernel_metadata": {"out_sharding": ("fsdp", "tensor")}}
    with jax.set_mesh(jax.make_mesh((1, 1), ("fsdp", "tensor"))):
        model = One(nnx.Linear(8, 6, param_dtype=jnp.bfloat16, **metadata, rngs=nnx.Rngs(0)))
        apply_lora_plus(model, LINEAR.config(), rngs=nnx.Rngs(1))
    assert model.layer.lora_a.get_value().dtype == jnp.float32
    names = [model.layer.lora_a.get_metadata(), model.layer.lora_b.get_metadata()]
    found = [
        next(tuple(m[k]) for k in ("out_sharding", "sharding_names", "sharding") if m.get(k)) for m in names
    ]
    assert found == [("fsdp", None), (None, "tensor")]


def test_an_abstract_model_gets_adapters():
    model = nnx.eval_shape(lambda: One(nnx.Linear(8, 6, rngs=nnx.Rngs(0))))
    rules = LoRAPlusConfig(target_modules=["layer"], rank=2)
    specs = apply_lora_plus(model, rules, rngs=nnx.Rngs(1), check=(jnp.ones((2, 8)),))
    assert specs["layer"].shape == (8, 6)
    assert lora_tree(model)["layer"]["lora_a"].shape == (8, 2)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.emb, self.head = nnx.Embed(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.head.kernel = self.emb.embedding


class Mixed(nnx.Module):
    """A layer and a parameter in each of three stacked modules."""

    def __init__(self, rngs):
        self.fc, self.w = nnx.Linear(8, 8, rngs=rngs), nnx.Param(jax.random.normal(rngs.params(), (8, 8)))

    def __call__(self, x):
        return jnp.tanh(self.fc(x) @ self.w[...])


@pytest.mark.slow
def test_dropout_is_made_for_layers_alone():
    stack = nnx.split_rngs(splits=3)(nnx.vmap(Mixed, in_axes=(0,), out_axes=0))(nnx.Rngs(0))
    config = LoRAPlusConfig(target_modules=["fc"], target_parameters={"w": "bio"}, rank=1, dropout=0.5)
    apply_lora_plus(stack, config, rngs=nnx.Rngs(1))
    run = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    assert run(stack, X).shape == X.shape


@pytest.mark.slow
def test_dropout_in_a_stack_of_stacks_has_a_key_for_each_layer():
    make = lambda rngs: nnx.Linear(8, 8, rngs=rngs)  # noqa: E731
    for size in (2, 3):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make, in_axes=(0,), out_axes=0))
    stack = make(nnx.Rngs(0))
    apply_lora_plus(stack, LoRAPlusConfig(target_modules=".*", rank=1, dropout=0.5), rngs=nnx.Rngs(1))
    keys = [v for path, v in nnx.to_flat_state(nnx.state(stack, nnx.RngKey)) if "key" in path]
    assert {key.shape for key in keys} == {(3, 2)}


@pytest.mark.slow
def test_a_stacked_axis_may_be_negative():
    make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(4, 8, rngs=rngs), out_axes=-1))
    stack = nnx.eval_shape(lambda: nnx.Dict(fc=make(nnx.Rngs(0))))
    specs = apply_lora_plus(
        stack, LoRAPlusConfig(target_modules=["fc"], rank=1), rngs=nnx.Rngs(1), stacked={"fc": (-1,)}
    )
    assert (specs["fc"].shape, specs["fc"].stacked) == ((4, 8, 3), (-1,))


class Homemade(nnx.Linear):
    """A user's own LoRA layer."""

    def __init__(self, *sizes, rngs):
        super().__init__(*sizes, rngs=rngs)
        self.lora_a, self.lora_b = nnx.Param(jnp.ones((8, 1))), nnx.Param(jnp.ones((1, 6)))


LAYER = {"target_modules": ["layer"], "rank": 1}
DROPS = LAYER | {"dropout": 0.1}


def integers(rngs):
    return One(nnx.Linear(8, 6, param_dtype=jnp.int8, kernel_init=nnx.initializers.ones, rngs=rngs))


def dense(rngs):
    return One(nnx.Linear(8, 6, rngs=rngs))


@pytest.mark.parametrize(
    ("make", "fields", "options", "words"),
    [
        (dense, {"target_modules": ["layr"]}, {}, ("layr", "layer")),
        (dense, LAYER | {"rank": 7}, {}, ("rank", 6, "layer")),
        (lambda r: One(nnx.Einsum("bd,bd->b", (2, 8), rngs=r)), LAYER, {}, ("layer", "bd,bd->b")),
        (Tied, {"target_modules": ["head"]}, {}, ("emb/embedding", "head/kernel")),
        (lambda r: One(Bare(r)), LAYER, {}, ("layer", "Bare", "wq", "target_parameters")),
        (lambda r: One(Bare(r)), {"target_parameters": {".*wq": "ioo"}}, {}, ("layer/wq", "ioo", 2)),
        (lambda r: One(Homemade(8, 6, rngs=r)), LAYER, {}, ("Homemade", "'lora_a'", "exclude_modules")),
        (
            lambda r: One(nnx.LoRALinear(8, 6, lora_rank=2, rngs=r)),
            LAYER,
            {},
            ("'layer/lora/lora_a'", "specs_of"),
        ),
        (integers, LAYER, {}, ("kernel", "'layer'", "int8", "quantize_base")),
        (
            integers,
            {"target_parameters": {".*kernel": "io"}},
            {},
            ("'layer/kernel'", "int8", "quantize_base"),
        ),
        (dense, DROPS, {"rngs": nnx.Rngs(params=1)}, ("rngs", "'dropout'", "params")),
        (dense, DROPS, {"rngs": jax.random.key(0)}, ("rngs", "Rngs")),
        (dense, LAYER, {"stacked": {"layer": 0}}, ("stacked", "(0,)", "layer")),
        (dense, LAYER, {"stacked": {"layer": (0,)}}, ("stacked", "(8, 6)", "(6,)")),
    ],
)
def test_what_cannot_be_adapted_is_named_and_the_model_stays_as_it_is(make, fields, options, words):
    model = make(nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises((ValueError, TypeError), match=mentions(*words)):
        apply_lora_plus(model, LoRAPlusConfig(**{"rank": 2} | fields), **{"rngs": nnx.Rngs(1)} | options)
    assert nnx.graphdef(model) == before


@pytest.fixture(scope="module")
def linear():
    return build(LINEAR)


PAIR = {"lora_a": np.ones((8, 2)), "lora_b": np.ones((2, 6))}

test_a_second_adapter_and_factors_that_do_not_fit = refusals(
    (lambda linear: apply_lora_plus(linear, LINEAR.config(), rngs=nnx.Rngs(1)), "layer"),
    (lambda linear: set_lora(linear, {}), "layer"),
    (lambda linear: set_lora(linear, {"layer": {"lora_b": PAIR["lora_b"]}}), "layer"),
    (lambda linear: set_lora(linear, {"layer": PAIR | {"lora_c": PAIR["lora_a"]}}), "lora_c"),
    error=ValueError,
)
