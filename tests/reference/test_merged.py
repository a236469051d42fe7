"""Merged models in transformers give the logits that base and adapter give here."""

import jax
import numpy as np
import pytest
import torch
import transformers as tf

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, merge
from loraplus_jax.models.checkpoints import export
from loraplus_jax.models.checkpoints.hf import check_params
from loraplus_jax.models.checkpoints.merge import CheckpointMerge

from ..marks import diagonal
from .families import CAUSAL, ENCODERS, Pair, off, random

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LIMIT = 1e-4


def exported(pair, folder, *, embedding=False, headless=False, **how):
    """The pair's model with random adapters, merged into a directory, if so without head; its variables here."""
    names = pair.linear
    names += (("embed_tokens" if pair.is_causal else "embeddings/word"),) * embedding
    config = LoRAPlusConfig(target_modules=names, rank=3)
    model = apply_lora_plus(pair.model, config)
    lora, specs = init_lora(model, jax.random.key(0), *pair.inputs)
    lora = random(lora, 9)
    new = () if pair.is_causal else ("head",)
    leaves, _ = check_params(pair.folder, pair.table, pair.params, new=new)
    headless |= pair.is_causal
    head = {} if headless else {"params": {"head": pair.params["head"]}}
    folder.mkdir()
    made = CheckpointMerge(pair.table, leaves, specs, lora, {})
    labels = {} if headless else {"num_labels": 3}
    export.write_hf(folder, pair.folder, made, pair.form, new=head, config=labels, **how)
    return model, {"params": pair.params, "lora": lora}, specs


@pytest.mark.parametrize(("name", "embedding"), diagonal((*CAUSAL, *ENCODERS), (False, True)))
def test_a_merged_directory_in_transformers(name, embedding, pairs, tmp_path):
    pair = pairs(name)
    model, variables, specs = exported(pair, tmp_path / "merged", embedding=embedding, shard_bytes=40_000)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    auto = tf.AutoModelForCausalLM if pair.is_causal else tf.AutoModelForSequenceClassification
    theirs, report = auto.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(theirs).__name__ == pair.form.architecture
    wanted = pair.torch_logits(theirs.eval())
    assert off(pair.base_logits, wanted) > 1e-2, "the adapter does nothing"
    assert off(pair.logits(model, variables), wanted) <= LIMIT
    whole = merge({"params": pair.params}, variables["lora"], specs)
    assert off(pair.logits(pair.model, whole), wanted) <= LIMIT


def test_a_bare_encoder_in_transformers(tmp_path):
    pair = Pair("bert", tmp_path / "base", pooling="mean")
    model, variables, _ = exported(pair, tmp_path / "merged", headless=True)
    theirs = tf.AutoModel.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    given = {
        n: torch.from_numpy(x).long()
        for n, x in zip(("input_ids", "attention_mask"), pair.inputs, strict=True)
    }
    with torch.no_grad():
        hidden = theirs(**given).last_hidden_state.numpy()
    mask = pair.inputs[1][:, :, None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    head = pair.params["head"]
    wanted = mean @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert off(pair.logits(model, variables), wanted) <= LIMIT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_stored_as_asked_and_merged_in_float32(dtype, pairs, tmp_path):
    pair = pairs("llama3")
    _, variables, specs = exported(pair, tmp_path / "merged", dtype=np.dtype(jax.numpy.dtype(dtype)))
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    whole = merge({"params": pair.params}, variables["lora"], specs, dtype=dtype)
    ours = np.asarray(whole["params"]["layers"]["mlp"]["up_proj"]["kernel"][1].astype("float32"))
    given = theirs.model.layers[1].mlp.up_proj.weight.detach().float().numpy().T
    # The two sums may round apart in the last bit before they are stored.
    assert np.mean(ours != given) < 1e-2
    np.testing.assert_allclose(ours, given, rtol=1e-2)
