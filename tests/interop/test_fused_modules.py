"""Adapters on parts of a PyTorch module: by literals, by their product, to PEFT's files and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.interop.fused_modules import Part, fuse, split
from loraplus_jax.interop.path_map import Outputs
from loraplus_jax.interop.peft_files import load_peft, peft_config, save_peft

from ..messages import mentions
from ..refusals import refusals

Q, K, V = (Outputs(start, stop, 9) for start, stop in ((0, 4), (4, 6), (6, 9)))
PATHS = (
    *(("q", "net.qkv[0:4 of 9]"), ("k", "net.qkv[4:6 of 9]"), ("v", "net.qkv[6:9 of 9]")),
    ("out", "net.out"),
)
SIZES = {"q": 4, "k": 2, "v": 3}


def pair(outputs, rank, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rank, 5)), rng.normal(size=(outputs.stop - outputs.start, rank))


def test_parts_of_different_ranks_and_scales_are_one_product():
    q, v = Part(Q, pair(Q, 2), 2.0), Part(V, pair(V, 1, 1), 0.5)
    a, b = fuse([v, q], 2.0)
    assert (a.shape, b.shape) == ((3, 5), (9, 3))
    expected = np.zeros((9, 5))
    for part in (q, v):
        expected[part.outputs.rows] = part.scale * part.factors[1] @ part.factors[0]
    np.testing.assert_allclose(2.0 * b @ a, expected, rtol=1e-12)
    again_v, again_q = split((a, b), [(V, 1), (Q, 2)])
    for given, part in ((again_q, q), (again_v, v)):
        np.testing.assert_array_equal(given[0], part.factors[0])
        np.testing.assert_allclose(given[1] * 2.0 / part.scale, part.factors[1], rtol=1e-12)


def test_an_adapter_of_the_whole_module_is_one_of_every_part():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5))[0], np.random.default_rng(1).normal(size=(9, 3))
    parts = split((a, b), [(Q, 3), (K, 3), (V, 3)])
    np.testing.assert_array_equal(np.concatenate([part[1] @ part[0] for part in parts]), b @ a)


def parts_of(*adapted, outputs=9):
    return lambda: split((np.ones((3, 5)), np.ones((outputs, 3))), adapted)


test_a_whole_module_that_does_not_fit_its_parts_is_rejected = refusals(
    *(
        (parts_of(*adapted), "rank 3", "9 outputs", "0:4")
        for adapted in ([(Q, 3), (V, 3)], [(Q, 2), (K, 3), (V, 3)], [(Q, 1), (K, 1), (V, 1)])
    ),
    (parts_of((Q, 3), (V, 3), outputs=8), "9 outputs", "(8, 3)"),
)


def trained(parts, **fields):
    """Random adapters of some parts, in a stack of no layers."""
    config = LoRAPlusConfig(target_modules=parts, rank=2, alpha=3.0, **fields)
    rng, lora, specs = np.random.default_rng(0), {}, {}
    for name in parts:
        specs[name] = AdapterSpec(
            leaf=f"params/{name}/kernel",
            kind="dense",
            axes="io",
            shape=(5, SIZES[name]),
            rank=config.rank_of(name),
            scale=config.scale_of(name),
            magnitude=config.variant == "dora",
        )
        shapes = zip(specs[name].factor_paths(name), specs[name].factor_shapes, strict=True)
        leaves = {path.split("/")[1]: rng.normal(size=shape).astype(np.float32) for path, shape in shapes}
        lora[name] = jax.tree.map(jnp.asarray, leaves)
    return lora, specs, config


@pytest.mark.parametrize(
    ("parts", "fields", "rank"),
    [
        (("q", "v"), {}, 4),
        (("v",), {}, 2),
        (("q", "k", "v"), {"rank_pattern": {"k": 1}, "alpha_pattern": {"v": 5.0}, "use_rslora": True}, 5),
        (("q", "k", "v"), {"variant": "dora"}, 6),
    ],
)
def test_files_of_parts_come_back(parts, fields, rank, tmp_path):
    lora, specs, config = trained(parts, **fields)
    servable = {} if fields else {"check_for": "vllm"}
    save_peft(tmp_path / "a", lora, specs, config, PATHS, **servable)
    options = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (options["target_modules"], options["r"], options["rank_pattern"]) == (["net.qkv"], rank, {})
    again = load_peft(tmp_path / "a", specs, PATHS)
    assert again.config == config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again.lora, lora)


def test_a_file_of_the_whole_module_adapts_every_part(tmp_path):
    lora, specs, config = trained(("q", "v"))
    save_peft(tmp_path / "a", lora, specs, config, PATHS)
    (tmp_path / "a/loraplus.json").unlink()
    config = peft_config(tmp_path / "a", PATHS)
    assert (config.target_modules, {config.rank_of(n) for n in SIZES}) == (("k", "q", "v"), {4})
    _, specs, _ = trained(("q", "k", "v"), rank_pattern={".": 4}, alpha_pattern={".": 6.0})
    again = load_peft(tmp_path / "a", specs, PATHS)
    assert not again.lora["k"]["lora_b"].any()
    for name in ("q", "v"):
        given, expected = (x[name]["lora_a"] @ x[name]["lora_b"] for x in (again.lora, lora))
        np.testing.assert_allclose(given, expected, rtol=1e-5)


def test_biases_of_all_parts_are_one(tmp_path):
    lora, specs, config = trained(("q", "v"), bias="all")
    biases = {name: {"bias": jnp.arange(size) + 0.5} for name, size in SIZES.items()}
    save_peft(tmp_path / "a", lora, specs, config, PATHS, extras={"params": biases})
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    bias = "base_model.model.net.qkv.base_layer.bias"
    assert tensors[bias].tolist() == [0.5, 1.5, 2.5, 3.5, 0.5, 1.5, 0.5, 1.5, 2.5]
    shapes = {
        n: {"kernel": jax.ShapeDtypeStruct((5, s), jnp.float32), "bias": b["bias"]}
        for n, s, b in ((n, SIZES[n], biases[n]) for n in SIZES)
    }
    again = load_peft(tmp_path / "a", specs, PATHS, params=shapes)
    jax.tree.map(np.testing.assert_array_equal, again.extras["params"], biases)
    save_file(tensors | {bias: tensors[bias][:8]}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(ValueError, match=mentions(bias.removeprefix("base_model.model."), [9], [8])):
        load_peft(tmp_path / "a", specs, PATHS, params=shapes)
    del biases["k"]
    with pytest.raises(ValueError, match=mentions("net.qkv.base_layer.bias", "9 outputs", "0:4, 6:9")):
        save_peft(tmp_path / "b", lora, specs, config, PATHS, extras={"params": biases})


def test_magnitudes_of_some_parts_alone_are_rejected(tmp_path):
    lora, specs, config = trained(("q", "v"), variant="dora")
    with pytest.raises(ValueError, match=mentions("net.qkv", "DoRA", "merge")):
        save_peft(tmp_path / "a", lora, specs, config, PATHS)
    assert not (tmp_path / "a").exists()
