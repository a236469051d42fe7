"""What a whole sweep takes, counted, against sixteen single runs; its halving, and how often it finds nothing."""

from pathlib import Path

import numpy as np

from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.sweep.settings import SweepRun


def test_the_whole_answer_takes_less_than_half_of_sixteen_single_runs():
    from sweep import CONFIG, SIXTEEN, single_count, sweep_count

    run = parse_settings(CONFIG, SIXTEEN, SweepRun)
    batches = {"validation": 10, "test": 19}
    single = single_count(run, 300, batches)
    # Six evaluations while training, the test split twice.
    assert single == (300, 6 * 10 + 2 * 19)
    # 16 settings to step 38, two of LoRA+ to the end; LoRA and LoRA+ on two seeds, at eight steps.
    found = sweep_count(run, 300, 4, batches)
    assert found == (16 * 38 + 2 * 262 + 4 * 300, (16 + 2) * 10 + 4 * 8 * 19)
    assert found[0] < 0.49 * 16 * single[0]
    assert found[1] < 0.52 * 16 * single[1]


def test_the_page_has_what_the_quickstarts_sweep_costs(capsys):
    from sweep import costs

    costs()
    page = (Path(__file__).parents[2] / "docs/comparing_methods.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 6
    assert all(row.partition(" | ")[2] in page for row in rows)


def test_recounting_the_kept_losses_gives_the_kept_table(monkeypatch):
    import halving
    from common import read_json

    written = {}
    monkeypatch.setattr("sys.argv", ["halving.py", "--recount"])
    monkeypatch.setattr(halving, "report", lambda name, rows, **_: written.update({name: rows}))
    halving.main()
    assert written == {"sweep_halving": read_json("sweep_halving.json")["rows"]}


def test_few_reports_find_a_difference_that_does_not_exist():
    import false_verdicts

    rng = np.random.default_rng(0)
    found = np.mean([false_verdicts.two_arms(3, "normal", rng) for _ in range(500)], axis=0)
    by_loss, by_anything, uncorrected = found
    assert by_loss <= by_anything <= 0.06 < uncorrected
