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
from loraplus_jax.interop.adapter_directory import read_adapter_json

from ..messages import mentions
from ..refusals import refusals

CONFIG = LoRAPlusConfig(target_modules=["q"], rank=2)


def spec(leaf="params/layers/q/kernel", shape=(6, 4, 3), stacked=(0,)):
    return AdapterSpec(leaf=leaf, kind="dense", axes="io", shape=shape, rank=2, scale=8.0, stacked=stacked)


SPECS = {"layers/q": spec()}


def drawn(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(sum(shape)), shape, dtype)


def trainable(dtype=jnp.float32):
    pair = {"lora_a": drawn(6, 4, 2, dtype=dtype), "lora_b": drawn(6, 2, 3, dtype=dtype)}
    head = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "temperature": np.float32(2)}
    return {"lora": {"layers": {"q": pair}}, "params": {"head": head}}


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tmp_path / "adapter", trainable(), SPECS, CONFIG, base="0123", task="cola")
    return tmp_path / "adapter"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_bit_for_bit(tmp_path, dtype):
    save_adapter(tmp_path / "a/b", trainable(dtype), SPECS, CONFIG)
    lora, specs, config, extras, start = load_adapter(str(tmp_path / "a/b"))
    assert not start
    assert (config, specs) == (CONFIG, SPECS)
    got, expected = {"lora": lora, **extras}, trainable(dtype)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
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


def test_the_files_say_what_they_are(adapter):
    assert {path.name for path in adapter.iterdir()} == {"adapter.json", "adapter.safetensors"}
    assert load_file(adapter / "adapter.safetensors").keys() == {
        "lora/layers/q/lora_a",
        "lora/layers/q/lora_b",
        "params/head/kernel",
        "params/head/temperature",
    }
    notes = read_adapter_json(adapter)
    assert (notes["format"], notes["base"], notes["task"]) == (1, "0123", "cola")
    assert notes["config"]["lr_ratio"] == 4.0


def notes(change, *, keep_digest=False):
    """Changes adapter.json, as another version may have written it: without the digest, which names any change."""

    def damage(directory):
        content = json.loads((directory / "adapter.json").read_text())
        if not keep_digest:
            del content["digest"]
        change(content)
        (directory / "adapter.json").write_text(json.dumps(content))

    return damage


def spec_notes(change):
    return notes(lambda n: change(n["specs"]["layers/q"]))


def tensors(change):
    def damage(directory):
        content = load_file(directory / "adapter.safetensors")
        change(content)
        save_file(content, directory / "adapter.safetensors")

    return damage


def cut(name, size):
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:size])


def write(text):
    return lambda d: (d / "adapter.json").write_text(text)


def loading(damage):
    def load(adapter):
        damage(adapter)
        load_adapter(adapter)

    return load


A = "lora/layers/q/lora_a"
CHANGED = ("adapter.json", "changed", "digest")
test_missing_files_are_named = refusals(
    (loading(lambda d: (d / "adapter.json").unlink()), "adapter.json"),
    (loading(lambda d: (d / "adapter.safetensors").unlink()), "adapter.safetensors"),
    (loading(shutil.rmtree), "adapter directory"),
    error=FileNotFoundError,
)
DAMAGE = [
    *((cut("adapter.safetensors", n), "adapter.safetensors") for n in (0, 4, 100, -1)),
    (cut("adapter.json", 50), "adapter.json", "JSON"),
    (write("[]"), "adapter.json", "JSON object", "list"),
    (write("[" * 3000 + "]" * 3000), "adapter.json"),
    (notes(lambda n: n.pop("specs")), "adapter.json", "specs", "missing"),
    (notes(lambda n: n.update(format=2)), "format", 2, 1),
    (notes(lambda n: n["config"].update(rnk=2)), "'rnk'", "'rank'"),
    (notes(lambda n: n["config"].update(rank=0)), "adapter.json", "rank", 0),
    (notes(lambda n: n["config"].update(dropout=10**400)), "adapter.json", "dropout"),
    (notes(lambda n: n["specs"].clear()), "layers/q/lora_a", "absent"),
    (spec_notes(lambda s: s.update(kind="rnn")), "'layers/q'", "'rnn'"),
    (spec_notes(lambda s: s.pop("leaf")), "'layers/q'", "leaf"),
    (spec_notes(lambda s: s.update(stacked=[None])), "adapter.json", "'layers/q'", "stacked", "None"),
    (
        spec_notes(lambda s: s.update(shape=[6, 5, 3])),
        *("layers/q/lora_a", "(6, 4, 2)", "adapter.safetensors", "(6, 5, 2)", "adapter.json"),
    ),
    (tensors(lambda t: t.update({A: -t[A]})), "adapter.safetensors", *CHANGED),
    (tensors(lambda t: t.pop(A)), "layers/q/lora_a", "absent", "adapter.safetensors"),
    (tensors(lambda t: t.update({"lora/k/lora_a": t[A]})), "k/lora_a"),
    (tensors(lambda t: t.update({A: t[A][:5]})), "layers/q/lora_a", "(5, 4, 2)", "(6, 4, 2)"),
    (notes(lambda n: n.update(task="another"), keep_digest=True), *CHANGED),
    (notes(lambda n: n.update(settings={"model": {"pooling": "cls"}}), keep_digest=True), *CHANGED),
]
test_damage_is_rejected = refusals(
    *((loading(damage), *words) for damage, *words in DAMAGE), error=ValueError
)


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
