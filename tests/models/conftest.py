import functools

import pytest

from . import golden


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Golden file, model and parameters by name, loaded once each."""

    @functools.cache
    def get(name):
        folder = tmp_path_factory.mktemp(name)
        return golden.write_golden(name, folder), *golden.load(folder)

    return get
