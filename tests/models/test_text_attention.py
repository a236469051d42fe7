import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loraplus_jax.models import text_attention as attention
from loraplus_jax.models.text_attention import text_attention

from ..marks import slow

B, T, N, H = 3, 7, 2, 8
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 3, 0], [1] * 7, [0] * 7], jnp.int32)


def inputs(dtype=jnp.float32, scale=1.0):
    """Queries, keys, values and the gradient of the output."""
    values = scale * np.random.default_rng(0).normal(size=(4, B, T, N, H))
    return tuple(jnp.asarray(values, dtype))


def reference(query, key, value, segments, window=None):
    near = np.abs(np.subtract.outer(np.arange(T), np.arange(T))) <= (T if window is None else window)
    mask = (segments[:, :, None] == segments[:, None, :]) & near[None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


@functools.partial(jax.jit, static_argnums=0)
def run(attend, query, key, value, gradient, segments=SEGMENTS):
    """The output and the three gradients."""
    y, pull = jax.vjp(lambda *qkv: attend(*qkv, segments), query, key, value)
    return y, *pull(gradient)


def assert_near(result, expected, **tolerance):
    for left, right in zip(result, expected, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (left, right)), **tolerance)


@pytest.mark.parametrize("window", [slow(None), 2])
@pytest.mark.parametrize("drop", [None, slow(lambda x: x)], ids=["recomputed", "with dropout"])
def test_values_and_gradients_equal_jax(window, drop):
    ours = functools.partial(text_attention, window=window, drop=drop)
    expected = run(functools.partial(reference, window=window), *inputs())
    assert_near(run(ours, *inputs()), expected, atol=1e-5)


def test_large_scores_overflow_nowhere():
    result = run(text_attention, *inputs(scale=30.0))
    assert all(np.isfinite(x).all() for x in result)
    assert_near(result[:1], run(reference, *inputs(scale=30.0))[:1], atol=1e-3)


@pytest.mark.slow
def test_bf16_is_near_float32():
    result = run(text_attention, *inputs(jnp.bfloat16))
    assert {x.dtype.name for x in result} == {"bfloat16"}
    wide = run(text_attention, *(x.astype(jnp.float32) for x in inputs(jnp.bfloat16)))
    assert_near((x.astype(jnp.float32) for x in result), wide, atol=0.04, rtol=0.02)


def test_a_text_is_the_same_alone_and_in_a_row():
    *qkv, gradient = inputs()
    alone = [x[:1, 3:5] for x in (*qkv, gradient)]
    in_row = [x[:1, 3:5] for x in run(text_attention, *qkv, gradient)]
    assert_near(in_row, run(text_attention, *alone, SEGMENTS[:1, 3:5]), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["vmap", "scan", "remat"])
def test_it_runs_inside_transformations(transform):
    expected = run(text_attention, *inputs())
    if transform == "remat":
        result = run(jax.checkpoint(text_attention), *inputs())
    else:
        transformed = (
            jax.vmap if transform == "vmap" else lambda f: lambda *xs: jax.lax.map(lambda x: f(*x), xs)
        )
        stacked = transformed(lambda *arrays: run(text_attention, *arrays))(
            *(jnp.stack([x, 2 * x]) for x in inputs())
        )
        result = [x[0] for x in stacked]
    assert_near(result, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 2, reason="one device")
@pytest.mark.parametrize("how", ["gspmd", "shard_map"])
def test_rows_and_heads_may_be_sharded(how):
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "tensor"))
    rows, heads = PartitionSpec("data"), PartitionSpec("data", None, "tensor")
    specs = (*4 * (heads,), rows)
    step = lambda *arrays: run(text_attention, *arrays)  # noqa: E731
    if how == "gspmd":
        step = jax.jit(step, in_shardings=[NamedSharding(mesh, spec) for spec in specs])
    else:
        step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=4 * (heads,)))
    assert_near(step(*inputs(), SEGMENTS), run(text_attention, *inputs()), atol=1e-6)


def test_other_platforms_keep_jax_attention(monkeypatch):
    monkeypatch.setattr(attention, "target_platform", lambda: "tpu")
    *qkv, _ = inputs()
    names = {eqn.primitive.name for eqn in jax.make_jaxpr(text_attention)(*qkv, SEGMENTS).eqns}
    assert not any("custom_vjp" in name for name in names)
    ours, jaxs = (jax.jit(f)(*qkv, SEGMENTS) for f in (text_attention, reference))
    np.testing.assert_allclose(ours, jaxs, atol=1e-6)
