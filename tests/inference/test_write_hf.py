"""What is written for transformers: whole models, files of tensors, and names of modules."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplus_jax.inference.checkpoint_merge import OutputTensor
from loraplus_jax.inference.write_hf import write_hf, write_safetensors
from loraplus_jax.models.bert import model as bert
from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.checkpoints.transformers_class import causal_lm_class, encoder_class, path_map
from loraplus_jax.models.files import open_files
from loraplus_jax.models.gpt2.model import name_table

from ..models.golden import GOLDEN


@pytest.mark.slow
def test_split_layers_are_written_as_the_fused_one(split, base, tmp_path):
    (folder, merge), form = base, causal_lm_class(split[0].config)
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", open_files(folder), merge, form, new={}, config={"note": 1})
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["architectures"], config["note"]) == (["GPT2LMHeadModel"], 1)
    assert "split_fused" not in config


def test_no_file_says_where_the_base_was(split, base, tmp_path):
    (folder, merge), form = base, causal_lm_class(split[0].config)
    target, place = tmp_path / "out", "/home/me/model"
    target.mkdir()
    names = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
    config = json.loads((folder / "config.json").read_text())
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = (config if name == "config.json" else {"kept": {"é": 1}}) | dict.fromkeys(names, place)
        (folder / name).write_text(json.dumps(content))
    write_hf(target, open_files(folder), merge, form, new={}, config={})
    assert [path.name for path in target.glob("*.json") if place in path.read_text()] == []
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"kept": {"é": 1}}


def test_shards_hold_every_tensor_once_in_the_dtype_asked_for(split, base, tmp_path):
    (folder, merge), form = base, causal_lm_class(split[0].config)
    write_hf(
        tmp_path,
        open_files(folder),
        merge,
        form,
        new={},
        config={},
        dtype=ml_dtypes.bfloat16,
        shard_bytes=5000,
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 2
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    written = {name: value for tensors in files.values() for name, value in tensors.items()}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in written.values())
    assert {value.dtype.name for value in written.values()} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    expected = {
        name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(folder / "model.safetensors").items()
    }
    jax.tree.map(np.testing.assert_array_equal, written, expected)


def test_a_file_of_tensors_is_read_back(tmp_path):
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "b": np.array(2.5, ml_dtypes.bfloat16),
        "c": np.array([True, False]),
    }
    tensors = [OutputTensor(n, x.shape, x.dtype, lambda x=x: iter([x])) for n, x in values.items()]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    jax.tree.map(np.testing.assert_array_equal, load_file(tmp_path / "x.safetensors"), values)


@pytest.mark.parametrize(
    ("kind", "pooling", "architecture", "theirs"),
    [
        ("bert", "mean", "BertModel", None),
        ("bert", "pooler", "BertForSequenceClassification", "classifier"),
        ("roberta", "pooler", "RobertaForSequenceClassification", "classifier.out_proj"),
    ],
)
def test_an_encoder_goes_to_the_class_that_has_its_head(kind, pooling, architecture, theirs):
    config = BertConfig.from_hf(json.loads(str(np.load(GOLDEN / f"{kind}.npz")["config"])))
    form = encoder_class(config, pooling)
    names = dict(rule[:2] for rule in path_map(bert.name_table(config, pooling), form))
    assert (form.architecture, names.get("head")) == (architecture, theirs)
    prefix = "" if theirs is None else f"{kind}."
    assert names["encoder/layers/mlp/up"] == f"{prefix}encoder.layer.{{layer}}.intermediate.dense"


def test_parts_of_a_fused_layer_and_a_tied_embedding_are_named(split):
    model, _ = split
    rules = path_map(name_table(model.config), causal_lm_class(model.config))
    names = {ours: rest for ours, *rest in rules}
    assert names["layers/attn/k_attn"] == ["transformer.h.{layer}.attn.c_attn[32:64 of 96]", "Conv1D"]
    assert names["embed_positions"] == ["transformer.wpe", "Embedding"]
    assert ("embed_tokens", "transformer.wte", "TiedEmbedding") in rules
    assert rules[-1] == ("embed_tokens", "lm_head", "TiedHead")
