"""qwix's adapters, trained by our optimizer and exported to PEFT; and our adapters on models that it quantized."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig, init_lora, lora_plus_adamw, merge
from loraplus_jax import apply_lora_plus as adapt_linen
from loraplus_jax.adapter.tree import leaf_path, leaves_by_path
from loraplus_jax.linen import from_qwix
from loraplus_jax.nnx import apply_lora_plus, base_variables, functional, lora_tree, specs_of
from loraplus_jax.nnx.quantize import from_qwix as nnx_from_qwix

from ..messages import mentions
from .harness import RATIO, Loop, assert_ratio, assert_trains_and_resumes, drawn, to_peft_and_back

qwix = pytest.importorskip("qwix")
qarray = pytest.importorskip("qwix._src.core.qarray")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

X = jax.random.normal(jax.random.key(1), (6, 16))
SCALE = 2.0
NAMES = [("{layer}", "model.{layer}")]
AXES = {"down/kernel": "ioo"}
TYPES = {"nf4": {"weight_qtype": "nf4", "tile_size": 8}, "int8": {"weight_qtype": "int8"}}


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 4), name="down")(jnp.tanh(nn.Dense(16, name="up")(x)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(16, 16, rngs=rngs), nnx.LinearGeneral(16, (2, 4), rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def linen(provider):
    model = qwix.apply_lora_to_model(LinenModel(), provider)
    params = model.init(jax.random.key(0), X)["params"]
    return params, lambda params: model.apply({"params": params}, X)


def in_nnx(provider):
    model = qwix.apply_lora_to_model(NnxModel(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params: nnx.merge(graph, params, rest)(X)


def split(params):
    """The factors by path, and a function that puts them back."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    factors = {leaf_path(path): leaf for path, leaf in leaves if "_lora_" in leaf_path(path)}

    def join(factors):
        return structure.unflatten([factors.get(leaf_path(path), leaf) for path, leaf in leaves])

    return factors, join


@pytest.mark.parametrize("make", [linen, in_nnx])
@pytest.mark.parametrize("kind", TYPES)
def test_train_resume_and_export(make, kind, tmp_path):
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=2 * SCALE, **TYPES[kind])
    params, run = make(provider)
    factors, join = split(params)
    first = drawn(factors, scale=0.25)
    tx = lora_plus_adamw(1e-3, lr_ratio=RATIO)

    @jax.jit
    def step(factors, state):
        loss, grads = jax.value_and_grad(lambda f: jnp.mean((run(join(f)) - 1) ** 2))(factors)
        updates, state = tx.update(grads, state, factors)
        return optax.apply_updates(factors, updates), state, loss

    make = functools.partial(Loop, step, first, tx.init(first))
    loop = assert_trains_and_resumes(make, tmp_path, modules=2, steps=6, below=1.0)
    trained = join(loop.factors())
    lora, specs, config = specs_of(trained, scale=SCALE, axes=AXES)
    assert {path: (spec.axes, spec.shape) for path, spec in specs.items()} == {
        "down": ("ioo", (16, 2, 4)),
        "up": ("io", (16, 16)),
    }
    loaded = to_peft_and_back(tmp_path / "peft", lora, specs, config, NAMES).lora
    # The plain model with dequantized weights and the loaded adapter merged into them.
    leaves = {path.removesuffix("/value"): leaf for path, leaf in leaves_by_path(trained).items()}
    plain = {
        name: {
            "bias": leaves[f"{name}/bias"],
            "kernel": qarray.dequantize(
                qarray.QArray(
                    *(leaves[f"{name}/kernel/array/{part}"] for part in ("qvalue", "scale")), qtype=kind
                )
            ),
        }
        for name in ("up", "down")
    }
    merged = merge({"params": plain}, loaded, specs)
    np.testing.assert_allclose(LinenModel().apply(merged, X), run(trained), rtol=0, atol=2e-5)


# Models that qwix quantized, with our adapters.

QUANTIZED = TYPES | {"int4": {"weight_qtype": jnp.int4, "tile_size": 4}, "int3": {"weight_qtype": "int3"}}
CONFIG = LoRAPlusConfig(target_modules=["up", "down"], rank=2)


def rules_of(**rule):
    return [qwix.QuantizationRule(module_path=".*", **rule)]


def provider_of(**rule):
    return qwix.PtqProvider(rules_of(**rule))


def step_and_merge(run, lora, specs, base):
    """A step moves B by RATIO times as much as A, and the merged plain model is the adapted one."""
    tx = lora_plus_adamw(1e-3, lr_ratio=RATIO)
    lora = drawn(lora, scale=0.1)
    grads = jax.grad(lambda lora: jnp.mean((run(lora) - 1) ** 2))(lora)
    updates, _ = tx.update(grads, tx.init(lora), lora)
    assert_ratio(lora, optax.apply_updates(lora, updates), 2)
    merged = merge(base, lora, specs, dequantize=True)
    np.testing.assert_allclose(LinenModel().apply(merged, X), run(lora), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_linen_model_is_adapted_with_the_same_weights(kind):
    model = qwix.quantize_model(LinenModel(), provider_of(**QUANTIZED[kind]))
    variables = model.init(jax.random.key(0), X)
    base = from_qwix(variables, rules_of(**QUANTIZED[kind]))
    for name in ("up", "down"):
        theirs = qarray.dequantize(variables["params"][name]["kernel"].array)
        np.testing.assert_array_equal(base["params"][name]["kernel"].dequantize(), theirs)
    adapted = adapt_linen(LinenModel(), CONFIG)
    lora, specs = init_lora(adapted, jax.random.key(1), X, base=base)
    run = lambda lora: adapted.apply(base | {"lora": lora}, X)  # noqa: E731
    np.testing.assert_allclose(run(lora), model.apply(variables, X), rtol=0, atol=2e-6)
    step_and_merge(run, lora, specs, base)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_nnx_model_is_adapted_with_the_same_weights(kind):
    model = qwix.quantize_model(NnxModel(nnx.Rngs(0)), provider_of(**QUANTIZED[kind]), X)
    before = model(X)
    nnx_from_qwix(model, rules_of(**QUANTIZED[kind]))
    assert not [name for _, module in nnx.iter_modules(model) for name in vars(module) if "qwix" in name]
    np.testing.assert_allclose(model(X), before, rtol=0, atol=2e-6)
    specs = apply_lora_plus(model, CONFIG, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(X), before, rtol=0, atol=2e-6)
    run = functional(model)
    lora = lora_tree(model)
    step_and_merge(
        lambda lora: run(base_variables(model) | {"lora": lora}, X), lora, specs, base_variables(model)
    )


def test_layers_that_a_scan_stacks():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(16, name="up")(x)), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return layers(name="layers")(x, None)[0]

    quantized = qwix.quantize_model(Scanned(), provider_of(**TYPES["int8"]))
    variables = quantized.init(jax.random.key(0), X)
    base = from_qwix(variables, rules_of(**TYPES["int8"]), stacked={"up/kernel": 1})
    assert base["params"]["layers"]["up"]["kernel"].stack == (3,)
    model = adapt_linen(Scanned(), LoRAPlusConfig(target_modules=["up"], rank=2))
    lora, _ = init_lora(model, jax.random.key(1), X, base=base)
    want = quantized.apply(variables, X)
    np.testing.assert_allclose(model.apply(base | {"lora": lora}, X), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"weight_qtype": "int8", "weight_calibration_method": "minmax"}, ["zero point", "int8", "kernel"]),
        ({"weight_qtype": "float8_e4m3fn"}, ["float8_e4m3fn", "nf4", "kernel"]),
    ],
)
def test_types_without_a_packed_form_are_errors(rule, words):
    variables = qwix.quantize_model(LinenModel(), provider_of(**rule)).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=mentions(*words)):
        from_qwix(variables, rules_of(**rule))
    model = qwix.quantize_model(NnxModel(nnx.Rngs(0)), provider_of(**rule), X)
    before = nnx.graphdef(model)
    with pytest.raises(ValueError, match=mentions(*words)):
        nnx_from_qwix(model, rules_of(**rule))
    assert nnx.graphdef(model) == before


def test_what_is_not_ready_for_adapters_is_named():
    provider = provider_of(**TYPES["int8"])
    linen_model, nnx_model = (
        qwix.quantize_model(LinenModel(), provider),
        qwix.quantize_model(NnxModel(nnx.Rngs(0)), provider, X),
    )
    variables = linen_model.init(jax.random.key(0), X)
    rules = rules_of(**TYPES["int8"])
    both = rules_of(**TYPES["int8"], act_qtype="int8")
    plain = LinenModel().init(jax.random.key(0), X)
    cases = [
        (
            lambda: apply_lora_plus(nnx_model, CONFIG, rngs=nnx.Rngs(1)),
            ["LinearGeneral", "kernel", "from_qwix"],
        ),
        (lambda: adapt_linen(linen_model, CONFIG), ["qwix", "from_qwix"]),
        (
            lambda: init_lora(adapt_linen(LinenModel(), CONFIG), jax.random.key(1), X, base=variables),
            ["kernel", "from_qwix"],
        ),
        (lambda: nnx_from_qwix(nnx_model, both), ["rules", "activations", "int8", "weight_qtype"]),
        (lambda: from_qwix(variables, both), ["rules", "activations", "int8", "weight_qtype"]),
        (lambda: from_qwix(variables, provider), ["rules", "QuantizationRule", "PtqProvider"]),
        (lambda: from_qwix(variables, []), ["rules", "QuantizationRule"]),
        (lambda: from_qwix(plain, rules), ["no weight", "qwix"]),
        (lambda: from_qwix(variables, rules, stacked={"layers": 1}), ["stacked", "layers"]),
    ]
    for call, words in cases:
        with pytest.raises((ValueError, TypeError), match=mentions(*words)):
            call()
