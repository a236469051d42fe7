"""Every example runs, and does what it says."""

import runpy
from pathlib import Path

import pytest

# tests/others runs those that need other packages: 08_tunix.py, 09_gemma.py and 10_bonsai.py.
EXAMPLES = Path(__file__).parents[2] / "examples"


def _main(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]()


@pytest.mark.slow
def test_own_loop_learns_and_merges():
    before, after, same = _main("01_own_loop.py")
    assert after < 0.01 * before
    assert same < 1e-5


@pytest.mark.slow
def test_pmap_and_mesh_agree():
    assert _main("02_many_devices.py") < 1e-6


@pytest.mark.slow
def test_raw_parameters_learn_and_merge():
    before, after, same = _main("03_raw_parameters.py")
    assert after < 0.3 * before
    assert same < 1e-4


@pytest.mark.slow
def test_an_nnx_loop_learns_and_merges():
    before, after, difference = _main("07_nnx_loop.py")
    assert after < 0.6 * before
    assert difference < 1e-5


@pytest.mark.slow
def test_adapters_of_another_library_learn_at_two_rates():
    roles, ratio, before, after = _main("04_adapters_of_others.py")
    assert roles == ["a", "b", "a", "b"]
    assert ratio == pytest.approx(4, rel=1e-4)
    assert after < 0.1 * before


@pytest.mark.slow
def test_extras_are_trained_beside_the_adapters():
    accuracy, moved = _main("05_trained_extras.py")
    assert accuracy > 0.95
    assert moved > 0.01


@pytest.mark.slow
def test_adapters_go_into_a_plain_model_by_plain_orbax():
    before, after, difference = _main("06_restore_elsewhere.py")
    assert after < 0.2 * before
    assert difference < 1e-5


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_is_tested(path):
    assert path.name in Path(__file__).read_text(encoding="utf-8")
