"""Preparation of a run without compiling, for what does not look at programs."""

import contextlib

import pytest

from loraplus_jax.training import setup


@contextlib.contextmanager
def without_compiling():
    """Leaves out step and evaluation, which take most of the time of a preparation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "compile_programs", lambda *_: setup.Programs(None, None))
        patch.setattr(setup, "check_memory", lambda *_: None)
        yield
