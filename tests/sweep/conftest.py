import pytest

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.sweep.settings import SweepRun


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The smallest config file of a sweep."""
    path = tmp_path_factory.mktemp("sweep") / "config.yaml"
    path.write_text("model: {path: m}\ndata: {path: d}\noutput_dir: o\nseed: 7\n")
    return path


@pytest.fixture(scope="session")
def parsed(config):
    """Settings of a sweep, by options."""
    return lambda *overrides: parse_settings(config, overrides, SweepRun)
