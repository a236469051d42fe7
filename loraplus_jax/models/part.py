"""The base class of the models' modules, and the check of their inputs."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .dot import dot_general


class Part(nn.Module):
    """A module with a config, and layers that have the config's initialization.

    Attributes:
      config: sizes and options.
      dtype: compute dtype; normalization, softmax, attention scores and rotations use at least float32.
      param_dtype: dtype of the parameters.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    # Not wrapped: Flax would give each call of a helper a scope of its own in the names of the program.
    @nn.nowrap
    def dense(self, features: int, name: str | None = None, *, bias: bool = True) -> nn.Dense:
        """A Dense layer."""
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(
            features, bias, self.dtype, self.param_dtype, kernel_init=init, dot_general=dot_general, name=name
        )

    @nn.nowrap
    def embed(self, rows: int, name: str | None = None) -> nn.Embed:
        """An embedding table."""
        init, width = nn.initializers.normal(self.config.initializer_range), self.config.hidden_size
        return nn.Embed(rows, width, self.dtype, self.param_dtype, embedding_init=init, name=name)

    @nn.nowrap
    def layer_norm(self, epsilon: float, name: str | None = None, *, bias: bool = True) -> nn.LayerNorm:
        """A LayerNorm that computes in float32."""
        # Not with Flax's fast variance, E[x²] - E[x]², which loses precision.
        return nn.LayerNorm(
            epsilon, self.dtype, self.param_dtype, use_bias=bias, use_fast_variance=False, name=name
        )

    @nn.nowrap
    def drop(self, x: jax.Array, rate: float) -> jax.Array:
        """Applies dropout if a `dropout` rng is given."""
        return nn.Dropout(rate, deterministic=not self.has_rng("dropout"))(x)


def check_inputs(input_ids: jax.Array, **others: jax.Array | None) -> None:
    """Raises ValueError unless ids are (batch, tokens), and other arrays, if given, have their shape."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, tokens), got {input_ids.shape}")
    for name, array in others.items():
        if array is not None and array.shape != input_ids.shape:
            raise ValueError(f"{name} must have the shape of input_ids, {input_ids.shape}, got {array.shape}")
