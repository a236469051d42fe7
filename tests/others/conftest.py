"""What the suite asks of its own code and not of others': rank promotion is allowed here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield
