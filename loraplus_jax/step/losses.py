"""Cross-entropy over a vocabulary without storing the full logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._utils.validation import check_int, check_number


def chunked_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    *,
    transposed: bool = False,
    chunk: int = 512,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Computes every token's cross-entropy for a frozen LM head, without the full `(tokens, vocabulary)` logits.

    Makes the logits of one chunk of tokens at a time, and with them the gradient of `hidden`: the work of a plain
    loss with less memory.

    Args:
      hidden: (..., T, D), inputs of the head.
      kernel: (D, V), weight of the head, which gets no gradient.
      labels: int (..., T), in [0, V).
      transposed: whether the kernel is (V, D), like a tied embedding; this avoids a copy.
      chunk: number of tokens per chunk, over all leading axes together, but at least one per row.
      soft_cap: c, for logits `c * tanh(x / c)` (arXiv 2408.00118, section 2).
      label_smoothing: e, for targets of 1 - e at the label plus e / V everywhere (arXiv 1512.00567, section 7).

    Returns:
      float32 (..., T): `logsumexp(logits) - logits[label]`, with smoothing less the logits' mean over the targets.

    Raises:
      ValueError: shapes do not match, or an option is out of range.

    Example:
      >>> hidden, kernel = jnp.ones((1, 3, 2)), jnp.array([[0.0, 1.0], [0.0, 1.0]])
      >>> chunked_cross_entropy(hidden, kernel, jnp.array([[1, 1, 0]]), chunk=2).round(4).tolist()
      [[0.12690000236034393, 0.12690000236034393, 2.1268999576568604]]
    """
    check_int("chunk", chunk, at_least=1)
    check_number("label_smoothing", label_smoothing, at_least=0.0, below=1.0)
    if soft_cap is not None:
        check_number("soft_cap", soft_cap, above=0.0)
    inner = kernel.shape[1:] if transposed else kernel.shape[:1]
    if hidden.shape[:-1] != labels.shape or not labels.ndim or kernel.ndim != 2 or inner != hidden.shape[-1:]:
        raise ValueError(
            f"hidden, kernel and labels must be (..., T, D), {'(V, D)' if transposed else '(D, V)'} and "
            f"(..., T), got {hidden.shape}, {kernel.shape} and {labels.shape}"
        )
    # Only T is split into chunks, so that leading axes that are sharded over devices stay sharded.
    rows = labels.reshape(-1, labels.shape[-1])
    states = hidden.reshape(*rows.shape, hidden.shape[-1])
    width = max(1, chunk // max(1, len(rows)))
    options = _Options(width, "vd" if transposed else "dv", soft_cap, label_smoothing)
    losses: Any = _token_losses(states, jax.lax.stop_gradient(kernel), rows, options)
    return losses.reshape(labels.shape)


class _Options(NamedTuple):
    """Positions per chunk, the kernel's axes, and the options of logits and targets."""

    width: int
    axes: str
    soft_cap: float | None
    smoothing: float


# Autodiff would keep every chunk's logits for the backward pass, or with jax.checkpoint compute them twice. The
# kernel is frozen, so the forward pass can already multiply by it and keep only the hidden states' gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_losses(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, options: _Options) -> jax.Array:
    return _in_chunks(lambda h, y: _losses(h, kernel, y, options)[0], hidden, labels, options.width)


def _forward(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, options: _Options
) -> tuple[jax.Array, tuple]:
    def loss_and_gradient(h: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, d_logits, d_label = _losses(h, kernel, y, options)
        d_hidden = jnp.einsum(
            f"btv,{options.axes}->btd",
            d_logits.astype(h.dtype),
            kernel.astype(h.dtype),
            preferred_element_type=jnp.float32,
        )
        axis = options.axes.index("v")
        label_rows = jnp.moveaxis(jnp.take(kernel, y, axis=axis), -1 if axis == 0 else 0, -1)
        return losses, (d_hidden - d_label * label_rows).astype(h.dtype)

    losses, d_hidden = _in_chunks(loss_and_gradient, hidden, labels, options.width)
    return losses, (d_hidden, kernel)


def _backward(options: _Options, saved: tuple, gradient: jax.Array) -> tuple:
    d_hidden, kernel = saved  # tokens are independent: each has the gradient of its own loss
    return (gradient[..., None] * d_hidden).astype(d_hidden.dtype), jnp.zeros_like(kernel), None


_token_losses.defvjp(_forward, _backward)


def _losses(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, options: _Options
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The losses (B, t) of a chunk, and their gradient by the logits: (B, t, V), minus (B, t, 1) at the label.

    Two parts, since a one-hot array of the labels would be as large as the logits.
    """
    weights = kernel.astype(hidden.dtype)
    logits = jnp.einsum(f"btd,{options.axes}->btv", hidden, weights, preferred_element_type=jnp.float32)
    slope = None
    if options.soft_cap is not None:
        squashed = jnp.tanh(logits / options.soft_cap)
        logits, slope = options.soft_cap * squashed, 1.0 - squashed**2
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    at_label, elsewhere = 1.0 - options.smoothing, options.smoothing / logits.shape[-1]
    mean = at_label * label_logits
    if elsewhere:
        mean += elsewhere * jnp.sum(logits, axis=-1, keepdims=True)
    losses = (log_z - mean)[..., 0]
    d_logits = jnp.exp(logits - log_z) - elsewhere
    if slope is None:
        return losses, d_logits, jnp.full_like(label_logits, at_label)
    return losses, d_logits * slope, at_label * jnp.take_along_axis(slope, labels[..., None], axis=-1)


def _in_chunks(
    function: Callable[[jax.Array, jax.Array], Any], hidden: jax.Array, labels: jax.Array, width: int
) -> Any:
    """Applies a function of (B, t, D) and (B, t) to chunks of t = `width` positions and joins the results."""
    rows, length = labels.shape
    chunks = max(1, -(-length // width))
    # lax.map needs chunks of one width: the same number of chunks, with the least padding.
    width = max(1, -(-length // chunks))
    padding = -length % width
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)))

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(rows, -1, width, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:])[:, :length]

    if padding + length == width:
        return function(hidden, labels)
    results = jax.lax.map(lambda pair: function(*pair), (split(hidden), split(labels)))
    return jax.tree.map(join, results)
