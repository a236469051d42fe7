"""What the tests of Linen layers share."""

import jax
import pytest


@pytest.fixture(autouse=True)
def compile_without_optimizations():
    """Compiling takes nearly all the time of these tests, and what they compare are values."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
