"""Lines of progress where no progress bar is shown."""

import io
from types import SimpleNamespace

import numpy as np

from loraplus_jax.training import console
from loraplus_jax.training.console import LineConsole, ProgressLines


def test_a_line_a_minute_with_loss_speed_and_remaining_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    file = io.StringIO()
    lines = ProgressLines(LineConsole(file=file), "step", 100, 10)
    for step in range(11, 61):
        now[0] += 4.0
        lines.update(step, loss=np.float32(0.5))
        if step == 30:
            now[0] += 1000.0  # an evaluation
            lines.restart(step)
    printed = file.getvalue().splitlines()
    assert printed[0] == "step 18 of 100: loss 0.5000, 0.25 step/s, 0:05:28 left"
    assert [line.split()[1] for line in printed] == ["18", "26", "38", "46", "54"]
    assert all("0.25 step/s" in line for line in printed)
