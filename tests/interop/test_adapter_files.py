"""Adapter directories: bit for bit both ways, and damage is met by one clear error."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax import LoRAPlusConfig, load_adapter, lora_plus_adamw, save_adapter
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.interop.adapter_files import read_adapter_json

from ..messages import mentions

CONFIG = LoRAPlusConfig(target_modules=["q"], rank=2)


def spec(leaf="params/layers/q/kernel", shape=(6, 4, 3), stacked=(0,)):
    return AdapterSpec(leaf=leaf, kind="dense", axes="io", shape=shape, rank=2, scale=8.0, stacked=stacked)


SPECS = {"layers/q": spec()}


def drawn(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


def trainable(dtype=jnp.float32):
    pair = {"lora_a": drawn(6, 4, 2, dtype=dtype), "lora_b": drawn(6, 2, 3, dtype=dtype)}
    return {"lora": {"layers": {"q": pair}}, "params": {"head": {"kernel": drawn(3, 2)}}}


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tmp_path / "adapter", trainable(), SPECS, CONFIG, base="0123", task="cola")
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_bit_for_bit(tmp_path, dtype):
    save_adapter(tmp_path, trainable(dtype), SPECS, CONFIG)
    lora, specs, config, extras, start = load_adapter(tmp_path)
    assert not start
    assert (config, specs) == (CONFIG, SPECS)
    got, expected = {"lora": lora, **extras}, trainable(dtype)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_round_trip_of_a_model_that_is_one_layer_and_of_no_adapters(tmp_path):
    root = {"": spec("params/kernel", (4, 3), ())}
    pair = {"lora_a": drawn(4, 2), "lora_b": drawn(2, 3)}
    for name, tree in (("one", {"lora": pair}), ("bare", pair)):
        save_adapter(tmp_path / name, tree, root, CONFIG)
        assert load_adapter(tmp_path / name).specs == root
        jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / name).lora, pair)
    save_adapter(tmp_path / "begun", pair, root, CONFIG, start=(begun := {n: x + 1 for n, x in pair.items()}))
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "begun").start, begun)
    with pytest.raises(ValueError, match=mentions("start", "lora_a")):
        save_adapter(tmp_path / "short", pair, root, CONFIG, start={"lora_b": pair["lora_b"]})
    save_adapter(tmp_path / "full", {"params": trainable()["params"]}, {}, None)
    lora, specs, config, extras, _ = load_adapter(tmp_path / "full")
    assert (config, specs, lora) == (None, {}, {})
    jax.tree.map(np.testing.assert_array_equal, extras["params"], trainable()["params"])


def test_a_transposed_array_keeps_its_values(tmp_path):
    tree = {"params": {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}}
    save_adapter(tmp_path, tree, {}, None)
    np.testing.assert_array_equal(load_adapter(tmp_path).extras["params"]["w"], tree["params"]["w"])


def test_the_files_say_what_they_are(adapter):
    assert {path.name for path in adapter.iterdir()} == {"adapter.json", "adapter.safetensors"}
    assert load_file(adapter / "adapter.safetensors").keys() == {
        "lora/layers/q/lora_a",
        "lora/layers/q/lora_b",
        "params/head/kernel",
    }
    notes = read_adapter_json(adapter)
    assert (notes["format"], notes["base"], notes["task"]) == (1, "0123", "cola")
    assert notes["config"]["lr_ratio"] == 4.0


def edit_notes(directory, change):
    """As another version may have written it: without the digest, which would be the only error otherwise."""
    path = directory / "adapter.json"
    notes = json.loads(path.read_text())
    del notes["digest"]
    change(notes)
    path.write_text(json.dumps(notes))


def edit_json(directory, **values):
    path = directory / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(directory, change):
    path = directory / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(directory, name, size):
    path = directory / name
    path.write_bytes(path.read_bytes()[:size])


A = "lora/layers/q/lora_a"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "adapter.json").unlink(), FileNotFoundError, "adapter.json"),
        (lambda d: (d / "adapter.safetensors").unlink(), FileNotFoundError, "adapter.safetensors"),
        (lambda d: shutil.rmtree(d), FileNotFoundError, "adapter directory"),
        *[
            (lambda d, n=n: cut(d, "adapter.safetensors", n), ValueError, "adapter.safetensors")
            for n in (0, 4, 100, -1)
        ],
        (lambda d: cut(d, "adapter.json", 50), ValueError, "adapter.json.*JSON"),
        (
            lambda d: (d / "adapter.json").write_text("[]"),
            ValueError,
            mentions("adapter.json", "JSON object", "list"),
        ),
        (
            lambda d: edit_notes(d, lambda n: n.pop("specs")),
            ValueError,
            mentions("adapter.json", "format", "config", "specs"),
        ),
        (lambda d: edit_notes(d, lambda n: n.update(format=2)), ValueError, mentions("format", 2, 1)),
        (
            lambda d: edit_notes(d, lambda n: n["config"].update(rnk=2)),
            ValueError,
            mentions("'rnk'", "'rank'"),
        ),
        (
            lambda d: edit_notes(d, lambda n: n["config"].update(rank=0)),
            ValueError,
            mentions("adapter.json", "rank", 0),
        ),
        (
            lambda d: edit_notes(d, lambda n: n["specs"]["layers/q"].update(kind="rnn")),
            ValueError,
            mentions("'layers/q'", "'rnn'"),
        ),
        (
            lambda d: edit_notes(d, lambda n: n["specs"]["layers/q"].pop("leaf")),
            ValueError,
            mentions("'layers/q'", "leaf"),
        ),
        (
            lambda d: edit_notes(d, lambda n: n["specs"]["layers/q"].update(shape=[6, 5, 3])),
            ValueError,
            mentions("layers/q/lora_a", "(6, 4, 2)", "adapter.safetensors", "(6, 5, 2)", "adapter.json"),
        ),
        (
            lambda d: edit_notes(d, lambda n: n["config"].update(dropout=10**400)),
            ValueError,
            mentions("adapter.json", "dropout"),
        ),
        (
            lambda d: edit_notes(d, lambda n: n["specs"]["layers/q"].update(stacked=[None])),
            ValueError,
            mentions("adapter.json", "'layers/q'", "stacked", "None"),
        ),
        (
            lambda d: (d / "adapter.json").write_text("[" * 3000 + "]" * 3000),
            ValueError,
            "adapter.json.*(recursion|100|JSON object)",
        ),
        (
            lambda d: edit_notes(d, lambda n: n["specs"].clear()),
            ValueError,
            mentions("layers/q/lora_a", "absent"),
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({A: -t[A]})),
            ValueError,
            mentions("adapter.safetensors", "adapter.json", "changed", "digest"),
        ),
        (lambda d: edit_json(d, task="another"), ValueError, mentions("adapter.json", "changed", "digest")),
        (
            lambda d: edit_json(d, settings={"model": {"pooling": "cls"}}),
            ValueError,
            mentions("adapter.json", "changed", "digest"),
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.pop(A)),
            ValueError,
            mentions("layers/q/lora_a", "absent", "adapter.safetensors"),
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({"lora/k/lora_a": t[A]})),
            ValueError,
            mentions("k/lora_a"),
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({A: t[A][:5]})),
            ValueError,
            mentions("layers/q/lora_a", "(5, 4, 2)", "(6, 4, 2)"),
        ),
    ],
)
def test_damage_is_rejected(adapter, damage, error, message):
    damage(adapter)
    with pytest.raises(error, match=message):
        load_adapter(adapter)


def test_an_older_adapter_is_replaced_whole(adapter):
    other = jax.tree.map(lambda x: x + 1, trainable())
    save_adapter(adapter, {"lora": other["lora"]}, SPECS, CONFIG)
    loaded = load_adapter(adapter)
    jax.tree.map(np.testing.assert_array_equal, loaded.lora, other["lora"])
    assert loaded.extras == {}
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "lora", [{}, {"params": {}}, {"layers": {"q": {"lora_a": jnp.ones((6, 4, 2))}}}, {"lora": {"q": {}}}]
)
def test_what_would_not_load_is_not_saved(tmp_path, lora):
    with pytest.raises(ValueError, match=mentions("layers/q/lora_b", "absent")):
        save_adapter(tmp_path / "new", lora, SPECS, CONFIG)
    assert not (tmp_path / "new").exists()


def test_a_failed_save_leaves_the_older_adapter_and_nothing_else(adapter):
    with pytest.raises(TypeError, match="JSON"):
        save_adapter(adapter, {"lora": trainable()["lora"]}, SPECS, CONFIG, task=object())
    jax.tree.map(np.testing.assert_array_equal, load_adapter(adapter).lora, trainable()["lora"])
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_parents_are_made(tmp_path):
    save_adapter(tmp_path / "a" / "b", trainable(), SPECS, CONFIG)
    assert load_adapter(str(tmp_path / "a" / "b")).config == CONFIG


def test_only_an_adapter_is_ever_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    for target in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="thesis"):
            save_adapter(target, {"params": {"w": jnp.ones(1)}}, {}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    for value in (1.0, 2.0):
        save_adapter(tmp_path / "adapter", {"params": {"w": jnp.full(1, value)}}, {}, None)
    assert load_adapter(tmp_path / "adapter").extras["params"]["w"] == 2.0


def test_the_ratio_that_was_trained_with_is_recorded(tmp_path):
    lora = trainable()["lora"]
    state = optax.chain(lora_plus_adamw(1e-3, 2.5)).init({"lora": lora})
    save_adapter(tmp_path, lora, SPECS, CONFIG, opt_state=state)
    assert load_adapter(tmp_path).config.lr_ratio == 2.5


def test_lists_of_layers_are_saved(tmp_path):
    pair = {"lora_a": drawn(4, 2), "lora_b": drawn(2, 3)}
    table = {"layers/0": spec("params/layers/0/kernel", (4, 3), ())}
    save_adapter(tmp_path, {"layers": {0: pair}}, table, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path).lora["layers"]["0"], pair)
