"""Activation functions by their names in Hugging Face's configs."""

from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "gelu_fast": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}
"""`gelu_new`, `gelu_pytorch_tanh` and `gelu_fast` are three ways to compute the same function."""
