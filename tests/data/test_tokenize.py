"""Texts and pairs of texts as arrays of token ids."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from loraplus_jax.data.tokenize import encode_texts, load_tokenizer

from ..messages import mentions


def _tokenizer(directory: Path, *, pad: str = "[PAD]", baked: bool = True) -> Path:
    vocabulary = [pad, "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(20))]
    tokenizer = Tokenizer(models.WordLevel({w: i + 5 for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 7), ("[SEP]", 8)],
    )
    if baked:
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(pad_id=5, pad_token=pad, length=16, direction="left")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_texts_become_arrays_of_exactly_max_length(tmp_path):
    tokenizer = load_tokenizer(_tokenizer(tmp_path), 6)
    arrays, truncated = encode_texts([("w0 w1",), ("w0 w1 w2 w3 w4 w5",)], tokenizer)
    assert arrays["input_ids"].tolist() == [[7, 9, 10, 8, 5, 5], [7, 9, 10, 11, 12, 8]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert arrays["token_type_ids"].tolist() == [[0] * 6] * 2
    assert {a.dtype for a in arrays.values()} == {np.dtype(np.int32)}
    assert truncated == 1


def test_pairs_keep_their_special_tokens_and_types(tmp_path):
    tokenizer = load_tokenizer(_tokenizer(tmp_path), 7)
    arrays, truncated = encode_texts([("w0", "w1"), ("w0 w1 w2 w3", "w4 w5")], tokenizer)
    assert arrays["input_ids"].tolist() == [[7, 9, 8, 10, 8, 5, 5], [7, 9, 10, 8, 13, 14, 8]]
    assert arrays["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1]]
    assert truncated == 1


def test_long_lists_are_encoded_in_order(tmp_path):
    tokenizer = load_tokenizer(_tokenizer(tmp_path), 4)
    arrays, truncated = encode_texts([(f"w{i % 20}",) for i in range(2500)], tokenizer)
    assert arrays["input_ids"][:, 1].tolist() == [9 + i % 20 for i in range(2500)]
    assert truncated == 0
    assert encode_texts([], tokenizer)[0]["input_ids"].shape == (0, 4)


@pytest.mark.parametrize(
    ("pad", "config", "found"),
    [
        ("<pad>", {}, "<pad>"),
        ("w19", {"pad_token": {"content": "w3"}}, "w3"),
        ("w19", {"pad_token": None, "eos_token": "[SEP]"}, "[SEP]"),
    ],
)
def test_the_pad_token_is_found_where_padding_is_not_baked_in(tmp_path, pad, config, found):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(_tokenizer(tmp_path, pad=pad, baked=False), 6)
    ids = encode_texts([("w0",)], tokenizer)[0]["input_ids"]
    assert ids[0, -1] == tokenizer.token_to_id(found)


def test_tokenizers_that_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=mentions(tmp_path, "tokenizer.json")):
        load_tokenizer(tmp_path, 8)
    with pytest.raises(ValueError, match=mentions("pad", tmp_path)):
        load_tokenizer(_tokenizer(tmp_path, pad="w19", baked=False), 8)
    tokenizer = load_tokenizer(_tokenizer(tmp_path), 3)
    encode_texts([("w0",)], tokenizer)
    with pytest.raises(ValueError, match=mentions("max_length", 3)):
        encode_texts([("w0", "w1")], tokenizer)
    bare = load_tokenizer(_tokenizer(tmp_path), 6)
    bare.post_processor = None
    with pytest.raises(ValueError, match=r"texts without tokens: 1.*' '"):
        encode_texts([("w0",), (" ",)], bare)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json"):
        load_tokenizer(tmp_path, 8)
