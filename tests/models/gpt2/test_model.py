"""What only GPT-2 has; `test_decoder.py` compares it with transformers."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ..golden import load, run, write_golden


@pytest.mark.slow
def test_a_position_beyond_the_table_gives_nan(models):
    _, model, params = models("gpt2_tied")
    ids = np.ones((1, 2), np.int32)
    for last, is_known in ((63, True), (64, False)):
        given = run(model, {"params": params}, ids, None, np.array([[0, last]], np.int32))
        assert np.isfinite(given[0, 1]).all() == is_known
        assert np.isnan(given[0, 1]).all() != is_known


def test_names_of_older_files_mean_the_same(models, tmp_path):
    """The model without its head, with the buffers that old files hold, and a config without newer options."""
    write_golden("gpt2_tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in weights.items()}
    old |= {f"h.{n}.attn.bias": np.tri(64, dtype=np.float32)[None, None] for n in range(2)}
    old["h.0.attn.masked_bias"] = np.full((), -1e4, np.float32)
    old["lm_head.weight"] = old["wte.weight"].copy()
    save_file(old, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    new_options = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    kept = {key: value for key, value in config.items() if key not in (*new_options, "tie_word_embeddings")}
    (tmp_path / "config.json").write_text(json.dumps(kept | {"n_ctx": 64}))
    model, params = load(tmp_path)
    _, wanted, tensors = models("gpt2_tied")
    assert model.config == wanted.config
    jax.tree.map(np.testing.assert_array_equal, params, tensors)
