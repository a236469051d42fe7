"""Checkpoints: what was saved comes back though training continued, and what does not fit is rejected by name."""

import dataclasses
import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax import (
    LoRAPlusConfig,
    init_state,
    jit_step,
    lora_plus_adamw,
    make_mesh,
    open_manager,
    restore_checkpoint,
    save_checkpoint,
)
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.step.checkpoint import DamagedCheckpoint, add_metrics
from loraplus_jax.step.fingerprints import fingerprint
from loraplus_jax.step.run_metadata import describe_run, field_differences
from loraplus_jax.step.sharding import distribute, make_shardings, replicate

from ..marks import slow
from ..messages import mentions
from ..refusals import refusals

CONFIG = LoRAPlusConfig(target_modules=["q"], rank=2)
SPEC = AdapterSpec(leaf="params/q/kernel", kind="dense", axes="io", shape=(4, 3), rank=2, scale=8.0)
TX = lora_plus_adamw(optax.linear_schedule(0.1, 0.0, 10), 16.0, weight_decay=0.1)
FROZEN = {"params": {"q": {"kernel": jnp.arange(12.0).reshape(4, 3)}}}
BATCH = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)


def loss_fn(variables, batch, rng):
    q = variables["lora"]["q"]
    noise = jax.random.normal(rng, (2, 3))
    y = batch @ (variables["params"]["q"]["kernel"] + q["lora_a"] @ q["lora_b"]) + noise
    return (jnp.sum(y**2), 2), {}


step = jit_step(loss_fn, TX)


def trainable():
    return {"lora": {"q": {"lora_a": jnp.linspace(0.0, 1.0, 8).reshape(4, 2), "lora_b": jnp.ones((2, 3))}}}


def fresh(seed=0):
    return init_state(trainable(), TX, jax.random.key(seed))


def trained(state, steps):
    for _ in range(steps):
        state, _ = step(state, FROZEN, BATCH)
    return state


def values(state):
    return jax.device_get(state.replace(rng=jax.random.key_data(state.rng)))


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, values(got), values(expected))


def metadata(config=CONFIG, specs=SPEC, base="0123", seed=5, **more):
    return describe_run({"q": specs}, config, base=base, seed=seed, **more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of three steps, saved at the third, trained on by donation before the writing ended."""
    directory = tmp_path_factory.mktemp("run")
    state = trained(fresh(), 3)
    expected = values(state)
    position = {"epoch": 1, "next": [7, 8]}
    with open_manager(directory) as manager:
        save_checkpoint(manager, state, metadata=metadata(), input_position=position)
        trained(state, 2)
    return directory, expected


@pytest.mark.slow
def test_a_saved_state_is_restored_though_training_continued(saved):
    directory, expected = saved
    with open_manager(directory) as manager:
        restored = restore_checkpoint(manager, fresh(seed=1), metadata=metadata())
    jax.tree.map(np.testing.assert_array_equal, values(restored.state), expected)
    assert restored.input_position == {"epoch": 1, "next": [7, 8]}
    assert restored.metadata["config"] == CONFIG.to_json()
    assert restored.metadata["versions"]["jax"] == jax.__version__
    assert restored.metadata["format"] == 1
    assert "kernel" not in " ".join(map(str, directory.rglob("*")))  # the base is not in the files


def test_a_resumed_run_is_bitwise_the_same(saved):
    with open_manager(saved[0]) as manager:
        state = restore_checkpoint(manager, fresh(seed=1), metadata=metadata()).state
    assert_same(trained(state, 4), trained(fresh(), 7))


def test_a_checkpoint_of_a_mesh_of_eight_restores_elsewhere_bitwise(tmp_path):
    sizes = 1, 2, 2
    draw = functools.partial(jax.random.normal, jax.random.key(1))
    lora = {"q": {"lora_a": draw((8, 4)), "lora_b": draw((4, 16))}}
    spec = AdapterSpec(leaf="params/q/kernel", kind="dense", axes="io", shape=(8, 16), rank=4, scale=1.0)
    frozen = {"params": {"q": {"kernel": jnp.ones((8, 16))}}}
    state = init_state({"lora": lora}, TX, jax.random.key(3))
    moments = jax.jit(TX.update)(state.trainable, state.opt_state, state.trainable)[1]
    state = state.replace(opt_state=moments, step=jnp.int32(7))
    rules = (("q/kernel", ("fsdp", "tensor")),)

    def on(*sizes):
        return make_shardings(make_mesh(*sizes), state, frozen, specs={"q": spec}, rules=rules).state

    with open_manager(tmp_path) as manager:
        save_checkpoint(manager, distribute(state, on(2, 2, 2)), metadata={})
        manager.wait_until_finished()
        like = distribute(init_state({"lora": lora}, TX, jax.random.key(0)), on(*sizes))
        found = restore_checkpoint(manager, like, metadata={}).state
    pairs = zip(*map(jax.tree.leaves, (found.trainable, on(*sizes).trainable)), strict=True)
    assert all(x.sharding.is_equivalent_to(place, x.ndim) for x, place in pairs)
    jax.tree.map(np.testing.assert_array_equal, values(found), values(state))


def restored(directory, state=None, step=None, **change):
    with open_manager(directory) as manager:
        return restore_checkpoint(manager, state or fresh(), metadata=metadata(**change), step=step)


def with_leaf(name, *shape):
    state = fresh()
    state.trainable["lora"]["q"][name] = jnp.zeros(shape)
    return state


TWO = LoRAPlusConfig(target_modules=["q", "v"], rank=2)
SGD = init_state(trainable(), optax.sgd(0.1), jax.random.key(0))
OTHER_RANK = dataclasses.replace(CONFIG, rank=4)
OTHER_SCALE = dataclasses.replace(SPEC, scale=4.0)

test_another_run_is_rejected_with_field_and_values = refusals(
    (lambda saved: restored(saved[0], config=OTHER_RANK), "step 3", "config.rank", 2, 4),
    (lambda saved: restored(saved[0], config=TWO), "step 3", "config.target_modules", '["q"]', '["q", "v"]'),
    (lambda saved: restored(saved[0], config=None), "step 3", "config", "rank", "null"),
    (lambda saved: restored(saved[0], specs=OTHER_SCALE), "step 3", "specs.q.scale", 8.0, 4.0),
    (lambda saved: restored(saved[0], base="4567"), "step 3", "base", '"0123"', '"4567"'),
    (lambda saved: restored(saved[0], seed=6), "step 3", "seed", 5, 6),
    (lambda saved: restored(saved[0], extra=1), "step 3", "extra", "absent", 1),
    (
        lambda saved: restored(saved[0], with_leaf("lora_a", 5, 2)),
        "lora/q/lora_a",
        "(4, 2)",
        "float32 (5, 2)",
    ),
    (
        lambda saved: restored(saved[0], with_leaf("more", 3)),
        "trainable/lora/q/more",
        "absent",
        "float32 (3,)",
    ),
    (lambda saved: restored(saved[0], SGD), "opt_state"),
    (lambda tmp_path: open_manager(tmp_path, keep=0), "keep", 1, 0),
    (lambda tmp_path: open_manager(tmp_path / "a\\b/checkpoints"), "directory", r"a\\b"),
    (lambda tmp_path: open_manager(tmp_path / "a\udcffb/checkpoints"), "directory", r"a\udcffb"),
    error=ValueError,
)


@pytest.mark.slow
def test_keys_of_an_optimizer_and_a_state_of_shapes(tmp_path):
    tx = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(3)), TX)
    state = init_state(trainable(), tx, jax.random.PRNGKey(0))
    with open_manager(tmp_path) as manager:
        save_checkpoint(manager, state, metadata=metadata(), metrics={"loss": jnp.float32(0.5)})
        manager.wait_until_finished()
        restored = restore_checkpoint(manager, jax.eval_shape(lambda: state), metadata=metadata()).state
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(data(x), data(y)), restored, state)
    assert restored.rng.dtype == state.rng.dtype


test_a_missing_checkpoint_is_named = refusals(
    (lambda saved: restored(saved[0], step=2), "step 2"),
    (lambda tmp_path: restored(tmp_path / "mine"), "checkpoint", "mine"),
    error=FileNotFoundError,
)
test_a_bucket_is_no_directory = refusals(
    (lambda: open_manager("gs://a/b"), "directory", "gs://a/b", "mounted")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "losses", "kept"),
    [
        (None, (3.0, 1.0, 2.0, 4.0, 5.0), [4, 5]),
        ("max", (3.0, 9.0, 2.0, 4.0, 5.0), [2, 4, 5]),
        ("min", (3.0, 2.0, 2.0, 4.0, 1.0), [4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, mode, losses, kept):
    how = {} if mode is None else {"best": "loss", "mode": mode}
    state = init_state({"w": jnp.ones(2)}, optax.identity(), jax.random.key(0))
    with open_manager(tmp_path, keep=2, **how) as manager:
        for n, loss in enumerate(losses, 1):
            save_checkpoint(manager, state.replace(step=jnp.array(n)), metadata={}, metrics={"loss": loss})
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == kept
        assert mode is None or manager.best_step() == (2 if len(kept) == 3 else 5)


@pytest.mark.parametrize("name", ["a[b]*", slow("~a\nb%20{b}'\"$")])
def test_any_name_of_a_directory_that_is_legal_works(tmp_path, name):
    state = fresh()
    # Their siblings would match these names as patterns.
    for directory, offset in ((tmp_path / "ab", 1.0), (tmp_path / name, 0.0)):
        with open_manager(directory / "checkpoints") as manager:
            leaves = jax.tree.map(lambda x, offset=offset: x + offset, state.trainable)
            save_checkpoint(manager, state.replace(trainable=leaves), metadata=metadata())
    with open_manager(tmp_path / name / "checkpoints") as manager:
        assert_same(restore_checkpoint(manager, fresh(seed=1), metadata=metadata()).state, state)


def test_metadata_of_a_source_tree_has_no_version(monkeypatch):
    monkeypatch.setattr("loraplus_jax.step.run_metadata.PACKAGES", ("not-installed",))
    assert describe_run({}, None)["versions"] == {"not-installed": "unknown"}


def test_differences_leave_versions_aside_and_reach_the_innermost_field():
    old = {"versions": {"jax": "1"}, "config": {"a": {"b": [1, 2], "c": 1}}, "gone": None}
    new = {"versions": {"jax": "2"}, "config": {"a": {"b": [1, 3], "c": 1}}, "new": 1.5}
    assert field_differences(old, new) == [
        "config.a.b is [1, 2] in the checkpoint and [1, 3] here",
        'gone is null in the checkpoint and "absent" here',
        'new is "absent" in the checkpoint and 1.5 here',
    ]
    assert field_differences(old, old | {"versions": {}}) == []


# Damage


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    with open_manager(directory, best="loss") as manager:
        for n in (1, 2):
            state, metrics = trained(fresh(), n), {"loss": n}
            save_checkpoint(manager, state, metadata=metadata(), input_position=[n], metrics=metrics)
    return directory


@pytest.fixture
def saved_two(two, tmp_path):
    """Steps 1 and 2, of which the first is the best."""
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)


def flip(path):
    """One bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.usefixtures("saved_two")
@pytest.mark.parametrize("item", ["input_position", "metadata", "contents"])
def test_a_changed_note_is_damage(tmp_path, item):
    path = tmp_path / "2" / item / "metadata"
    path.write_text(path.read_text().replace("1", "3").replace("2", "3"))
    with pytest.raises(DamagedCheckpoint, match="step 2"):
        restored(tmp_path)


def test_a_loop_of_ones_own_resumes_from_an_older_checkpoint_as_the_docs_say(two, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    flip(directory / "2/metadata/metadata")
    with open_manager(directory, keep=2, best="loss") as manager:
        with pytest.raises(DamagedCheckpoint):
            restore_checkpoint(manager, fresh(), metadata=metadata())
        restored = restore_checkpoint(manager, fresh(), metadata=metadata(), step=1)
        assert restored.input_position == [1]
        (directory / "2").rename(tmp_path / "2")
        manager.reload()
        state = trained(restored.state, 1)
        save_checkpoint(manager, state, metadata=metadata(), input_position=[2], metrics={"loss": 2})
        manager.wait_until_finished()
        assert restore_checkpoint(manager, fresh(), metadata=metadata()).input_position == [2]


@pytest.mark.slow
def test_one_changed_bit_of_an_array_is_damage(tmp_path):
    """In the largest file of the arrays, where no checksum of tensorstore's own covers it."""
    state = fresh().replace(trainable={"w": jax.random.normal(jax.random.key(0), (100, 100))})
    with open_manager(tmp_path) as manager:
        save_checkpoint(manager, state, metadata=metadata())
    flip(max((tmp_path / "0/state").rglob("*"), key=lambda path: path.stat().st_size))
    with pytest.raises(DamagedCheckpoint, match=r"step 0.*arrays"):
        restored(tmp_path, state)


@pytest.mark.usefixtures("ten_seconds", "saved_two")
@pytest.mark.parametrize("name", ["metrics/metrics", "metadata/metadata", "state/manifest.ocdbt"])
def test_a_fifo_in_a_checkpoint_is_damage_and_not_waited_for(tmp_path, name):
    path = tmp_path / "2" / name
    path.unlink()
    os.mkfifo(path)
    with open_manager(tmp_path, best="loss") as manager:
        if name == "metrics/metrics":
            assert manager.metrics(2) is None
        else:
            with pytest.raises(DamagedCheckpoint, match=mentions("step 2", path, "FIFO")):
                restore_checkpoint(manager, fresh(), metadata=metadata())


CHANGES = {
    "value": lambda text: text.replace("1", "0", 1),
    "value made worse": lambda text: text.replace('"loss": 1', '"loss": 9'),
    "digest": lambda text: text.replace('"digest": "', '"digest": "0'),
    "without digest": lambda text: '{"loss": 1}',
    **{text: (lambda _, text=text: text) for text in ("", "{", "[]", '{"loss": "x"}', '{"loss": NaN}')},
    "of another checkpoint": None,
}


@pytest.mark.usefixtures("saved_two")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_metrics_do_not_decide_the_best(tmp_path, change):
    path, other = (tmp_path / f"{n}/metrics/metrics" for n in (1, 2))
    if change == "of another checkpoint":
        other.write_bytes(path.read_bytes())
        path.unlink()
    else:
        path.write_text(CHANGES[change](path.read_text()))
    damaged = {1, 2} if change == "of another checkpoint" else {1}
    with open_manager(tmp_path, best="loss") as manager:
        assert {step for step in manager.all_steps() if manager.metrics(step) is None} == damaged
        assert (manager.best_step(), [*manager.all_steps()]) == (None if len(damaged) == 2 else 2, [1, 2])
        assert restore_checkpoint(manager, fresh(), metadata=metadata(), step=1).input_position == [1]
        add_metrics(manager, 1, {"loss": 1})
        assert manager.best_step() == 1
        assert manager.metrics(1) == {"loss": 1}


@pytest.mark.parametrize(("value", "mode"), [("nan", "max"), ("-inf", "min")])
def test_a_metric_that_is_not_finite_is_never_the_best_and_null_in_the_file(tmp_path, mode, value):
    how = {"best": "m", "mode": mode, "keep": 3}
    with open_manager(tmp_path, **how) as manager:
        for n, metric in enumerate((float(value), 0.5, float(value)), 1):
            state = fresh().replace(step=jnp.array(n))
            save_checkpoint(manager, state, metadata=metadata(), metrics={"m": metric})
        manager.wait_until_finished()
        assert manager.best_step() == 2
    assert json.loads((tmp_path / "1/metrics/metrics").read_text())["m"] is None
    with open_manager(tmp_path, **how) as manager:
        assert manager.best_step() == 2


@pytest.mark.usefixtures("saved_two")
@pytest.mark.parametrize("content", ['{"metrics": 5}', '{"commit_timestamp_nsecs": 1' + "0" * 30 + "}"])
def test_a_damaged_date_does_not_keep_checkpoints_from_being_opened(tmp_path, content):
    (tmp_path / "2/_CHECKPOINT_METADATA").write_text(content)
    with open_manager(tmp_path, best="loss") as manager:
        assert restore_checkpoint(manager, fresh(), metadata=metadata()).input_position == [2]


# Fingerprints


@functools.cache
def tree(dtype="float32"):
    return {"params": {"w": jnp.arange(64).reshape(8, 8).astype(dtype), "b": jnp.ones(8, dtype)}}


@pytest.mark.parametrize("dtype", ["bfloat16", slow("int8")])
def test_one_bit_changes_the_fingerprint(dtype):
    for bit, place in ((0, (0, 0)), (7, (3, 5)), (0, (7, 7))):
        w = np.array(tree(dtype)["params"]["w"])
        w.view(f"uint{8 * w.itemsize}")[place] ^= 1 << bit
        other = {"params": {"w": jnp.asarray(w), "b": tree(dtype)["params"]["b"]}}
        assert fingerprint(other) != fingerprint(tree(dtype))


@pytest.mark.slow
def test_the_fingerprint_is_the_same_on_any_layout():
    mesh = make_mesh()
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one = fingerprint(tree())
    assert fingerprint(replicate(mesh, tree())) == one
    assert fingerprint(jax.device_put(tree(), split)) == one
    assert fingerprint(jax.tree.map(np.asarray, tree())) == one
    assert fingerprint({"params": dict(reversed(tree()["params"].items()))}) == one


@pytest.mark.parametrize("dtype", ["float32", slow("uint8"), slow("bool")])
def test_the_fingerprint_sees_signs_and_places(dtype):
    w = 3 * jax.random.normal(jax.random.key(0), (8, 8))
    w = w > 0 if dtype == "bool" else w.astype(dtype)
    other_sign = ~w if dtype in ("bool", "uint8") else -w
    changed = [other_sign, w[::-1], w.T, w[:, ::-1], w.reshape(4, 16)]
    changed += [w.view(jnp.int32)] if dtype == "float32" else []
    found = [fingerprint({"w": x}) for x in (w, *changed)]
    others = [{"v": w}, {"w": w, "b": w}, {"w": {"w": w}}]
    assert len({*found, *map(fingerprint, others)}) == len(found) + 3


def test_the_fingerprint_takes_keys_and_complex_numbers():
    tree = {"key": jax.random.key(1), "z": jnp.array([1 + 2j, 3])}
    changes = ({}, {"z": jnp.array([1 - 2j, 3])}, {"key": jax.random.key(2)})
    assert len({fingerprint(tree | change) for change in changes}) == 3
