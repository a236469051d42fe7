"""What the suite asks of its own code and not of others': rank promotion is allowed here. keras runs on JAX."""

import os

import jax
import pytest

os.environ["KERAS_BACKEND"] = "jax"


@pytest.fixture(autouse=True)
def _rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield
