"""The parts of `benchmarks/end_to_end.py` that need no long run: settings, examples, rows and ratios."""

from types import SimpleNamespace

import pytest

OPTIONS = SimpleNamespace(data="data", steps=40, limit=0)


@pytest.mark.parametrize("title", ["quickstart", "cola", "sst2", "mrpc", "chat", "boolq"])
def test_every_case_has_settings_that_the_command_takes(title):
    import end_to_end

    case = end_to_end.CASES[title]
    settings = end_to_end.settings_of(case, end_to_end.options_of(case, OPTIONS))
    assert (settings.train.steps, settings.optimizer.warmup_steps) == (40, 4)
    assert settings.model.dtype == "float32"
    assert settings.lora.dropout == 0.0
    assert settings.data.packing == (title == "chat")


def test_rows_of_a_run_by_hand():
    from end_to_end import our_rows, summarize

    events = [
        (110.0, 0, {"before/test/loss": 2.0, "before/test/accuracy": 0.5}),
        (114.0, 2, {"train/loss": 1.5, "train/steps_per_second": 0.5}),
        (117.0, 3, {"train/loss": 1.5, "train/steps_per_second": 1.0}),
        (119.5, 3, {"validation/loss": 1.25}),
        (121.5, 5, {"train/loss": 1.0, "train/steps_per_second": 1.0}),
        (122.0, 5, {"validation/loss": 0.75}),
        (123.0, 5, {"test/loss": 0.875}),
    ]
    tokens = [(10, 20), (10, 20), (12, 20), (13, 20), (15, 20)]
    found = summarize(our_rows(events, tokens), started=100.0)
    assert found == {
        "ready_s": 10.0,
        "steps": 5,
        "train_s": 7.0,
        "step_s": 1.0,  # of three steps after the first row
        "token_s": 75.0,
        "text": 40 / 60,
        "tokens": 60,
        "evaluation_s": 1.5,
        "loss_before": 2.0,
        "loss": 0.75,
    }
