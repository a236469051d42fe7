"""A checkpoint by the names of its tensors."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loraplus_jax.inference.checkpoint_merge import CheckpointMerge
from loraplus_jax.inference.named_base import named_base
from loraplus_jax.interop.path_map import check_path_map, modules_of, torch_module_of
from loraplus_jax.models.files import open_files

from .. import tiny
from ..integration.gpt2_world import write_gpt2
from ..messages import mentions

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return named_base(open_files(tiny.write(tmp_path_factory.mktemp("llama"))))


def test_modules_are_found_with_and_without_a_prefix(llama):
    names = ["layers.1.self_attn.q_proj", Q, "lm_head"]
    assert llama.locate(names) == {names[0]: Q, Q: Q, "lm_head": "lm_head"}
    with pytest.raises(ValueError, match=mentions("model.layers.2.self_attn.q_proj", llama.files.path)):
        llama.locate(["model.layers.2.self_attn.q_proj"])


def test_specs_and_path_map(llama):
    locations = llama.locate([Q, DOWN, "model.embed_tokens"])
    specs = llama.specs(locations, dict.fromkeys(locations, (2, 1.5)))
    q, down, embedding = specs.values()
    assert (q.leaf, q.axes, q.shape) == ("params/model/layers/1/self_attn/q_proj/kernel", "io", (16, 16))
    assert (down.shape, embedding.kind) == ((24, 16), "embed")
    rules = llama.path_map(locations)
    check_path_map(rules)
    for path, name in zip(specs, locations, strict=True):
        module = torch_module_of(rules, path)
        assert module is not None
        assert (module.name, module.holes) == (name, ())
        assert modules_of(rules, name) == [(path, ())]
    # A rule serves all layers.
    both = llama.locate([f"model.layers.{n}.self_attn.q_proj" for n in range(2)])
    assert len(llama.path_map(both)) == 1


def test_a_weight_that_is_no_matrix(llama):
    with pytest.raises(ValueError, match=mentions("model.norm", "(16,)")):
        llama.specs({"model.norm": "model.norm"}, {"model.norm": (2, 1.0)})


def test_a_quantized_weight_is_no_base(tmp_path, llama):
    tiny.write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[Q] = tensors.pop(f"{Q}.weight")
    save_file(tensors | {f"{Q}.weight": np.ones((16, 16), np.int8)}, tmp_path / "model.safetensors")
    base = named_base(open_files(tmp_path))
    with pytest.raises(ValueError, match=mentions(Q, "I8", "quantized")):
        base.specs({Q: Q}, {Q: (2, 1.0)})


def test_every_tensor_has_a_leaf(llama):
    table, leaves = llama.table()
    tensors = load_file(llama.files.path / "model.safetensors")
    assert {rule.name for rule in table.rules} == tensors.keys()
    for rule in table.rules:
        shape = tensors[rule.name].shape
        assert leaves[rule.path].shape == (shape[::-1] if rule.transposed else shape)
    merge = CheckpointMerge(table, leaves, {}, {}, {})
    assert not any(merge.changes(name) for name in tensors)


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
def test_gpt2_has_its_weights_the_other_way(kind, tmp_path):
    write_gpt2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    base = named_base(open_files(tmp_path))
    name = "transformer.h.0.attn.c_attn"
    locations = base.locate([name])
    assert locations == {name: "h.0.attn.c_attn"}
    assert [spec.shape for spec in base.specs(locations, {name: (2, 1.0)}).values()] == [(32, 96)]
    assert base.path_map(locations)[0][2:] == ("Conv1D",)
    stored = load_file(tmp_path / "model.safetensors")["h.0.attn.c_attn.weight"]
    np.testing.assert_array_equal(base.weight("h.0.attn.c_attn"), stored.T)


def test_a_tied_head(tmp_path):
    tiny.write(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()},
        tmp_path / "model.safetensors",
    )
    base = named_base(open_files(tmp_path))
    table, _ = base.table()
    assert table.copies == (("lm_head.weight", "model.embed_tokens.weight"),)
    kinds = [rule[2] for rule in base.path_map({"model.embed_tokens": "model.embed_tokens"})]
    assert kinds == ["TiedEmbedding", "TiedHead"]


def test_the_class_is_the_config_s(tmp_path):
    tiny.write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, architecture, task in (
        ({}, "LlamaForCausalLM", "CAUSAL_LM"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel", None),
        ({"model_type": "pi0"}, "", None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        form = named_base(open_files(tmp_path)).transformers_class()
        assert (form.architecture, form.task_type, form.prefix) == (architecture, task, "")


def test_which_embedding_is_the_head(tmp_path):
    named = named_base(open_files(tiny.write(tmp_path, tie_word_embeddings=True)))
    assert named.tied_embedding == "model.embed_tokens"
    with pytest.raises(ValueError, match=mentions("lm_head", "model.embed_tokens")):
        named.specs({"lm_head": "lm_head"}, {"lm_head": (2, 1.0)})
    silent = {name: value for name, value in named.config.items() if name != "tie_word_embeddings"}
    defaults = {"llama": None, "gemma2": "model.embed_tokens", "unknown": "model.embed_tokens"}
    for kind, tied in defaults.items():
        config = silent | {"model_type": kind, "query_pre_attn_scalar": 8, "head_dim": 8}
        config |= {"hidden_activation": "gelu_pytorch_tanh"}
        assert named._replace(config=config).tied_embedding == tied, kind
