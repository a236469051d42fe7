"""LoftQ: the packed weights and their first adapters are nearer to the weights than the packed ones alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, merge
from loraplus_jax.adapter.tree import flatten
from loraplus_jax.inits.loftq import loftq
from loraplus_jax.linen import quantize_base

from ..messages import mentions
from .nets import Net

NET = Net(70, 64, 64)
IDS = jnp.arange(20).reshape(2, 10)


@pytest.fixture(scope="module")
def parts():
    base = {"params": jax.jit(NET.init)(jax.random.key(0), IDS)["params"]}
    config = LoRAPlusConfig(target_modules=["heads", "table", "fc"], rank=8, alpha=16)
    model = apply_lora_plus(NET, config)
    _, specs = init_lora(model, jax.random.key(1), IDS, base=base)
    return base, model, specs


def errors(base, packed, lora, specs):
    """Root mean squares of W - (Q + s A B), by path."""
    merged = merge(packed, lora, specs, dequantize=True)["params"]
    rms = lambda a, b: float(jnp.sqrt(jnp.mean((a - b) ** 2)))  # noqa: E731
    flat = [flatten({"params": tree}) for tree in (base["params"], merged)]
    return {module: rms(*(tree[spec.leaf] for tree in flat)) for module, spec in specs.items()}


@pytest.mark.slow
def test_the_start_is_nearer_to_the_weights(parts):
    base, model, specs = parts
    plain = quantize_base(base, "nf4", specs)
    zero = init_lora(model, jax.random.key(1), IDS)[0]
    before = errors(base, plain, zero, specs)
    packed, lora = loftq(base, "nf4", specs)
    after = errors(base, packed, lora, specs)
    assert all(after[module] < 0.95 * before[module] for module in specs)
    run = jax.jit(lambda variables: model.apply(variables, IDS))
    wide = run(base | {"lora": zero})
    off = [float(jnp.abs(run(v) - wide).mean()) for v in (packed | {"lora": lora}, plain | {"lora": zero})]
    assert 0 < off[0] < 0.9 * off[1]


@pytest.mark.slow
def test_the_start_is_the_best_approximation_of_the_rest(parts):
    """By a float64 singular value decomposition of W - Q: the error is that of the dropped values."""
    base, _, specs = parts
    packed, lora = loftq(base, "nf4", specs)
    weight = np.asarray(base["params"]["table"]["embedding"], np.float64)
    rest = weight - np.asarray(packed["params"]["table"]["embedding"].dequantize(), np.float64)
    values = np.linalg.svd(rest, compute_uv=False)
    spec = specs["table"]
    a, b = (np.asarray(lora["table"][name], np.float64) for name in spec.factors)
    error = np.linalg.norm(rest - spec.scale * a @ b)
    assert error == pytest.approx(np.linalg.norm(values[spec.rank :]), rel=1e-5)


def test_some_layers_of_a_stack_are_rejected(parts):
    base, _, specs = parts
    some = {p: dataclasses.replace(spec, layers=(0,)) if spec.stacked else spec for p, spec in specs.items()}
    with pytest.raises(ValueError, match=mentions("loftq", "all layers")):
        loftq(base, "nf4", some)


def test_a_missing_weight_is_named(parts):
    with pytest.raises(ValueError, match=mentions("params/table/embedding", "missing")):
        loftq({"params": {}}, "nf4", {"table": parts[2]["table"]})


@pytest.mark.slow
def test_layers_see_the_weights_in_the_dtype_of_the_base(parts):
    base, _, specs = parts
    table = {"params": {"table": jax.tree.map(lambda x: x.astype(jnp.bfloat16), base["params"]["table"])}}
    packed, _ = loftq(table, "nf4", {"table": specs["table"]})
    assert packed["params"]["table"]["embedding"].dtype == jnp.bfloat16
