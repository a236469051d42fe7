"""The tokens that end a text."""

import json

import pytest

from loraplus_jax.models.tokenizer import stop_ids

from ..messages import mentions


def test_the_tokens_that_end_a_text_come_from_both_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert stop_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert stop_ids(tmp_path) == (9, 7)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=mentions("config.json", "eos_token_id", "'</s>'")):
        stop_ids(tmp_path)
