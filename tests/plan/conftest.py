import pytest

from loraplus_jax.plan.plan import make_plan

from .tiny import llama


@pytest.fixture(scope="session")
def planned(tmp_path_factory):
    """A plan of a tiny Llama, and its settings."""
    settings = llama(tmp_path_factory.mktemp("model"))
    return make_plan(settings), settings
