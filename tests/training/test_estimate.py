"""Time and memory before the first step: FLOPs by hand, and what is counted of a run."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.settings.schema import DataSettings, ModelSettings, Settings, TrainSettings
from loraplus_jax.tasks.interface import full_batches
from loraplus_jax.training.estimate import count_flops, estimate_rest, estimate_run
from loraplus_jax.training.memory import expected_peak

from ..messages import assert_mentions

X, W = jnp.ones((3, 4)), jnp.ones((4, 5))
MATMUL = 2 * 3 * 4 * 5
SQUARE = jnp.ones((4, 4))


def flops(f, *args):
    return count_flops(jax.jit(f).trace(*args).jaxpr)


def test_flops_of_matmuls_by_hand():
    assert flops(jnp.matmul, X, W) == MATMUL
    assert flops(lambda x, w: jnp.sin(x) + x, X, W) == 0
    batched = jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))
    assert flops(jnp.matmul, *batched) == 7 * MATMUL
    assert flops(lambda x, w: jax.jit(jnp.matmul)(x, w).sum(), X, W) == MATMUL


def test_a_scan_counts_its_iterations_and_a_condition_its_larger_branch():
    def layers(x):
        return jax.lax.scan(lambda x, _: (x @ SQUARE, None), x, length=6)[0]

    assert flops(layers, X) == 6 * 2 * 3 * 4 * 4
    assert flops(lambda x: jax.lax.cond(x.sum() > 0, layers, lambda x: x @ SQUARE, x), X) == 6 * 2 * 3 * 4 * 4


@pytest.mark.parametrize(("remat", "forwards"), [(False, 1), (True, 2)])
def test_a_gradient_counts_what_it_computes_again(remat, forwards):
    def loss(x):
        body = lambda x, _: (jnp.sin(x @ SQUARE), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(body) if remat else body, x, length=6)[0].sum()

    one = 6 * 2 * 3 * 4 * 4
    # The backward pass multiplies with the weights once more; they get no gradient.
    assert flops(jax.grad(loss), X) == (forwards + 1) * one


def run_of(**train):
    settings = Settings(
        model=ModelSettings(path="m"),
        data=DataSettings(path="d"),
        train=TrainSettings(steps=10, eval_every=4, **train),
        output_dir="o",
    )
    splits = {name: {"x": np.zeros(size)} for name, size in {"train": 9, "validation": 7, "test": 12}.items()}
    return types.SimpleNamespace(
        settings=settings,
        steps=10,
        data=types.SimpleNamespace(splits=splits),
        batches=full_batches(splits["train"], 2, 5),
        programs=types.SimpleNamespace(step_work=3.0),
        held_out_texts=None,
    )


def test_what_a_run_takes_by_hand():
    estimate = estimate_run(run_of(), "test", 0.5, 1_240_000_000)
    # 10 steps of 3 batches, validations of 2 at steps 4, 8 and 10, and the test split of 3 at the end.
    assert estimate.seconds == 0.5 * (10 * 3 + 3 * 2 + 3)
    assert estimate.counts == {"steps": 10, "evaluations": 4}
    assert_mentions(str(estimate), "estimate", "about 20 s", "1.2 GB", "10 steps", "4 evaluations")
    assert estimate_run(run_of(early_stopping=1), "test", 0.5, 0).bound == "at most"
    texts = run_of()
    texts.held_out_texts = object()
    assert_mentions(str(estimate_run(texts, "test", 0.5, 0)), "plus generating texts")


def test_a_resumed_run_goes_by_its_median_speed():
    estimate = estimate_rest(10, [0.1, 2.0, 2.0], 0)
    assert (estimate.seconds, estimate.counts) == (5.0, {"steps": 10})
    assert_mentions(str(estimate), "plus evaluations")


def test_the_expected_peak_adds_what_the_largest_program_takes_while_it_runs(monkeypatch):
    def program(temporary):
        sizes = {"argument_size_in_bytes": 100, "temp_size_in_bytes": temporary}
        sizes |= {"output_size_in_bytes": 30, "alias_size_in_bytes": 20}
        return types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes))

    def device(platform):
        return types.SimpleNamespace(platform=platform)

    assert expected_peak([program(7), program(5)], device("gpu"), 2) == 100 + 7 + 30 - 20
    monkeypatch.setattr("psutil.Process.memory_info", lambda self: types.SimpleNamespace(rss=1000))
    assert expected_peak([program(7), program(5)], device("cpu"), 2) == 1000 + 2 * (7 + 30 - 20)
