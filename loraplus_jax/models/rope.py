"""Rotary position embeddings, and their scaling beyond the context that a model was trained on."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._utils.validation import suggest

Scaling = tuple[tuple[str, Any], ...]
"""A `rope_scaling` mapping as sorted pairs, so that a config can be hashed."""

_ORIGINAL = "original_max_position_embeddings"
# Required and optional options of each type.
_TYPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), (_ORIGINAL,)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        ("factor",),
        (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", _ORIGINAL), ("factor", "attention_factor")),
    "factors": (("factors",), ()),
}
_LISTS = ("factors", "short_factor", "long_factor")


class Rope(NamedTuple):
    """Cosines and sines of every token's angles, float32 (B or 1, T, R / 2), for the first R entries of a head."""

    cos: jax.Array
    sin: jax.Array


@jax.named_scope("rope")
def apply_rope(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates queries or keys (B, T, N, H) by position, first half against second (arXiv 2104.09864).

    Of the H entries of a head it rotates the first R, as many as `rope` has angles for, and keeps the others.
    """
    # In float32: bfloat16's 8 bits would blur the angles of distant positions.
    half = rope.cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = rope.cos[:, :, None], rope.sin[:, :, None]
    parts = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def parse_rope_scaling(options: Mapping[str, Any] | None) -> Scaling:
    """Checks the `rope_scaling` of a `config.json` and returns its pairs; empty for the default.

    Raises:
      ValueError: the type is unknown, or an option is missing, unknown or not positive.
    """
    options = {key: value for key, value in (options or {}).items() if value is not None}
    kind = options.pop("rope_type", options.pop("type", "default"))
    # Its name in the first files of Phi-3.
    kind = "longrope" if kind == "su" else kind
    # Older files have the type twice, and newer ones what is no option of the scaling.
    for name in ("type", "rope_theta", "partial_rotary_factor"):
        options.pop(name, None)
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(
            f"rope_scaling: the type must be one of {', '.join(_TYPES)}, got {kind!r}"
            f"{suggest(str(kind), _TYPES, fallback=False)}"
        )
    if kind == "default":
        return ()
    required, optional = _TYPES[kind]
    if missing := [name for name in required if name not in options]:
        raise ValueError(f"rope_scaling: type {kind} requires {', '.join(missing)}")
    if unknown := [name for name in options if name not in (*required, *optional)]:
        allowed = ", ".join((*required, *optional))
        raise ValueError(
            f"rope_scaling: type {kind} does not support {', '.join(unknown)}; allowed: {allowed}"
        )
    values = {name: _check_value(name, value) for name, value in options.items()}
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise ValueError(
            "rope_scaling: high_freq_factor must be above low_freq_factor, "
            f"got {values['high_freq_factor']} and {values['low_freq_factor']}"
        )
    if kind == "longrope" and (original := values["original_max_position_embeddings"]) <= 1:
        raise ValueError(f"rope_scaling: original_max_position_embeddings must be above 1, got {original}")
    return (("rope_type", kind), *sorted(values.items()))


def _check_value(name: str, value: Any) -> Any:
    if name == "truncate" and isinstance(value, bool):
        return value
    if name in _LISTS and isinstance(value, list | tuple):
        return tuple(_check_value(f"{name}[{i}]", factor) for i, factor in enumerate(value))
    if name in _LISTS:
        raise ValueError(f"rope_scaling: {name} must be a list of numbers, got {value!r:.80}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(f"rope_scaling: {name} must be a positive number below 1e9, got {value!r:.80}")
    return value


def make_rope(
    positions: jax.Array,
    *,
    size: int,
    theta: float,
    scaling: Scaling,
    max_positions: int,
    lengths: jax.Array | None = None,
) -> Rope:
    """Rotary embeddings of positions (B or 1, T) for heads of `size`, as in transformers' `modeling_rope_utils`.

    `dynamic` scales by the largest position of the call, `longrope`, other than there, by that of each row, or with
    a cache by the tokens that it will hold of the row, `lengths` (B,): all keys of a row must be rotated alike.
    """
    options = dict(scaling)
    kind = options.get("rope_type", "default")
    # In float64 on the host, and rounded once: an error of a frequency grows with the position.
    plain = theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    attention = 1.0
    if kind == "dynamic":
        inverse = _dynamic(positions, size, theta, options, max_positions)
    elif kind == "yarn":
        inverse, attention = _yarn(plain, size, theta, options, max_positions)
    elif kind == "longrope":
        inverse, attention = _longrope(positions, plain, options, max_positions, lengths)
    elif kind == "llama3":
        inverse = _llama3(plain, options)
    elif kind == "linear":
        inverse = plain / options["factor"]
    elif kind == "factors":
        inverse = plain / np.array(options["factors"], np.float64)
    else:
        inverse = plain
    # Shared by all rows, or one per row.
    inverse = jnp.atleast_2d(jnp.asarray(inverse, jnp.float32))[:, None]
    angles = positions[..., None].astype(jnp.float32) * inverse
    return Rope(jnp.cos(angles) * attention, jnp.sin(angles) * attention)


def _llama3(plain: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    """Scales long wavelengths, keeps short ones, and blends in between (arXiv 2407.21783, section 3.4.2)."""
    turns = options["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    unscaled = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - unscaled) * plain / options["factor"] + unscaled * plain


def _dynamic(
    positions: jax.Array, size: int, theta: float, options: Mapping[str, Any], max_positions: int
) -> jax.Array:
    # Part of the program, since the longest position is known only when it runs.
    longest = jnp.maximum(jnp.max(positions) + 1, max_positions).astype(jnp.float32)
    stretch = options["factor"] * longest / max_positions - (options["factor"] - 1)
    base = theta * stretch ** (size / (size - 2))
    return base ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)


def _longrope(
    positions: jax.Array,
    plain: np.ndarray,
    options: Mapping[str, Any],
    max_positions: int,
    lengths: jax.Array | None,
) -> tuple[jax.Array, float]:
    """A divisor for each frequency, others beyond the original context (arXiv 2402.13753, section 3.2)."""
    original = options["original_max_position_embeddings"]
    factor = options.get("factor", max_positions / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    longest = jnp.max(positions, axis=1, keepdims=True) + 1 if lengths is None else lengths[:, None]
    short, long = (plain / np.array(options[name]) for name in ("short_factor", "long_factor"))
    # Both lists, of which the program takes one when it knows the length.
    return jnp.where(longest > original, long, short), options.get("attention_factor", default)


def _yarn(
    plain: np.ndarray, size: int, theta: float, options: Mapping[str, Any], max_positions: int
) -> tuple[np.ndarray, float]:
    """NTK-by-parts interpolation and attention temperature (arXiv 2309.00071, sections 3.2 and 3.4)."""
    factor = options["factor"]
    original = options.get("original_max_position_embeddings", max_positions)

    def dimension(turns: float) -> float:
        """The dimension that makes this many turns in the original context."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(options.get("beta_fast", 32)), dimension(options.get("beta_slow", 1))
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    inverse = ramp * plain / factor + (1 - ramp) * plain

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if options.get("attention_factor"):
        return inverse, options["attention_factor"]
    if options.get("mscale") and options.get("mscale_all_dim"):
        return inverse, temperature(options["mscale"]) / temperature(options["mscale_all_dim"])
    return inverse, temperature(1.0)
