"""Which GPUs a step fits on: the table, and which answers come from a program for the GPU itself."""

import dataclasses

import pytest

from loraplus_jax.plan import fits as module
from loraplus_jax.plan.devices import GPUS, MAX_FRACTION
from loraplus_jax.plan.fits import COUNTS, find_fits, split_over
from loraplus_jax.plan.render import format_fits

from ..messages import assert_mentions
from .tiny import llama

ALL = 40_000_000_000
"""Bytes that a made-up step needs on one GPU; n GPUs need an n-th each, and a quarter of it with nf4."""


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Made-up answers, the settings, and what was compiled: (GPU, number, quantize)."""
    compiled = []

    def needed(settings, gpu, count, say):
        compiled.append((gpu.name, count, settings.model.quantize))
        say(f"compiling for {gpu.name}")
        # For any other GPU than the first, a little less.
        size = ALL // count // (4 if settings.model.quantize == "nf4" else 1)
        return size if gpu.name == module.COMPILED_FOR else size - 1, None

    monkeypatch.setattr(module, "_bytes_needed", needed)
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    settings = llama(tmp_path)
    lines = []
    return find_fits(settings, lines.append), settings, compiled, lines


def test_every_gpu_has_an_answer_for_every_number_and_both_kinds_of_weights(answers):
    fits, settings, _, lines = answers
    keys = [(fit.quantize, fit.gpu, fit.number) for fit in fits.fits]
    assert set(keys) == {(q, gpu, n) for q in ("none", "nf4") for gpu in GPUS for n in COUNTS}
    assert len(keys) == len(set(keys))
    by_key = dict(zip(keys, fits.fits, strict=True))
    assert not by_key["none", "l4", 1].fits  # 40 GB of 23.5
    assert by_key["none", "l4", 2].fits  # 20 of 21.6
    assert by_key["none", "a100-80", 1].fits
    assert by_key["nf4", "l4", 1].fits
    assert lines[0] == "compiling for h100"
    text = format_fits(fits, settings)
    (row,) = [line for line in text.splitlines() if line.startswith("2 ")]
    assert_mentions(row, "8", "4", "20.00 GB", "5.00 GB")
    (row,) = [line for line in text.splitlines() if line.startswith("l4") and "nf4" not in line]
    assert_mentions(row, "23.50 GB", "no, 18.38 GB too much", "1.62 GB left", "11.62 GB left")
    assert "yes*, 1.62" in row  # more than the 17.6 GB that JAX reserves
    assert_mentions(text, "XLA_CLIENT_MEM_FRACTION=0.92", "75 %", "model.remat")


def test_only_close_answers_are_compiled_for_their_gpu(answers):
    fits, _, compiled, _ = answers
    first = [(module.COMPILED_FOR, n, q) for q in ("none", "nf4") for n in COUNTS]
    assert [key for key in compiled if key[0] == module.COMPILED_FOR] == first
    others = set(compiled) - set(first)
    assert ("a100-40", 1, "none") in others  # 40 GB of 38.9
    assert ("l4", 2, "none") not in others or abs(ALL // 2 - MAX_FRACTION * 23.5e9) < 0.05 * 23.5e9
    for fit in fits.fits:
        asked = (fit.gpu, fit.number, fit.quantize)
        assert fit.exact == (asked in compiled)
        size = ALL // fit.number // (4 if fit.quantize == "nf4" else 1)
        distance = min(abs(size - fit.limit), abs(size - fit.available)) / GPUS[fit.gpu].memory
        assert (asked in others) == (distance < module.CLOSE and fit.gpu != module.COMPILED_FOR)
        assert fit.needed == size - (asked in others)


def test_a_program_that_the_compiler_refuses_does_not_fit(tmp_path, monkeypatch):
    """However little it says that it needs; every other GPU is asked too."""
    monkeypatch.setattr(
        module,
        "_bytes_needed",
        lambda settings, gpu, *_: (1, "no shared memory" if gpu.name != "l4" else None),
    )
    settings = llama(tmp_path)
    fits = find_fits(settings, print)
    assert {fit.gpu for fit in fits.fits if fit.fits} == {"l4"}
    assert all(fit.exact for fit in fits.fits)
    text = format_fits(fits, settings)
    assert_mentions(text, "no, the compiler ran out of memory", "over")
    assert "no, -" not in text


def test_batches_are_split_over_the_gpus(tmp_path):
    settings = llama(tmp_path, train={"batch_size": 4, "accumulate": 4, "eval_batch_size": 2})
    sizes = [dataclasses.astuple(split_over(settings, n).mesh) for n in COUNTS]
    assert sizes == [(1, n, 1) for n in COUNTS]
    trains = [split_over(settings, n).train for n in COUNTS]
    assert [t.batch_size for t in trains] == [4, 4, 4, 8]
    assert [t.accumulate for t in trains] == [4, 2, 1, 1]
    assert [t.eval_batch_size for t in trains] == [2, 2, 4, 8]
