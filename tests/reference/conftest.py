"""What these tests compare with, by the extra `interop`; `.ci/run` fails unless all three can be imported.

llama.cpp's package is compiled for so long at its installation that `.ci/run` does without its tests.
"""

import functools
import importlib.util

import pytest

PACKAGES = ("torch", "peft", "transformers")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, PACKAGES)) else ["*.py"]
collect_ignore = [] if importlib.util.find_spec("llama_cpp") else ["test_llama_cpp.py"]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A function that gives the pair of a family, made once; to be read only."""
    from .families import Pair  # without torch nothing here is collected

    return functools.cache(lambda name: Pair(name, tmp_path_factory.mktemp(name)))
