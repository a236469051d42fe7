"""Tokenizer, chat template and special tokens of GGUF files; and the whole of a real file."""

import hashlib
import json

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from loraplus_jax.models.files import open_files

from ....refusals import refusals
from ...golden import GOLDEN as FILES
from ...golden import real_smollm2
from . import files as gguf_files

GOLDEN = json.loads((FILES / "gguf.json").read_text())
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "123 4"]
TOKENS = ["<s>", "</s>", "<user>", *ALPHABET, *(m.replace(" ", "") for m in MERGES)]


def write(path, metadata, rows=400):
    """A GGUF file with nothing but a tokenizer and an embedding."""
    return gguf_files.write(path, {"token_embd.weight": np.zeros((rows, 4), np.float32)}, metadata)


def byte_level(pre="gpt-2", **changes):
    kinds = [3, 3, 4] + [1] * (len(TOKENS) - 3)
    values = {"model": "gpt2", "pre": pre, "tokens": TOKENS, "token_type": kinds, "merges": MERGES}
    values |= {"bos_token_id": 0, "eos_token_id": 1} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def pieces(**changes):
    values = {key: GOLDEN["sentencepiece"][key] for key in ("tokens", "scores", "token_type")}
    values |= {"model": "llama", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def words(path, text):
    return open_files(path).tokenizer.encode(text).tokens


def reading(metadata, read="tokenizer", rows=400):
    return lambda tmp_path: getattr(open_files(write(tmp_path / "m.gguf", metadata, rows)), read)


@pytest.mark.slow
def test_the_real_file_gives_the_ids_of_transformers():
    ours = open_files(real_smollm2()).tokenizer
    assert [ours.encode(text).ids for text in GOLDEN["texts"]] == GOLDEN["smollm2"]
    assert all(
        ours.decode(ids, skip_special_tokens=False) == text
        for text, ids in zip(GOLDEN["texts"], GOLDEN["smollm2"], strict=True)
    )
    assert open_files(real_smollm2()).special_tokens["eos_token"] == "<|im_end|>"
    assert "<|im_start|>system\n" in open_files(real_smollm2()).chat_template


@pytest.mark.slow
def test_the_real_file_gives_the_weights_of_transformers():
    digest = hashlib.sha256()
    for name, view in open_files(real_smollm2()).tensors.items():
        digest.update(name.encode() + view[:].tobytes())
    assert digest.hexdigest() == GOLDEN["smollm2_weights"]


def test_sentencepiece_vocabularies_give_the_ids_of_sentencepiece(tmp_path):
    ours = open_files(write(tmp_path / "m.gguf", pieces(add_bos_token=False), rows=420)).tokenizer
    differs = []
    for text, ids in zip(GOLDEN["texts"], GOLDEN["sentencepiece"]["ids"], strict=True):
        if not any(special in text for special in ("<s>", "</s>", "<unk>")):  # text to SentencePiece
            differs += [] if ours.encode(text).ids == ids else [text]
            assert ours.decode(ids) == text.replace("▁", " ")
    assert differs == []
    assert ours.encode("<s>").ids == [1]


def test_text_that_spells_a_byte_is_no_byte(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "<", "0", "x", "A", ">", "<0", "<0x", "0A", "0A>"]
    kinds, scores = [2, 3, 3, 6] + [1] * 9, [-float(n) for n in range(13)]
    changes = {"add_bos_token": False, "add_space_prefix": False}
    metadata = pieces(tokens=tokens, scores=scores, token_type=kinds, **changes)
    path = write(tmp_path / "m.gguf", metadata)
    assert words(path, "<0x0A>\n") == ["<0x", "0A>", "<0x0A>"]


DIGITS, SPELLED = "hello hello1234 \n", "I'LL (x)\n\ny"


@pytest.mark.parametrize(
    ("pre", "text", "cuts"),
    [
        *((pre, DIGITS, "hello| hello|1234| \n") for pre in ("gpt-2", None)),
        *((pre, DIGITS, "hello| hello|1|2|3|4| \n") for pre in ("smollm", "qwen2")),
        *((pre, DIGITS, "hello| hello|123|4| \n") for pre in ("llama-bpe", "smaug-bpe", "dbrx")),
        ("gpt-2", SPELLED, "I|'|LL| (|x|)|\n|\n|y"),
        *((pre, SPELLED, "I|'LL| (|x|)\n\n|y") for pre in ("llama3", "qwen2")),
    ],
)
def test_words_are_cut_where_the_models_own_expressions_cut(tmp_path, pre, text, cuts):
    path = write(tmp_path / "m.gguf", byte_level(pre, add_bos_token=False), rows=len(TOKENS))
    ours = open_files(path).tokenizer
    assert "|".join(text[a:b] for _, (a, b) in ours.pre_tokenizer.pre_tokenize_str(text)) == cuts
    assert ours.encode(DIGITS).tokens[:2] == ["hello", "Ġhello"]
    assert ours.decode(ours.encode("hé llo\t1").ids) == "hé llo\t1"


def test_a_llama3_word_that_is_a_token_is_taken_whole(tmp_path):
    tokens = [*TOKENS, "zzz"]
    changes = {"tokens": tokens, "token_type": [1] * len(tokens), "add_bos_token": False}
    assert words(write(tmp_path / "a.gguf", byte_level("llama3", **changes)), "zzz") == ["zzz"]
    assert words(write(tmp_path / "b.gguf", byte_level("qwen2", **changes)), "zzz") == ["z", "z", "z"]


def test_qwen2_composes_characters_and_user_tokens_are_never_split(tmp_path):
    ours = open_files(write(tmp_path / "m.gguf", byte_level("qwen2"))).tokenizer
    assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids
    assert ours.encode("hello</s>hello<user>").tokens == ["hello", "</s>", "hello", "<user>"]
    assert ours.decode([1, 2]) == "<user>"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (byte_level(add_bos_token=True), "<s> hello"),
        (byte_level(add_bos_token=True, add_eos_token=True), "<s> hello </s>"),
        (byte_level(add_bos_token=False), "hello"),
        (byte_level(), "hello"),
        (byte_level("llama-bpe"), "<s> hello"),
        (byte_level("smaug-bpe"), "hello"),
        (byte_level("llama-bpe", add_bos_token=False), "hello"),
        (byte_level("llama-bpe", bos_token_id=None), "hello"),
        (pieces(), "<s> ▁ he l lo"),
        (pieces(add_space_prefix=False), "<s> he l lo"),
    ],
)
def test_bos_is_added_where_the_file_says_or_llama_cpp_would(tmp_path, metadata, expected):
    ours = open_files(write(tmp_path / "m.gguf", metadata, rows=420)).tokenizer
    assert ours.encode("hello").tokens == expected.split()
    text = [token for token in expected.split() if token not in ("<s>", "</s>")]
    assert ours.encode("hello", add_special_tokens=False).tokens == text


def test_template_and_special_tokens_of_a_file(tmp_path):
    path = write(tmp_path / "m.gguf", byte_level(padding_token_id=2) | {"tokenizer.chat_template": "{{ x }}"})
    assert open_files(tmp_path).chat_template == open_files(path).chat_template == "{{ x }}"
    assert open_files(path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<user>"}
    bare = write(tmp_path / "bare.gguf", pieces(bos_token_id=None))
    assert open_files(bare).chat_template is None
    assert open_files(bare).special_tokens == {"eos_token": "</s>", "unk_token": "<unk>"}


test_what_is_wrong_with_a_files_tokenizer_is_named = refusals(
    (reading(byte_level(model="bert")), "m.gguf", "tokenizer.ggml.model", "'bert'", "gpt2", "llama"),
    (reading(byte_level(model=None)), "m.gguf", "tokenizer.ggml.model", None),
    (reading(byte_level(pre="qwen3")), "m.gguf", "tokenizer.ggml.pre", "'qwen3'", "qwen2", "smollm"),
    (reading(byte_level(tokens=None)), "m.gguf", "tokenizer"),
    (reading(byte_level(tokens=["a", "a"], token_type=None)), "m.gguf", "'a'"),
    (reading(byte_level(token_type=[1])), "m.gguf", "token_type", len(TOKENS)),
    (reading(byte_level(merges=None)), "m.gguf", "merges"),
    (reading(byte_level(merges=["abc"])), "m.gguf", "merge", "'abc'"),
    (reading(byte_level(merges=["z z"])), "m.gguf", "tokenizer", "zz"),
    (reading(byte_level(model="llama")), "m.gguf", "scores", len(TOKENS)),
    (reading(byte_level(add_bos_token=True, bos_token_id=4000)), "m.gguf", 4000, "special"),
    (reading(byte_level(eos_token_id=999), "special_tokens"), "m.gguf", 999, "special"),
    (reading({"tokenizer.chat_template": 3}, "chat_template"), "m.gguf", "template", 3),
    (reading(byte_level(), rows=len(TOKENS) - 1), "m.gguf", "embedding", f"{len(TOKENS) - 1} rows"),
)
