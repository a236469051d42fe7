"""Cross-entropy in chunks: values and gradients against optax and float64, and what is never made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax.step.losses import chunked_cross_entropy

from ..marks import slow
from ..refusals import refusals

ROWS, LENGTH, HIDDEN, WORDS = 3, 10, 8, 23


def inputs(dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = (scale * jax.random.normal(keys[0], (ROWS, LENGTH, HIDDEN))).astype(dtype)
    kernel = jax.random.normal(keys[1], (HIDDEN, WORDS)).astype(dtype)
    labels = jax.random.randint(keys[2], (ROWS, LENGTH), 0, WORDS)
    weights = jax.random.uniform(keys[3], (ROWS, LENGTH))
    return hidden, kernel, labels, weights


def reference(hidden, kernel, labels, weights, cap=None, smoothing=0.0):
    """Losses, and the gradient of their weighted sum by the hidden states, written out in float64."""
    hidden, kernel, weights = (np.asarray(x, np.float64) for x in (hidden, kernel, weights))
    raw = hidden @ kernel
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    slope = 1.0 if cap is None else 1 - np.tanh(raw / cap) ** 2
    log_z = np.log(np.exp(logits).sum(-1))
    right = (1 - smoothing) * np.eye(WORDS)[labels] + smoothing / WORDS
    losses = log_z - (logits * right).sum(-1)
    shares = np.exp(logits - log_z[..., None])
    d_logits = shares - right
    return losses, (weights[..., None] * d_logits * slope) @ kernel.T


def value_and_gradient(hidden, kernel, labels, weights, **options):
    def total(hidden):
        losses = chunked_cross_entropy(hidden, kernel, labels, **options)
        return jnp.sum(losses * weights), losses

    (_, losses), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(hidden)
    return losses, gradient


@pytest.mark.parametrize(
    ("chunk", "cap", "smoothing"),
    [slow(7, None, 0.0), (30, 5.0, 0.2), slow(512, None, 0.1)],
)
def test_every_chunk_size_and_option_gives_the_float64_values_and_gradients(chunk, cap, smoothing):
    data, tolerance = inputs(scale=3.0 if cap or smoothing else 1.0), 2e-5 if cap or smoothing else 1e-5
    found = value_and_gradient(*data, chunk=chunk, soft_cap=cap, label_smoothing=smoothing)
    for ours, wanted in zip(found, reference(*data, cap, smoothing), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_tied_embedding_is_taken_as_it_is():
    hidden, kernel, labels, weights = inputs()
    expected = value_and_gradient(hidden, kernel, labels, weights, chunk=4)
    found = value_and_gradient(hidden, kernel.T, labels, weights, chunk=4, transposed=True)
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7,), (0, 4)])
def test_any_leading_axes(shape):
    hidden = jax.random.normal(jax.random.key(0), (*shape, HIDDEN))
    kernel, labels = inputs()[1], jnp.ones(shape, jnp.int32)
    expected = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
    found = jax.jit(functools.partial(chunked_cross_entropy, chunk=4))(hidden, kernel, labels)
    assert found.shape == shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, kernel, labels, weights = inputs(scale=300.0)
    losses, gradient = value_and_gradient(hidden, kernel, labels, weights, chunk=4)
    raw = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    top = raw.max(-1)
    expected = top + np.log(np.exp(raw - top[..., None]).sum(-1)) - (np.eye(WORDS)[labels] * raw).sum(-1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-3)
    assert np.all(np.isfinite(gradient))


@pytest.mark.slow
def test_the_kernel_gets_no_gradient():
    hidden, kernel, labels, _ = inputs()
    gradient = jax.grad(lambda kernel: chunked_cross_entropy(hidden, kernel, labels, chunk=4).sum())(kernel)
    np.testing.assert_array_equal(gradient, np.zeros_like(kernel))


@pytest.mark.slow
def test_bf16_states_give_float32_losses_and_bf16_gradients():
    hidden, kernel, labels, weights = inputs(jnp.bfloat16)
    losses, gradient = value_and_gradient(hidden, kernel.astype(jnp.float32), labels, weights, chunk=4)
    assert (losses.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    expected, d_hidden = reference(*inputs())
    np.testing.assert_allclose(losses, expected, atol=0.1)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), d_hidden, atol=0.1)


@pytest.mark.slow
def test_the_memory_of_the_compiled_gradient_does_not_grow_with_the_vocabulary_times_the_tokens():
    tokens, words = 512, 4096
    hidden = jax.ShapeDtypeStruct((4, tokens // 4, 16), jnp.float32)
    kernel = jax.ShapeDtypeStruct((16, words), jnp.float32)
    labels = jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32)

    def temporaries(chunk):
        def total(hidden, kernel, labels):
            return chunked_cross_entropy(hidden, kernel, labels, chunk=chunk).sum()

        compiled = jax.jit(jax.value_and_grad(total)).lower(hidden, kernel, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * tokens * words
    for chunk in (16, 32, 128):  # a chunk's logits and their gradient
        assert temporaries(chunk) < 2.5 * logits * chunk / tokens
    assert temporaries(tokens) > logits / 2


def losses_of(hidden, kernel, labels, **options):
    """The losses of arrays of these shapes."""
    return chunked_cross_entropy(jnp.ones(hidden), jnp.ones(kernel), jnp.ones(labels, jnp.int32), **options)


def with_option(**options):
    return losses_of((3, 10, 8), (8, 23), (3, 10), **options)


test_bad_options_and_shapes_are_named = refusals(
    (lambda: with_option(chunk=0), "chunk", 0),
    (lambda: with_option(chunk=1.5), "chunk", 1.5),
    (lambda: with_option(soft_cap=0.0), "soft_cap", 0.0),
    (lambda: with_option(soft_cap=-1.0), "soft_cap", -1.0),
    (lambda: with_option(label_smoothing=1.0), "label_smoothing", 1.0),
    (lambda: with_option(transposed=True), "(V, D)", "(3, 10, 8)", "(8, 23)", "(3, 10)"),
    (lambda: losses_of((2, 5, 8), (8, 9), (2, 4)), "(2, 5, 8)", "(8, 9)", "(2, 4)"),
    (lambda: losses_of((2, 5, 8), (7, 9), (2, 5)), "(2, 5, 8)", "(7, 9)", "(2, 5)"),
    (lambda: losses_of((8,), (8, 9), ()), "(8,)", "(8, 9)", "()"),
    (lambda: losses_of((2, 5, 8), (8,), (2, 5)), "(2, 5, 8)", "(8,)", "(2, 5)"),
)
