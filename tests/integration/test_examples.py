"""Every example runs, and does what it says."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def _main(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]()


def test_own_loop_learns_and_merges():
    before, after, same = _main("01_own_loop.py")
    assert after < 0.01 * before
    assert same < 1e-5


def test_pmap_and_mesh_agree():
    assert _main("02_many_devices.py") < 1e-6


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_is_tested(path):
    assert path.name in Path(__file__).read_text(encoding="utf-8")
