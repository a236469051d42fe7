"""DoRA on its own: a worked example, its difference from LoRA, packed and sharded weights, NNX beside Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    describe,
    init_lora,
    lora_plus,
    lora_plus_adamw,
    merge,
    save_adapter,
)
from loraplus_jax import nnx as loraplus_nnx
from loraplus_jax.adapter.dora import output_scale, set_magnitudes
from loraplus_jax.adapter.tree import flatten, replace_leaves
from loraplus_jax.inits.from_weights import pissa
from loraplus_jax.interpreter.low_rank import evaluate
from loraplus_jax.interpreter.weight import LowRankWeight
from loraplus_jax.linen import quantize_base
from loraplus_jax.quantization.packed_array import is_packed
from loraplus_jax.step.sharding import adapter_shardings, base_shardings, make_mesh
from loraplus_jax.step.theory import make_theory

from ..messages import mentions
from ..zoo.linen_toys import MODELS as LINEN
from ..zoo.linen_toys import WEIGHTS, Stack
from ..zoo.nnx_toys import MODELS as NNX
from ..zoo.properties import prove

CONFIG = LoRAPlusConfig(target_modules=".*", rank=1, alpha=2.0, variant="dora")
X = jax.random.normal(jax.random.key(0), (3, 8))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="down")(nn.tanh(nn.Dense(16, name="up")(x)))


def net(**fields):
    config = LoRAPlusConfig(target_modules=("up", "down"), rank=2, **{"variant": "dora", **fields})
    model = apply_lora_plus(Net(), config)
    base = {"params": jax.jit(Net().init)(jax.random.key(1), X)["params"]}
    lora, specs = init_lora(model, jax.random.key(2), X, base=base)
    return config, model, base, lora, specs


def randomised(lora):
    random = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * random.normal(size=x.shape), x.dtype), lora)


def test_a_layer_of_two_inputs_and_two_outputs_by_hand():
    """W + 2 A B = [[3, 0], [4, 1]], whose columns have the norms 5 and 1; their magnitudes are 10 and 3."""
    model = apply_lora_plus(nn.Dense(2), CONFIG)
    base = {"params": {"kernel": jnp.array([[1.0, 0.0], [2.0, 1.0]]), "bias": jnp.array([7.0, 0.0])}}
    lora = {
        "lora_a": jnp.array([[1.0], [1.0]]),
        "lora_b": jnp.array([[1.0, 0.0]]),
        "lora_magnitude": jnp.array([[10.0, 3.0]]),
    }
    x = jnp.array([[1.0, 1.0]])
    start, specs = init_lora(model, jax.random.key(0), x, base=base)
    np.testing.assert_allclose(start["lora_magnitude"], [[5**0.5, 1.0]], rtol=1e-6)

    def outputs(lora):
        return model.apply({**base, "lora": lora}, x)[0]

    np.testing.assert_allclose(outputs(lora), [10 / 5 * 7 + 7, 3 / 1 * 1], rtol=1e-6)
    np.testing.assert_allclose(merge(base, lora, specs)["params"]["kernel"], [[6, 0], [8, 3]], rtol=1e-6)
    # y = m (3 + 4) / 5 + 7, and with the norm held fixed y = 2 (1 + 2 + 2 (a0 + a1) b) + 7.
    found = jax.grad(lambda lora: outputs(lora)[0])(lora)
    np.testing.assert_allclose(found["lora_magnitude"], [[7 / 5, 0]], rtol=1e-6)
    np.testing.assert_allclose(found["lora_a"], [[4.0], [4.0]], rtol=1e-6)
    np.testing.assert_allclose(found["lora_b"], [[8.0, 0.0]], rtol=1e-6)


@pytest.mark.slow
def test_an_output_with_zero_weights_is_adapted_as_by_lora():
    base = {"params": {"kernel": jnp.array([[1.0, 0.0], [2.0, 0.0]])}}
    dense = nn.Dense(2, use_bias=False)
    x, found = jnp.array([[1.0, 1.0]]), {}
    for variant in ("lora", "dora"):
        model = apply_lora_plus(dense, LoRAPlusConfig(target_modules=".*", rank=1, variant=variant))
        lora, _ = init_lora(model, jax.random.key(0), x, base=base)
        lora = lora | {"lora_b": jnp.ones((1, 2))}
        apply = lambda lora, model=model: model.apply({**base, "lora": lora}, x)[0, 1]  # noqa: E731
        found[variant] = jax.value_and_grad(apply)(lora)
    assert found["dora"][0] == found["lora"][0] != 0
    assert found["dora"][1]["lora_magnitude"].tolist() == [[0.0, 0.0]]
    np.testing.assert_array_equal(found["dora"][1]["lora_a"], found["lora"][1]["lora_a"])


@pytest.mark.slow
def test_with_magnitudes_that_are_the_norms_it_is_lora():
    _, model, base, lora, specs = net()
    lora = randomised(lora)
    plain_config, plain_model, *_, plain_specs = net(variant="lora")
    assert plain_config.variant == "lora"
    pairs = {path: leaf for path, leaf in flatten(lora).items() if "magnitude" not in path}
    plain = {name: {k.split("/")[1]: v for k, v in pairs.items() if name in k} for name in ("up", "down")}
    merged = merge(base, plain, plain_specs)["params"]
    norms = {
        f"{name}/lora_magnitude": np.linalg.norm(merged[name]["kernel"], axis=0, keepdims=True)
        for name in plain
    }
    same = replace_leaves(lora, norms)
    assert specs.keys() == plain_specs.keys()
    expected, apply = plain_model.apply({**base, "lora": plain}, X), jax.jit(model.apply)
    np.testing.assert_allclose(apply({**base, "lora": same}, X), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(apply({**base, "lora": lora}, X) - expected).max() > 1e-2


@pytest.mark.slow
def test_a_packed_base_gives_what_its_values_give():
    _, model, base, lora, specs = net()
    packed = quantize_base(base, "nf4", specs)
    values = jax.tree.map(lambda x: x.dequantize() if is_packed(x) else x, packed, is_leaf=is_packed)
    start = set_magnitudes(lora, packed, specs)
    for name in specs:
        kernel = values["params"][name]["kernel"]
        expected = jnp.linalg.norm(kernel, axis=0, keepdims=True)
        np.testing.assert_allclose(start[name]["lora_magnitude"], expected, rtol=1e-6)
    lora = randomised(lora)

    def loss(lora, base):
        return jnp.sum(jnp.sin(model.apply({**base, "lora": lora}, X)))

    found, expected = (jax.jit(jax.value_and_grad(loss))(lora, b) for b in (packed, values))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("contracted", ["outputs", "both"])
def test_a_parameter_whose_batch_axis_is_used_in_part_or_whole(contracted):
    """Products over either side, with a batch axis in the product or not, against the sum."""
    keys = jax.random.split(jax.random.key(0), 5)
    w, a, b = (jax.random.normal(k, s) for k, s in zip(keys, ((2, 8, 6), (2, 8, 1), (2, 1, 6)), strict=False))
    m = jax.random.uniform(keys[3], (2, 1, 6))
    weight = LowRankWeight(w, a, b, "abc", ("abr", "arc"), 1.5).with_magnitude(m)
    sizes = {"outputs": ("aec,abc->aeb", (2, 3, 6)), "both": ("ec,abc->eab", (3, 6))}
    equation, shape = sizes[contracted]
    x = jax.random.normal(keys[4], shape)
    run = lambda w, x: jnp.einsum(equation, x, w)  # noqa: E731
    (found,) = evaluate(jax.make_jaxpr(run)(w, x), [weight, x])
    total = w + 1.5 * jnp.einsum("abr,arc->abc", a, b)
    total *= m / jnp.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(found, run(total, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weight.sum(), total, rtol=1e-4, atol=1e-5)


TOYS = {
    "scan 1": LINEN["scan 1"],
    # Each expert has its own norms.
    "experts that are summed": WEIGHTS["experts that are summed"]._replace(whole=True),
    "nnx stack": NNX["stack along axis 1"],
}


@pytest.mark.slow
def test_linen_and_nnx_agree_with_each_other():
    config, model, base, lora, specs = net()
    lora = randomised(lora)

    class Twin(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 6, rngs=rngs)

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    twin = Twin(nnx.Rngs(0))
    for name, leaves in base["params"].items():
        for leaf, value in leaves.items():
            getattr(getattr(twin, name), leaf).set_value(value)
    assert loraplus_nnx.apply_lora_plus(twin, config, rngs=nnx.Rngs(1)) == specs
    start = loraplus_nnx.lora_tree(twin)
    norms = set_magnitudes(start, base, specs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), start, norms)
    loraplus_nnx.set_lora(twin, lora)
    theirs = jax.jit(jax.grad(lambda lora: jnp.sum(jnp.sin(model.apply({**base, "lora": lora}, X)))))(lora)
    ours = nnx.grad(lambda m: jnp.sum(jnp.sin(m(X))), argnums=nnx.DiffState(0, nnx.LoRAParam))
    ours = nnx.to_pure_dict(nnx.jit(ours)(twin))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_models_with_magnitudes_have_all_properties(name, tmp_path):
    """tests/linen/test_layer_table.py has each kind of layer."""
    prove(TOYS[name], tmp_path, variant="dora")


@pytest.mark.slow
def test_its_norms_are_float32_for_bfloat16_weights():
    w = jax.random.normal(jax.random.key(0), (4096, 2)).astype(jnp.bfloat16)
    a, b = jnp.ones((4096, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)
    norm = np.linalg.norm(np.asarray(w, np.float64), axis=0)
    c = output_scale(w, a, b, jnp.asarray(norm[None], jnp.float32), 1.0, "ab", ("ar", "rb"))
    assert c.dtype == jnp.float32
    np.testing.assert_allclose(c, 1, rtol=1e-6)


@pytest.mark.slow
def test_roles_and_rates():
    config, _, _, lora, specs = net()
    trainable = {"lora": lora}
    rates = {
        "default": lora_plus_adamw(1e-3, config.lr_ratio, specs=specs),
        "own": lora_plus_adamw(1e-3, config.lr_ratio, specs=specs, magnitude_learning_rate=5e-3),
        "peft": lora_plus_adamw(1e-3, config.lr_ratio, specs=specs, policy="peft"),
        "wrapped": lora_plus(optax.sgd(1e-3), config.lr_ratio, specs=specs),
    }
    found = {
        name: {r.path: r.rate for r in describe(trainable, tx, specs).rows} for name, tx in rates.items()
    }
    path = "lora/up/lora_magnitude"
    expected = {"default": 1e-3, "own": 5e-3, "peft": 4e-3, "wrapped": 1.0}
    assert {name: rows[path] for name, rows in found.items()} == pytest.approx(expected)
    assert found["own"]["lora/up/lora_a"] == pytest.approx(1e-3)
    with pytest.raises(ValueError, match=mentions("magnitude_learning_rate", "lora_plus", "peft")):
        lora_plus_adamw(1e-3, config.lr_ratio, policy="peft", magnitude_learning_rate=1e-3)


def test_magnitudes_are_sharded_as_the_outputs_are():
    *_, base, lora, specs = net()
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    rules = [(".*kernel", ("fsdp", "tensor")), (".*", ())]
    found = adapter_shardings(specs, base_shardings(mesh, base, rules))
    assert found["lora/up/lora_magnitude"].spec == jax.P(None, "tensor")
    assert {path.removeprefix("lora/") for path in found} == flatten(lora).keys()


def test_an_adapter_directory_needs_the_magnitudes(tmp_path):
    config, *_, lora, specs = net()
    lora = randomised(lora)
    pairs = {name: {k: v for k, v in leaves.items() if "magn" not in k} for name, leaves in lora.items()}
    with pytest.raises(ValueError, match=mentions("down/lora_magnitude", "absent", "(1, 6)")):
        save_adapter(tmp_path / "b", pairs, specs, config)
    with pytest.raises(ValueError, match=mentions("variant", "dora", "lora")):
        save_adapter(tmp_path / "c", lora, specs, LoRAPlusConfig(target_modules=["up", "down"], rank=2))


@pytest.mark.slow
def test_what_it_does_not_support_is_one_clear_error():
    _, model, base, _, specs = net()
    with pytest.raises(ValueError, match=mentions("dora", "base")):
        init_lora(model, jax.random.key(0), X)
    for unsupported in (
        lambda: pissa(base, specs),
        lambda: make_theory(lambda *_: ((jnp.zeros(()), 1.0), {}), specs),
    ):
        with pytest.raises(ValueError, match=mentions("dora", "lora", "kernel")):
            unsupported()
    with pytest.raises(ValueError, match=mentions("variant", "dora", "lora", "'dira'")):
        LoRAPlusConfig(target_modules=["up"], variant="dira")  # pyright: ignore[reportArgumentType]

    some = LoRAPlusConfig(target_modules=["up"], rank=2, variant="dora", layers_to_transform=[1])
    x = jnp.ones((2, 4))
    params = jax.eval_shape(Stack().init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=mentions("layers_to_transform", "dora", "layers/up")):
        init_lora(apply_lora_plus(Stack(), some), jax.random.key(0), x, base=params)
    abstract = nnx.eval_shape(lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=mentions("dora", "abstract")):
        loraplus_nnx.apply_lora_plus(abstract, CONFIG, rngs=nnx.Rngs(0))
