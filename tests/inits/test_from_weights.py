"""Starts from weights and gradients: the model starts as the base, and the equations hold in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, load_peft, merge, save_peft
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.tree import flatten
from loraplus_jax.inits.from_weights import (
    as_difference,
    lora_ga,
    make_factors,
    olora,
    pissa,
    subtract_start,
    to_matrix,
)
from loraplus_jax.linen import quantize_base

from ..messages import mentions
from .nets import Net

NET = Net(40, 12, 16, convolution=True)
IDS = jnp.arange(6).reshape(2, 3)


CONFIG = LoRAPlusConfig(
    target_modules=["heads", "table", "conv", "fc"],
    rank=4,
    alpha=6,
    rank_pattern={"fc": 2},
    alpha_pattern={"conv": 3.0},
)


@pytest.fixture(scope="module")
def parts():
    base = {"params": jax.jit(NET.init)(jax.random.key(0), IDS)["params"]}
    model = apply_lora_plus(NET, CONFIG)
    _, specs = init_lora(model, jax.random.key(1), IDS, base=base)
    grads = jax.jit(jax.grad(lambda p: jnp.mean((NET.apply({"params": p}, IDS) - 1) ** 2)))(base["params"])
    return base, model, specs, {"params": grads}


def drawn(init):
    model = apply_lora_plus(NET, dataclasses.replace(CONFIG, init=init))
    return init_lora(model, jax.random.key(2), IDS)[0]


STARTS = {
    "pissa, random": lambda base, grads, specs: pissa(base, specs, iterations=2),
    "olora": lambda base, grads, specs: olora(base, specs),
    "lora_ga": lambda base, grads, specs: lora_ga(base, grads, specs),
    "orthogonal": lambda base, grads, specs: (base, drawn("orthogonal")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_the_model_starts_as_the_base(parts, name):
    base, model, specs, grads = parts
    before = jax.tree.map(np.asarray, base)
    rest, lora = STARTS[name](base, grads, specs)
    assert {path: x.shape for path, x in flatten(lora).items()} == {
        path: shape
        for module, spec in specs.items()
        for path, shape in zip(spec.factor_paths(module), spec.factor_shapes, strict=True)
    }
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(lora)) > 1e-3
    np.testing.assert_allclose(model.apply(rest | {"lora": lora}, IDS), NET.apply(base, IDS), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, base, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa, random", "lora_ga"])
def test_the_difference_is_an_adapter_for_the_untouched_base(parts, name, tmp_path):
    base, model, specs, grads = parts
    rest, start = STARTS[name](base, grads, specs)
    trained = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), start
    )
    lora, doubled, config = as_difference(trained, start, specs, CONFIG)
    assert {spec.rank for spec in doubled.values()} == {4, 8}
    assert all(config.rank_of(path) == spec.rank for path, spec in doubled.items())
    assert all(config.scale_of(path) == spec.scale for path, spec in doubled.items())
    expected = model.apply(rest | {"lora": trained}, IDS)
    np.testing.assert_allclose(NET.apply(merge(base, lora, doubled), IDS), expected, atol=2e-5)
    # As PEFT's files, read back.
    names = [("{layer}", "model.{layer}"), ("layers/fc", "model.layers.{n}.fc")]
    save_peft(tmp_path / "peft", lora, doubled, config, names)
    loaded = load_peft(tmp_path / "peft", doubled, names).lora
    jax.tree.map(np.testing.assert_array_equal, flatten(loaded), flatten(lora))


def test_the_equations_in_float64(parts):
    base, _, specs, grads = parts
    spec = specs["heads"]  # (12, 4, 4)
    weight = np.asarray(base["params"]["heads"]["kernel"], np.float64).reshape(12, 16)
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    best = u[:, :4] @ np.diag(s[:4]) @ v[:4]
    _, lora = pissa(base, specs)
    product = lambda lora: np.einsum("ir,rop->iop", *lora["heads"].values()).reshape(12, 16)  # noqa: E731
    np.testing.assert_allclose(spec.scale * product(lora), best, atol=1e-6)
    np.testing.assert_allclose(*(np.linalg.norm(x) for x in lora["heads"].values()), rtol=1e-5)
    _, lora = pissa(base, specs, iterations=8)
    np.testing.assert_allclose(spec.scale * product(lora), best, atol=1e-3)
    _, lora = olora(base, specs)
    q, r = np.linalg.qr(weight.T)
    np.testing.assert_allclose(product(lora), (q[:, :4] @ r[:4]).T, atol=1e-6)
    b = np.asarray(lora["heads"]["lora_b"], np.float64).reshape(4, 16)
    np.testing.assert_allclose(b @ b.T, np.eye(4), atol=1e-6)
    slope = np.asarray(grads["params"]["heads"]["kernel"], np.float64).reshape(12, 16)
    u, s, v = np.linalg.svd(slope, full_matrices=False)
    _, lora = lora_ga(base, grads, specs, gamma=9.0)
    a, b = (
        np.asarray(x, np.float64).reshape(shape)
        for x, shape in zip(lora["heads"].values(), ((12, 4), (4, 16)), strict=True)
    )
    np.testing.assert_allclose(np.abs(a.T @ u[:, :4]), 2 / 3 * np.eye(4), atol=1e-3)  # 16^(1/4) / 3
    np.testing.assert_allclose(np.abs(b @ v[4:8].T), 2 / 3 * np.eye(4), atol=1e-3)
    usual = lora_ga(base, grads, specs)[1]["heads"]["lora_a"].reshape(12, 4)
    np.testing.assert_allclose(usual, a * 3 / 4, atol=1e-5)  # gamma is 16, as PEFT's
    rest, lora = lora_ga(base, grads, specs, variant="lora_one", gamma=4.0)
    np.testing.assert_allclose(product(lora), -(u[:, :4] * s[:4]) @ v[:4] / s[0] / 4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, rest, base)


@pytest.mark.slow
def test_the_rest_of_the_base_keeps_its_dtype_and_sharding(parts):
    base, _, specs, _ = parts
    sharding = jax.NamedSharding(jax.make_mesh((4,), ("x",)), jax.P(None, "x"))
    kernel = jax.device_put(base["params"]["heads"]["kernel"].astype(jnp.bfloat16), sharding)
    one = {"heads": specs["heads"]}
    lora = make_factors("pissa", one, lambda _: kernel)
    left = subtract_start("pissa", {"params": {"heads": {"kernel": kernel}}}, lora, one)
    rest = left["params"]["heads"]["kernel"]
    assert (rest.dtype, rest.sharding) == (kernel.dtype, sharding)
    norms = [float(jnp.linalg.norm(x.astype(jnp.float32))) for x in (rest, kernel)]
    assert norms[0] < 0.9 * norms[1]


@pytest.mark.slow
def test_matrices(parts):
    _, _, specs, _ = parts
    conv, fc = specs["conv"], specs["layers/fc"]
    assert (conv.axes, fc.stacked) == ("iio", (0,))
    weight = np.arange(np.prod(conv.shape), dtype=np.float32).reshape(conv.shape)
    np.testing.assert_array_equal(to_matrix(weight, conv), weight.reshape(-1, conv.shape[-1]))
    assert to_matrix(np.zeros(fc.shape), fc).shape == (3, 16, 16)


@pytest.mark.slow
def test_bad_input(parts):
    base, _, specs, grads = parts
    one = {"heads": specs["heads"]}
    nan = {"params": grads["params"] | {"heads": {"kernel": jnp.full((12, 4, 4), jnp.nan)}}}
    zero = jax.tree.map(jnp.zeros_like, grads)
    some = LoRAPlusConfig(target_modules=["fc"], rank=2, layers_to_transform=[1])
    _, partial = init_lora(apply_lora_plus(NET, some), jax.random.key(1), IDS)
    wide = LoRAPlusConfig(target_modules=["heads"], rank=8)
    _, large = init_lora(apply_lora_plus(NET, wide), jax.random.key(1), IDS)
    odd = LoRAPlusConfig(target_modules=["heads"], rank=3, init="orthogonal")
    late = LoRAPlusConfig(target_modules=["heads"], init="pissa")
    for call, words in (
        (lambda: pissa(quantize_base(base, "nf4", one), one), ["heads", "nf4", "original"]),
        (lambda: olora({"params": {}}, one), ["heads", "missing"]),
        (lambda: pissa(nan, one), ["weights", "heads", "finite"]),
        (lambda: lora_ga({"params": {}}, grads, one), ["base", "heads", "missing"]),
        (lambda: pissa(base, one, iterations=-1), ["iterations", "-1"]),
        (lambda: pissa(base, partial), ["fc", "layers"]),
        (lambda: lora_ga(base, {"params": {}}, one), ["gradients", "heads", "none"]),
        (lambda: lora_ga(base, nan, one), ["gradients", "heads", "finite"]),
        (lambda: lora_ga(base, grads, large), ["heads", "16", "12", "rank"]),
        (lambda: lora_ga(base, zero, one, variant="lora_one"), ["gradients", "heads", "zero"]),
        (lambda: lora_ga(base, grads, one, gamma=0), ["gamma"]),
        (lambda: lora_ga(base, grads, one, variant="ga"), ["variant", "lora_one"]),
        (lambda: init_lora(apply_lora_plus(NET, odd), jax.random.key(1), IDS), ["rank", "even", "3"]),
        (lambda: init_lora(apply_lora_plus(NET, late), jax.random.key(1), IDS), ["pissa", "starts"]),
        (lambda: dataclasses.replace(odd, init_iterations=2), ["init_iterations", "orthogonal"]),
        (lambda: dataclasses.replace(late, init_iterations=-1), ["init_iterations", "-1"]),
    ):
        with pytest.raises(ValueError, match=mentions(*words)):
            call()


@pytest.mark.slow
def test_the_difference_keeps_the_scale_of_rslora():
    config = LoRAPlusConfig(
        target_modules=["q"], rank=2, alpha=6.0, use_rslora=True, alpha_pattern={"v": 3.0}
    )
    specs = {
        name: AdapterSpec(
            leaf=f"params/{name}/kernel",
            kind="dense",
            axes="io",
            shape=(6, 5),
            rank=2,
            scale=config.scale_of(name),
        )
        for name in "qv"
    }
    lora = {name: {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))} for name in specs}
    _, doubled, _ = as_difference(lora, lora, specs, config)
    assert {name: spec.scale for name, spec in doubled.items()} == pytest.approx(
        {"q": 6 / 2**0.5, "v": 3 / 2**0.5}
    )
