"""What a run prints before training, and lines of progress where no progress bar is shown."""

import io
import os
import re
import types
from types import SimpleNamespace

import numpy as np
import pytest
import rich.console

from loraplus_jax._utils.output import Output
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.training import console
from loraplus_jax.training.console import (
    LineConsole,
    ProgressLines,
    ignored_lines,
    lines_only,
    progress,
    shows_bar,
)

from ..messages import assert_mentions

NO_SUCH = ("--lora.target_modules", "[nosuch]", "--lora.lr_ratio", "9")
DECAY = ("--optimizer.weight_decay", "0.1", "--optimizer.decay", "equal")
CHUNK = ("--task", "instruction", "--model.loss_chunk", "8")


@pytest.mark.parametrize(
    ("method", "options", "head", "words"),
    [
        ("lora_plus", (*NO_SUCH, *DECAY, *CHUNK), "lora", []),
        ("lora_plus", CHUNK, "params", ["model.loss_chunk"]),
        ("lora", (*NO_SUCH, *DECAY, *CHUNK), "lora", ["lora.lr_ratio", "optimizer.decay"]),
        ("full", (*NO_SUCH, *DECAY), "params", ["lora.*", "optimizer.decay"]),
        ("full", CHUNK, "params", ["lora.*", "optimizer.decay", "model.loss_chunk"]),
    ],
)
def test_what_the_method_or_a_trained_head_ignores_is_named(tmp_path, method, options, head, words):
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {path: d}\noutput_dir: o\n")
    settings = parse_settings(tmp_path / "c.yaml", ["--method", method, *options])
    config = types.SimpleNamespace(tie_word_embeddings=False)
    base = types.SimpleNamespace(model=types.SimpleNamespace(config=config))
    trainable = {head: {"lm_head" if head == "params" else "q_proj": 0.0}}
    lines = list(ignored_lines(settings, types.SimpleNamespace(base=base, trainable=trainable)))  # pyright: ignore
    assert len(lines) == len({word.partition(".")[0] == "model" for word in words})
    assert_mentions(" ".join(lines), *words)


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


def test_a_pipe_gets_each_line_at_once(monkeypatch):
    monkeypatch.setattr(console, "SECONDS_PER_LINE", 0.0)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with open(reader, "rb") as pipe, open(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", Output(stdout))
        ProgressLines(lines_only(None), "step", 9).update(1)
        assert pipe.read().startswith(b"step 1 of 9: ")


def test_a_notebook_gets_plain_lines_and_no_bar(monkeypatch, capsys):
    """In Jupyter rich would display HTML, and a bar only with ipywidgets."""
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as its kernel does
    monkeypatch.setattr(console, "SECONDS_PER_LINE", 0.0)
    out = lines_only(None)
    with progress(out) as bar:
        assert bar.disable
        ProgressLines(out, "step", 9).update(1)
    out.print("step 1: loss 0.5")
    first, second = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert first.startswith("step 1 of 9: ")
    assert second == "step 1: loss 0.5"


def test_a_bar_on_terminals_only(monkeypatch):
    out = LineConsole(file=types.SimpleNamespace(isatty=lambda: True))  # pyright: ignore
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    assert shows_bar(out)
    monkeypatch.setenv("JPY_PARENT_PID", "1")  # of a command in a cell, which has a terminal
    assert not shows_bar(out)
    monkeypatch.delenv("JPY_PARENT_PID")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not shows_bar(LineConsole(file=io.StringIO()))
