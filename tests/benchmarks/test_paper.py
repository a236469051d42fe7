"""The paper's experiments at a reduced size, against what theory gives."""

import numpy as np
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 3])
def test_coordinate_check(number):
    import paper as experiment

    setting, widths = experiment.SETTINGS[number], (256, 4096)
    values = experiment.measure_terms(setting, widths, seeds=2)
    for name, expected in zip(experiment.SHOWN, setting.slopes, strict=True):
        assert experiment.slope(widths, values[name]) == pytest.approx(expected, abs=0.2), name


@pytest.mark.slow
def test_figure_2():
    """A part of the grid for one draw of the model in which rates matter much."""
    import paper as experiment

    rates = experiment.GRID[4:14]
    losses = experiment.grid(rates, (10,), worlds=2, seeds=2, points=200)[10]["train"]
    found = [experiment.optimum(one, rates) for one in losses]
    assert all(1e-3 < one["equal rates"] < 0.1 for one in found)
    assert max(one["eta_B"] / one["eta_A"] for one in found) > 4
    assert max(one["gap"] for one in found) > 0.3


def test_an_optimum_off_the_diagonal_by_hand():
    import paper as experiment

    losses = np.array([[4.0, 2.0, np.inf], [9.0, 3.0, 9.0], [9.0, 9.0, np.inf]])
    best = {"eta_A": 0.1, "eta_B": 1.0, "loss": 2.0, "equal rates": 1.0, "their loss": 3.0, "gap": 0.5}
    assert experiment.optimum(losses, (0.1, 1.0, 10.0)) == best
