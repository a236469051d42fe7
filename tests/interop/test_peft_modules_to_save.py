"""Weights that are trained fully in PEFT's files: stacks, parts, tied embeddings, and copies of the base."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.interop.peft_files import load_peft, save_peft

from ..messages import mentions
from .models import PATHS, accept_changes, factors, net, spec_of


@pytest.mark.slow
def test_biases_of_some_layers_are_filled_up_with_the_bases(tmp_path):
    config, lora, specs, params = net(target_modules=["fc"], bias="lora_only")
    bias = jnp.arange(24.0).reshape(3, 8)
    extras = {"params": {"blocks": {"fc": {"bias": bias}}}}
    save_peft(tmp_path / "a", lora, specs, config, PATHS, extras=extras)
    path = accept_changes(tmp_path / "a") / "adapter_model.safetensors"
    found = load_file(path)
    del found["base_model.model.layers.1.fc.base_layer.bias"]
    save_file(found, path)
    again = load_peft(tmp_path / "a", specs, PATHS, params=params).extras["params"]["blocks"]["fc"]["bias"]
    np.testing.assert_array_equal(again, bias.at[1].set(params["blocks"]["fc"]["bias"][1]))
    shapes = jax.eval_shape(lambda: params)
    unknown = load_peft(tmp_path / "a", specs, PATHS, params=shapes).extras
    assert isinstance(unknown["params"]["blocks"]["fc"]["bias"], jax.ShapeDtypeStruct)


@pytest.mark.slow
def test_a_copy_of_the_base_must_be_one(tmp_path):
    config, lora, specs, params = net(target_modules=["embed"])
    save_peft(tmp_path / "a", lora, specs, config, PATHS)
    path = accept_changes(tmp_path / "a") / "adapter_model.safetensors"
    copy = np.asarray(params["embed"]["embedding"])
    for value in (copy, copy + 1):
        save_file(load_file(path) | {"base_model.model.emb.base_layer.weight": value}, path)
        if value is copy:
            assert not load_peft(tmp_path / "a", specs, PATHS, params=params).extras
    with pytest.raises(ValueError, match=mentions("emb.base_layer.weight", "base")):
        load_peft(tmp_path / "a", specs, PATHS, params=params)


ADAPTED = {"target_modules": ["embed"], "alpha_pattern": {"embed": 3.0}}
SAVED = {"target_modules": ["fc"], "modules_to_save": ["embed"]}
OTHERS = ({"alpha_pattern": {"lm_head": 4}}, {"rank_pattern": {"lm_head": 1}})


@pytest.mark.parametrize(("fields", "contradictions"), [(ADAPTED, OTHERS), (SAVED, ())])
def test_an_embedding_that_is_the_head_too_is_written_as_both(tmp_path, fields, contradictions):
    config, lora, specs, params = net(**fields)
    tied = (("embed", "m.wte", "TiedEmbedding"), *PATHS[1:], ("embed", "lm_head", "TiedHead"))
    extras = {"params": {"embed": params["embed"]}} if fields is SAVED else {}
    save_peft(tmp_path / "a", lora, specs, config, tied, extras=extras)
    names = ("adapter_config.json", "adapter_model.safetensors")
    options, weights = (accept_changes(tmp_path / "a") / name for name in names)
    content, written = json.loads(options.read_text()), load_file(weights)
    named = content["modules_to_save" if fields is SAVED else "target_modules"]
    assert (named, content["ensure_weight_tying"]) == (["m.wte", "lm_head"], True)
    embedding, head = (f"base_model.model.{name}" for name in ("m.wte", "lm_head"))
    if fields is SAVED:
        same = {f"{head}.weight": f"{embedding}.weight"}
        np.testing.assert_array_equal(written[f"{head}.weight"], params["embed"]["embedding"])
    else:  # the head is the transposed embedding
        same = {f"{head}.lora_{x}.weight": f"{embedding}.lora_embedding_{y}" for x, y in ("AB", "BA")}
    for of_head, of_embedding in same.items():
        expected = written[of_embedding]
        np.testing.assert_array_equal(written[of_head], expected if fields is SAVED else expected.T)

    def load():
        return load_peft(tmp_path / "a", specs, tied, params=params)

    jax.tree.map(np.testing.assert_array_equal, (load().lora, load().extras), (lora, extras))
    for changes, *words in (
        ({"ensure_weight_tying": False}, "ensure_weight_tying"),
        *((changes, "lm_head", "m.wte", "alpha") for changes in contradictions),
    ):
        options.write_text(json.dumps(content | changes))
        with pytest.raises(ValueError, match=mentions(*words)):
            load()
    options.write_text(json.dumps(content))
    for changed in (
        *({name: written[name] + 1} for name in same),
        *({name: None} for name in same),
        dict.fromkeys(same),
    ):
        save_file({n: x for n, x in (written | changed).items() if x is not None}, weights)
        with pytest.raises(ValueError, match=mentions("tied", "m.wte", "lm_head")) as refused:
            load()
        assert str(refused.value).count("ensure_weight_tying") < 2
    with pytest.raises(ValueError, match=mentions("params/embed/embedding", "TiedHead")):
        save_peft(tmp_path / "b", lora, specs, config, tied[:-1], extras=extras)


def test_a_fully_trained_leaf_of_parts_is_split_too(tmp_path):
    spec, rules = spec_of("dense", "io", (3, 5)), [("m", "t"), ("norms", "{q|k}_norm")]
    config = LoRAPlusConfig(target_modules=["m"], rank=2, alpha=3.0)
    extras = {"params": {"norms": {"scale": jnp.arange(6.0).reshape(2, 3)}}}
    save_peft(tmp_path / "a", factors(spec), {"m": spec}, config, rules, extras=extras)
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert tensors["base_model.model.k_norm.weight"].tolist() == [3.0, 4.0, 5.0]
    again = load_peft(tmp_path / "a", {"m": spec}, rules, params=extras["params"]).extras
    np.testing.assert_array_equal(again["params"]["norms"]["scale"], extras["params"]["norms"]["scale"])
    rules = [("m", "t"), ("norms", "{q|k|v}_norm")]
    with pytest.raises(ValueError, match=mentions("params/norms/scale", 3, "(2, 3)")):
        save_peft(tmp_path / "b", factors(spec), {"m": spec}, config, rules, extras=extras)
    with pytest.raises(ValueError, match=mentions("k_norm.weight", 3, "(2, 3)")):
        load_peft(tmp_path / "a", {"m": spec}, rules, params=extras["params"])


def test_kernels_of_unknown_axes_are_never_transposed_by_guess(tmp_path):
    config, lora, specs, _ = net(target_modules=["head"])
    extras = {"params": {"conv": {"kernel": jnp.arange(48.0).reshape(3, 2, 2, 4)}}}
    rules = (*PATHS, ("conv", "conv"))
    with pytest.raises(ValueError, match=mentions(4, "Linear", "Conv1D", "Conv")):
        save_peft(tmp_path / "a", lora, specs, config, rules, extras=extras)
    rules = (*PATHS, ("conv", "conv", "Conv"))
    save_peft(tmp_path / "a", lora, specs, config, rules, extras=extras)
    weight = load_file(tmp_path / "a/adapter_model.safetensors")["base_model.model.conv.weight"]
    np.testing.assert_array_equal(weight, np.transpose(extras["params"]["conv"]["kernel"], (3, 2, 0, 1)))
    again = load_peft(tmp_path / "a", specs, rules, params=extras["params"]).extras
    jax.tree.map(np.testing.assert_array_equal, again, extras)
