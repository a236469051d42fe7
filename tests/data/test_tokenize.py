"""Texts and pairs of texts as token ids."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from loraplus_jax.data.splits import LabelledText
from loraplus_jax.data.tokenize import encode_texts, input_warnings, truncating_tokenizer
from loraplus_jax.models.files import open_files

from ..messages import assert_mentions, mentions


def _tokenizer(directory: Path, *, baked: bool = True) -> Path:
    """Without a pad token, which encoders do not need, unless it is baked in."""
    vocabulary = ["[PAD]" if baked else "w19", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(20))]
    tokenizer = Tokenizer(models.WordLevel({w: i + 5 for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 7), ("[SEP]", 8)],
    )
    if baked:
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(pad_id=5, pad_token="[PAD]", length=16, direction="left")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def _lists(columns):
    return {name: [tokens.tolist() for tokens in column] for name, column in columns.items()}


def test_texts_become_tokens_of_at_most_max_length(tmp_path):
    """Whatever padding and truncation the file has."""
    for baked in (True, False):
        tokenizer = truncating_tokenizer(open_files(_tokenizer(tmp_path, baked=baked)), 6)
        columns, truncated = encode_texts([("w0 w1",), ("w0 w1 w2 w3 w4 w5",)], tokenizer, 6)
        ids = [[7, 9, 10, 8], [7, 9, 10, 11, 12, 8]]
        assert _lists(columns) == {"input_ids": ids, "token_type_ids": [[0] * 4, [0] * 6]}
        assert {tokens.dtype for column in columns.values() for tokens in column} == {np.dtype(np.int32)}
        assert truncated == 1


def test_pairs_keep_their_special_tokens_and_types(tmp_path):
    tokenizer = truncating_tokenizer(open_files(_tokenizer(tmp_path)), 7)
    columns, truncated = encode_texts([("w0", "w1"), ("w0 w1 w2 w3", "w4 w5")], tokenizer, 7)
    assert _lists(columns) == {
        "input_ids": [[7, 9, 8, 10, 8], [7, 9, 10, 8, 13, 14, 8]],
        "token_type_ids": [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1]],
    }
    assert truncated == 1


@pytest.mark.parametrize("kind", ["word", "first", "unigram", "bytes"])
def test_unknown_texts_and_equal_inputs_with_different_labels_are_counted(tmp_path, kind):
    tokenizer = open_files(_tokenizer(tmp_path)).new_tokenizer()
    if kind == "first":  # its id is 0
        tokenizer = Tokenizer(models.WordLevel({"?": 0, "w1": 1, "w2": 2}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "unigram":
        pieces = [("<s>", 0.0), ("<unk>", 0.0), *((f"w{i}", -1.0) for i in range(20))]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=1))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "bytes":  # which know all texts
        letters = [*pre_tokenizers.ByteLevel.alphabet()]
        tokenizer = Tokenizer(models.BPE({x: n for n, x in enumerate(letters)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    texts = ["\N{GRINNING FACE}", "\N{CRYING FACE}", "\N{CRYING FACE}", "w1", "w1", "w2 \N{CRYING FACE}"]
    rows = [
        LabelledText(text, label, f"f:{n}")
        for n, (text, label) in enumerate(zip(texts, "abbaba", strict=True))
    ]
    columns, _ = encode_texts([row.texts for row in rows], tokenizer, 60)
    lines = input_warnings(rows, columns["input_ids"], tokenizer)
    assert len(lines) == (0 if kind == "bytes" else 2)
    for line in lines:
        assert_mentions(line, "warning", "3 of 6", "f:0")
    # Equal texts are told as duplicates.
    assert input_warnings(rows[3:], columns["input_ids"][3:], tokenizer) == []


def test_long_lists_are_encoded_in_order(tmp_path):
    tokenizer = truncating_tokenizer(open_files(_tokenizer(tmp_path)), 4)
    columns, truncated = encode_texts([(f"w{i % 20}",) for i in range(2500)], tokenizer, 4)
    assert [tokens[1] for tokens in columns["input_ids"]] == [9 + i % 20 for i in range(2500)]
    assert truncated == 0
    assert encode_texts([], tokenizer, 4)[0]["input_ids"].shape == (0,)


def test_tokenizers_that_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=mentions(tmp_path, "tokenizer.json")):
        truncating_tokenizer(open_files(tmp_path), 8)
    tokenizer = truncating_tokenizer(open_files(_tokenizer(tmp_path)), 3)
    encode_texts([("w0",)], tokenizer, 3)
    with pytest.raises(ValueError, match=mentions("max_length", 3)):
        encode_texts([("w0", "w1")], tokenizer, 3)
    bare = truncating_tokenizer(open_files(_tokenizer(tmp_path)), 6)
    bare.post_processor = None
    with pytest.raises(ValueError, match=r"texts without tokens: 1.*' '"):
        encode_texts([("w0",), (" ",)], bare, 6)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json"):
        truncating_tokenizer(open_files(tmp_path), 8)
