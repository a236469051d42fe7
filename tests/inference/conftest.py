"""Tiny worlds, two of them with an adapter that was never trained: what opens adapters needs no run."""

import jax
import numpy as np
import pytest

from loraplus_jax.interop.adapter_directory import save_adapter
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.training.setup import prepare

from ..integration.conftest import cache, cache_directory, first_talk, first_world, talk, world  # noqa: F401
from ..models.checkpoints.conftest import base, split  # noqa: F401
from ..models.conftest import models  # noqa: F401
from ..training.preparation import without_compiling


def with_adapter(world, directory, *overrides):  # noqa: F811
    """A copy of a world whose output directory has a random adapter."""
    world = world.copy(directory)
    with without_compiling():
        run = prepare(parse_settings(world.config, overrides))
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype("f4"), run.parts.trainable)
    notes = run.origin | {"task": run.metadata["task"]}
    settings = {name: value for name, value in run.settings.to_json().items() if name != "output_dir"}
    world.out.mkdir()
    save_adapter(
        world.out / "adapter", trained, run.parts.specs, run.settings.applied, settings=settings, **notes
    )
    return world


@pytest.fixture(scope="session")
def untrained(first_world, tmp_path_factory, cache_directory):  # noqa: F811
    """A world of texts whose output directory has a random adapter; to be read only."""
    return _untrained(first_world, tmp_path_factory, cache_directory)


@pytest.fixture(scope="session")
def untrained_talk(first_talk, tmp_path_factory, cache_directory):  # noqa: F811
    """The same with a language model, whose weights are packed."""
    return _untrained(first_talk, tmp_path_factory, cache_directory, "--model.quantize", "nf4")


def _untrained(world, tmp_path_factory, cache_directory, *overrides):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLUS_CACHE", str(cache_directory))
        return with_adapter(world, tmp_path_factory.mktemp("untrained"), *overrides)
