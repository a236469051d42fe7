"""Causal attention, whole and in blocks, against float64 written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.models import attention
from loraplus_jax.models.attention import MIN_BLOCKED_LENGTH, causal_attention, masked_attention

from ..marks import slow
from ..refusals import refusals

BATCH, HEADS, KEY_HEADS, SIZE = 2, 4, 2, 8


def inputs(length, dtype=jnp.float32, key_heads=KEY_HEADS):
    rng = np.random.default_rng(length)
    shapes = [(BATCH, length, n, SIZE) for n in (HEADS, key_heads, key_heads, HEADS)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def segments_of(length):
    """Padding on the left in one row, on the right in the other, and two or three sequences."""
    index = np.arange(length)
    first = np.where(index < length // 7, 0, np.where(index < length // 2, 1, 2))
    second = np.where(index >= length - length // 5, 0, 1 + 3 * index // max(1, length))
    return jnp.asarray(np.stack([first, second]), jnp.int32)


def reference(query, key, value, upstream, segments=None, window=None, scale=SIZE**-0.5, cap=1e9):
    """Output, and the gradients of its inner product with `upstream`, head by head in float64."""
    query, key, value, upstream = (np.asarray(x, np.float64) for x in (query, key, value, upstream))
    length, groups = query.shape[1], query.shape[2] // key.shape[2]
    index = np.arange(length)
    seen = index[:, None] >= index[None]
    if window is not None:
        seen &= index[:, None] - index[None] < window
    out, d_query, d_key, d_value = (np.zeros_like(x) for x in (query, query, key, value))
    for b in range(query.shape[0]):
        mask = seen if segments is None else seen & (segments[b][:, None] == segments[b][None])
        for n in range(query.shape[2]):
            q, k, v, g = query[b, :, n], key[b, :, n // groups], value[b, :, n // groups], upstream[b, :, n]
            bounded = cap * np.tanh(scale * q @ k.T / cap)
            scores = np.where(mask, bounded, -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            shares /= shares.sum(-1, keepdims=True)
            out[b, :, n] = shares @ v
            d_shares = g @ v.T
            d_scores = shares * (d_shares - (shares * d_shares).sum(-1, keepdims=True))
            d_scores *= scale * (1 - (bounded / cap) ** 2)
            d_query[b, :, n] = d_scores @ k
            d_key[b, :, n // groups] += d_scores.T @ q
            d_value[b, :, n // groups] += shares.T @ g
    return out, d_query, d_key, d_value


def value_and_gradients(query, key, value, upstream, segments=None, **options):
    def total(query, key, value):
        out = causal_attention(query, key, value, segments, **options)
        return jnp.sum(out.astype(jnp.float32) * upstream), out

    run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, out), gradients = run(query, key, value)
    return out, *gradients


def check(found, expected, keep=None):
    for ours, wanted in zip(found, expected, strict=True):
        kept = np.ones(wanted.shape[:2], bool) if keep is None else np.asarray(keep)
        np.testing.assert_allclose(np.asarray(ours)[kept], wanted[kept], rtol=1e-5, atol=1e-5)


BOUNDED = {"window": np.array(40), "scale": 0.8, "cap": 0.7}


@pytest.mark.parametrize(
    ("implementation", "length", "with_segments", "options"),
    [
        ("blocked", 129, True, {"window": 40}),
        slow("blocked", 1, False, {}),
        slow("blocked", 127, True, {}),
        slow("blocked", 128, False, {"window": 40}),
        slow("blocked", 300, False, {"window": 1000}),
        slow("blocked", 1100, False, {"window": 300}),  # more than eight blocks
        slow("blocked", 150, False, {"key_heads": 1}),
        slow("blocked", 150, True, {"window": 40, "chunk": 48}),
        slow("blocked", 150, True, BOUNDED | {"chunk": 48}),
        slow("xla", 150, True, BOUNDED),
    ],
)
def test_values_and_gradients_equal_float64(implementation, length, with_segments, options, monkeypatch):
    options, segments = dict(options), segments_of(length) if with_segments else None
    data = inputs(length, key_heads=options.pop("key_heads", KEY_HEADS))
    if chunk := options.pop("chunk", None):
        monkeypatch.setattr(attention, "MAX_WHOLE_KEYS", 32)
        monkeypatch.setattr(attention, "KEY_CHUNK", chunk)
    expected = reference(*data, segments, **options)
    window = options.get("window")
    window = jnp.asarray(window) if isinstance(window, np.ndarray) else window  # one that is traced
    more = {"scale": options.get("scale"), "softcap": options.get("cap"), "implementation": implementation}
    # Padding is a segment too: its values are finite, mean nothing, and have gradients of their own alone.
    check(value_and_gradients(*data, segments, window=window, **more), expected)


@pytest.mark.slow
def test_memory_of_the_gradient_grows_with_the_length_and_not_with_its_square():
    def temporaries(length):
        shapes = [jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for heads in (4, 2, 2)]

        def loss(*given):
            return jnp.sum(causal_attention(*given, implementation="blocked"))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) <= 2.2 * temporaries(2048)


@pytest.mark.slow
def test_bf16_keeps_scores_in_float32():
    data = inputs(300, jnp.bfloat16)
    segments = segments_of(300)
    found = value_and_gradients(*data, segments, implementation="blocked")
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    for ours, wanted in zip(found, reference(*data, segments), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), wanted, rtol=0.05, atol=0.05)


def kept(length, implementation):
    """The shapes of what the forward pass keeps for the gradient."""
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(4)]
    shapes = [jax.ShapeDtypeStruct((BATCH, length, *x.shape[2:]), x.dtype) for x in shapes][:3]

    def residuals(*given):
        _, back = jax.vjp(functools.partial(causal_attention, implementation=implementation), *given)
        return jax.tree.leaves(back)

    return [x.shape for x in jax.eval_shape(residuals, *shapes)]


def test_nothing_that_grows_with_the_square_of_the_length_is_kept():
    length = 512
    square = length * length
    assert max(int(np.prod(shape)) for shape in kept(length, "xla")) >= square  # the test would see it
    assert max(int(np.prod(shape)) for shape in kept(length, "blocked")) < square
    assert sum(int(np.prod(shape)) for shape in kept(length, "blocked")) == pytest.approx(
        2 * sum(int(np.prod(shape)) for shape in kept(length // 2, "blocked")), rel=0.01
    )


@pytest.mark.parametrize(
    ("length", "same"), [(MIN_BLOCKED_LENGTH - 1, "xla"), (MIN_BLOCKED_LENGTH, "blocked")]
)
def test_auto_goes_by_the_length(length, same):
    def program(implementation):
        data = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length)[:3]]
        call = functools.partial(causal_attention, implementation=implementation)
        return jax.jit(call).lower(*data).as_text()

    assert program("auto") == program(same)
    assert program("xla") != program("blocked")


@pytest.mark.slow
def test_a_cache_is_seen_where_the_mask_says():
    query, key, value, upstream = inputs(6)
    mask = np.tril(np.ones((6, 6), bool))[4:]
    attend = jax.jit(masked_attention, static_argnames=("scale", "softcap"))
    found = attend(query[:, 4:], key, value, np.broadcast_to(mask, (BATCH, 2, 6)))
    np.testing.assert_allclose(found, reference(query, key, value, upstream)[0][:, 4:], atol=1e-5)
    found = attend(query, key, value, np.tri(6, dtype=bool)[None], scale=0.8, softcap=0.7)
    np.testing.assert_allclose(
        found, reference(query, key, value, upstream, scale=0.8, cap=0.7)[0], atol=1e-5
    )


def attend(query=(2, 5, 4, 8), key=(2, 5, 2, 8), value=(2, 5, 2, 8), implementation="blocked"):
    return lambda: causal_attention(*map(jnp.ones, (query, key, value)), implementation=implementation)


test_shapes_that_do_not_fit = refusals(
    (attend(implementation="flash"), "attention", "auto", "xla", "blocked", "'flash'"),
    (attend(key=(2, 5, 3, 8), value=(2, 5, 3, 8)), "query", "(2, 5, 4, 8)", "key", "(2, 5, 3, 8)"),
    (attend(value=(2, 5, 1, 8)), *("query", "(2, 5, 4, 8)", "key", "(2, 5, 2, 8)", "value", "(2, 5, 1, 8)")),
    (attend(key=(2, 4, 2, 8), value=(2, 4, 2, 8)), "query", "(2, 5, 4, 8)", "key", "(2, 4, 2, 8)"),
)
