"""Time and memory before the first step: FLOPs by hand, what is counted of a run, and what does not fit."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.cli.commands import main
from loraplus_jax.data.options import DataOptions
from loraplus_jax.models.options import ModelOptions
from loraplus_jax.settings.schema import Settings, TrainSettings
from loraplus_jax.tasks.interface import full_batches
from loraplus_jax.training import memory
from loraplus_jax.training.estimate import count_flops, estimate_rest, estimate_run
from loraplus_jax.training.memory import check_memory, expected_peak, free_bytes

from ..messages import assert_mentions, mentions


def program(held):
    """A compiled program that holds so many bytes."""
    state = jax.ShapeDtypeStruct((held // 4,), jnp.float32)
    return jax.jit(lambda state: state + 1, donate_argnums=0).lower(state).compile()


@pytest.fixture(scope="module")
def programs():
    """Two that hold memory, and one that needs 4 MB in passing."""
    passing = jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=0)[0]).lower(jnp.ones(1000)).compile()
    return {"4 MB": program(4_000_000), "8 MB": program(8_000_000), "passing": passing}


@pytest.mark.parametrize(
    ("free", "devices", "names", "fits"),
    [
        (4_010_000, 1, ["4 MB"], True),
        (3_990_000, 1, ["4 MB"], False),
        (8_020_000, 2, ["4 MB"], True),
        (7_980_000, 2, ["4 MB"], False),
        (5_000_000, 1, ["4 MB", "8 MB"], False),  # the larger program counts
        (7_000_000, 1, ["passing"], True),
        (7_000_000, 1, ["4 MB", "passing"], False),  # what one program holds stays while another runs
    ],
)
def test_what_does_not_fit_is_rejected_with_numbers(monkeypatch, programs, free, devices, names, fits):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    rejected = pytest.raises(ValueError, match=mentions("GB", "cpu", "train.accumulate"))
    with contextlib.nullcontext() if fits else rejected:
        check_memory([programs[name] for name in names], [jax.devices()[0]] * devices)


def test_free_memory_of_an_accelerator_comes_from_its_own_statistics():
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    assert free_bytes(types.SimpleNamespace(memory_stats=lambda: stats)) == 70


def test_a_control_group_limits_what_is_free(tmp_path, monkeypatch):
    group = tmp_path / "job"
    group.mkdir()
    files = {"memory.max": "1000\n", "memory.current": "600\n", "memory.stat": "anon 1\ninactive_file 50\n"}
    for name, text in files.items():
        (group / name).write_text(text)
    (tmp_path / "membership").write_text("3:cpu:/\n0::/job\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    cpu = jax.devices()[0]
    assert free_bytes(cpu) == 450
    (group / "memory.max").write_text("max\n")
    assert free_bytes(cpu) > 10**6


def test_out_of_memory_at_run_time_is_reported(monkeypatch, capsys):
    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr("loraplus_jax.inference.predict.evaluate_run", exhausted)
    assert main(["eval", "run"]) == 2
    assert_mentions(capsys.readouterr().err, "out of memory", "train.accumulate", "train.batch_size")


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
    given = {"model": ModelOptions(path="m"), "data": DataOptions(path="d"), "output_dir": "o"}
    settings = Settings(train=TrainSettings(steps=10, eval_every=4, **train), **given)
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

    def devices(platform):
        return [types.SimpleNamespace(platform=platform)] * 2

    assert expected_peak([program(7), program(5)], devices("gpu")) == 100 + 7 + 30 - 20
    monkeypatch.setattr("psutil.Process.memory_info", lambda self: types.SimpleNamespace(rss=1000))
    assert expected_peak([program(7), program(5)], devices("cpu")) == 1000 + 2 * (7 + 30 - 20)
