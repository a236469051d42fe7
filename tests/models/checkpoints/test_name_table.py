"""Rules from names in files to parameters, one by one and for a model whose fused layers are split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax.models.checkpoints.name_table import (
    NameTable,
    Rule,
    conv1d_rules,
    expand,
    linear_rules,
    shape_in_file,
    split_rules,
)
from loraplus_jax.models.checkpoints.params import check_params, load_params
from loraplus_jax.models.files import open_files
from loraplus_jax.models.gpt2.model import name_table

from ...messages import mentions
from ..golden import error, run, write_golden
from .gguf.files import gguf_of


def test_a_rule_says_which_tensors_of_which_shape_make_a_leaf():
    linear, bias = linear_rules("h.{layer}.up", "layers/up")
    query, *_ = split_rules(conv1d_rules("h.{layer}.qkv", "layers/qkv"), {"q": 4, "k": 2, "v": 2})
    leaf = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    assert (linear.name, linear.path, linear.transposed) == ("h.{layer}.up.weight", "layers/up/kernel", True)
    assert [*expand(linear, leaf)] == ["h.0.up.weight", "h.1.up.weight"]
    assert [*expand(Rule("a.weight", "a/kernel"), leaf)] == ["a.weight"]
    assert (shape_in_file(linear, leaf), shape_in_file(query, leaf)) == ((4, 3), (3, 8))
    assert (query.path, query.index, query.is_conv1d) == ("layers/q/kernel", (slice(None), slice(0, 4)), True)
    assert (linear.is_conv1d, bias.is_conv1d, bias.index) == (False, False, (slice(None),))


def test_a_leaf_may_stack_layers_and_experts_and_join_outputs():
    (rule,) = linear_rules("h.{layer}.e.{expert}.{gate|up}", "layers/up", bias=False)
    leaf = jax.ShapeDtypeStruct((2, 2, 3, 8), jnp.float32)
    found = expand(rule, leaf)
    assert list(found)[:3] == ["h.0.e.0.gate.weight", "h.0.e.0.up.weight", "h.0.e.1.gate.weight"]
    assert found["h.1.e.0.up.weight"].in_leaf == (1, 0, ..., slice(4, 8))
    assert (len(found), rule.stacked, shape_in_file(rule, leaf)) == (8, 2, (4, 3))


def test_parts_of_a_leaf_are_read_from_the_tensors_that_have_them(tmp_path):
    """As each device of a mesh reads its own."""
    (rule,) = linear_rules("h.{layer}.e.{expert}.{gate|up}", "up", bias=False)
    leaf, rng = jax.ShapeDtypeStruct((2, 2, 3, 8), jnp.float32), np.random.default_rng(0)
    weights = {name: rng.normal(size=(4, 3)).astype(np.float32) for name in expand(rule, leaf)}
    save_file(weights, tmp_path / "model.safetensors")
    table, expected = NameTable(rules=(rule,)), {"up": {"kernel": leaf}}
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    sharding = jax.NamedSharding(mesh, jax.P(None, "a", None, "b"))
    for shardings in (None, {"up/kernel": sharding}):
        loaded = load_params(open_files(tmp_path), table, expected, shardings=shardings)
        kernel = np.asarray(loaded["up"]["kernel"])
        for name, place in expand(rule, leaf).items():
            np.testing.assert_array_equal(kernel[place.in_leaf].T, weights[name])


def test_names_are_renamed_in_order_and_ignored_whole():
    table = NameTable(rules=(), renames=((r"^model\.", ""), (r"gamma$", "weight")), ignore=(r"head\..*",))
    assert table.canonical("model.norm.gamma") == "norm.weight"
    assert [table.ignores(name) for name in ("head.bias", "ahead.bias", "head")] == [True, False, False]


@pytest.mark.slow
def test_split_layers_are_the_parts_of_the_fused_one(split, models, tmp_path, monkeypatch):
    golden, fused, params = models("gpt2_tied")
    model, shapes = split
    monkeypatch.setattr("loraplus_jax.models.checkpoints.params._PIECE", 4 * 32 * 7)
    write_golden("gpt2_tied", tmp_path)
    for path in (tmp_path, gguf_of(tmp_path, tmp_path / "m.gguf")):
        loaded = load_params(open_files(path), name_table(model.config), shapes)
        layers = loaded["layers"]["attn"]
        for leaf, whole in params["layers"]["attn"]["c_attn"].items():
            parts = [layers[f"{name}_attn"][leaf] for name in "qkv"]
            np.testing.assert_array_equal(np.concatenate(parts, -1), whole)
    given = np.asarray(run(model, {"params": loaded}, golden["long"]))
    assert error(given, np.asarray(run(fused, {"params": params}, golden["long"]))) <= 1e-6


def test_a_missing_fused_tensor_is_listed_once(split, tmp_path):
    write_golden("gpt2_tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("h.0.attn.c_attn.weight"))]
    save_file(weights, tmp_path / "model.safetensors")
    model, shapes = split
    with pytest.raises(ValueError, match=mentions("1 missing", "h.0.attn.c_attn.weight", [32, 96])):
        check_params(open_files(tmp_path), name_table(model.config), shapes)
