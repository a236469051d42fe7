import jax
import jax.numpy as jnp
import pytest

from loraplus_jax.models.llama.model import Llama

from .tiny import CONFIG


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG)


@pytest.fixture(scope="module")
def variables(model):
    return jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
