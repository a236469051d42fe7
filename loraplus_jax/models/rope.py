"""Rotary position embeddings, and their scaling beyond the context that a model was trained on."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from .config import CONFIG, Positions, Positive


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


class Angles(NamedTuple):
    """What the frequencies of a call follow from, besides their scaling.

    Attributes:
      positions: (B or 1, T).
      lengths: the tokens (B,) that a cache will hold of each row, or None without one.
      size: entries of a head that are rotated.
      theta: base of the angles.
      max_positions: the longest sequence that the config states.
    """

    positions: jax.Array
    lengths: jax.Array | None
    size: int
    theta: float
    max_positions: int

    @property
    def plain(self) -> np.ndarray:
        """The frequencies without scaling, (R / 2,)."""
        # In float64 on the host, and rounded once: an error of a frequency grows with the position.
        return self.theta ** -(np.arange(0, self.size, 2, dtype=np.float64) / self.size)


class _Scaling:
    """What the kinds of scaling share; each is named and has its options as in `rope_scaling`."""

    def frequencies(self, angles: Angles) -> Any:
        """The frequencies (R / 2,), or of each row (B or 1, R / 2)."""
        raise NotImplementedError

    def attention(self, max_positions: int) -> float:
        """Factor of cosines and sines, by which attention gets sharper."""
        return 1.0

    def max_length(self, stated: int) -> int:
        """The longest sequence, in tokens; configs of most kinds state it as extended."""
        return stated


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Linear(_Scaling):
    """Divides every position."""

    rope_type: Literal["linear"] = "linear"
    factor: Positive

    def frequencies(self, angles: Angles) -> np.ndarray:
        return angles.plain / self.factor

    def max_length(self, stated: int) -> int:
        return max(stated, int(stated * self.factor))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Llama3(_Scaling):
    """Scales long wavelengths, keeps short ones, and blends in between (arXiv 2407.21783, section 3.4.2)."""

    rope_type: Literal["llama3"] = "llama3"
    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Positions

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "high_freq_factor must be above low_freq_factor, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}"
            )

    def frequencies(self, angles: Angles) -> np.ndarray:
        turns = self.original_max_position_embeddings * angles.plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        unscaled = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - unscaled) * angles.plain / self.factor + unscaled * angles.plain


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Yarn(_Scaling):
    """NTK-by-parts interpolation and attention temperature (arXiv 2309.00071, sections 3.2 and 3.4)."""

    rope_type: Literal["yarn"] = "yarn"
    factor: Positive
    original_max_position_embeddings: Positions | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: Literal[True] = True

    def frequencies(self, angles: Angles) -> np.ndarray:
        size, plain = angles.size, angles.plain
        original = self.original_max_position_embeddings or angles.max_positions

        def dimension(turns: float) -> float:
            """The dimension that makes this many turns in the original context."""
            return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(angles.theta))

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        return ramp * plain / self.factor + (1 - ramp) * plain

    def attention(self, max_positions: int) -> float:
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1.0)) + 1.0

    def max_length(self, stated: int) -> int:
        return max(stated, int((self.original_max_position_embeddings or stated) * self.factor))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LongRope(_Scaling):
    """A divisor for each frequency, others beyond the original context (arXiv 2402.13753, section 3.2)."""

    rope_type: Literal["longrope"] = "longrope"
    short_factor: tuple[Positive, ...]
    long_factor: tuple[Positive, ...]
    original_max_position_embeddings: Annotated[Positions, Field(gt=1)]
    factor: Positive | None = None
    attention_factor: Positive | None = None

    def frequencies(self, angles: Angles) -> jax.Array:
        # Other than in transformers by the length of each row, whose keys must all be rotated alike.
        longest = jnp.max(angles.positions, axis=1) + 1 if angles.lengths is None else angles.lengths
        short, long = (
            angles.plain / np.array(divisors) for divisors in (self.short_factor, self.long_factor)
        )
        # Both lists, of which the program takes one when it knows the length.
        return jnp.where(longest[:, None] > self.original_max_position_embeddings, long, short)

    def attention(self, max_positions: int) -> float:
        original = self.original_max_position_embeddings
        factor = self.factor or max_positions / original
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return self.attention_factor or default


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Factors(_Scaling):
    """A divisor for each frequency: what a GGUF file holds of Llama 3's scaling."""

    rope_type: Literal["factors"] = "factors"
    factors: tuple[Positive, ...]

    def frequencies(self, angles: Angles) -> np.ndarray:
        return angles.plain / np.array(self.factors)


Scaling = Annotated[Linear | Llama3 | Yarn | LongRope | Factors, Field(discriminator="rope_type")]


def scaling_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of one of `Scaling` in the `rope_scaling` of a `config.json`; None for the default."""
    options = {key: value for key, value in options.items() if value is not None}
    kind = options.pop("rope_type", options.get("type", "default"))
    # Older files have the type twice, and newer ones what is no option of the scaling.
    for name in ("type", "rope_theta", "partial_rotary_factor"):
        options.pop(name, None)
    if kind == "default":
        return None
    # Its name in the first files of Phi-3.
    return {"rope_type": "longrope" if kind == "su" else kind, **options}


def make_rope(angles: Angles, scaling: Any = None) -> Rope:
    """Rotary embeddings with one of `Scaling` or without, as in transformers' `modeling_rope_utils`."""
    inverse = angles.plain if scaling is None else scaling.frequencies(angles)
    attention = 1.0 if scaling is None else scaling.attention(angles.max_positions)
    # Shared by all rows, or one per row.
    inverse = jnp.atleast_2d(jnp.asarray(inverse, jnp.float32))[:, None]
    turned = angles.positions[..., None].astype(jnp.float32) * inverse
    return Rope(jnp.cos(turned) * attention, jnp.sin(turned) * attention)
