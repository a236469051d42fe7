"""Two thousand damaged GGUF headers, read for weights, config and tokenizer."""

import struct

import numpy as np
import pytest

from loraplus_jax.models.checkpoints.gguf import load as gguf
from loraplus_jax.models.checkpoints.hf import load_config, load_params
from loraplus_jax.models.checkpoints.name_table import NameTable, Rule
from loraplus_jax.models.tokenizer import read_chat_template, special_tokens, tokenizer

from ..models.checkpoints.gguf.files import metadata, write
from .damage import check, damaged, data_limit

pytestmark = pytest.mark.slow

ROWS = 8
TOKENS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "c", "abc"],
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ x }}",
}
PIECES = TOKENS | {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0, -4.0, -5.0],
}
ODD_NUMBERS = (0, 1, 2, 7, 8, 9, 13, 99, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1)


def odd(rng, data, end):
    """The header with one number of it, somewhere, put to something extreme."""
    form = rng.choice(("<I", "<Q"))
    at = rng.randrange(4, end - 8)
    return (
        data[:at]
        + struct.pack(form, rng.choice(ODD_NUMBERS) % 2 ** (8 * struct.calcsize(form)))
        + data[at + struct.calcsize(form) :]
    )


@pytest.mark.parametrize("tokens", [TOKENS, PIECES], ids=["bytes", "pieces"])
def test_headers(tmp_path, tokens):
    path = tmp_path / "m.gguf"
    content = {
        "token_embd.weight": np.ones((ROWS, 32), np.float32),
        "blk.0.attn_q.weight": np.ones((64, 32), np.float32),
        "blk.1.ffn_up.weight": np.ones((96, 32), np.float32),
        "rope_freqs.weight": np.full(8, 2, np.float32),
    }
    data = write(path, content, metadata() | tokens).read_bytes()
    end = gguf.read(path).tensors["token_embd.weight"].start
    table = NameTable(
        rules=(Rule("model.embed_tokens.weight", "e"), Rule("model.layers.0.self_attn.q_proj.weight", "q")),
        ignore=(r"model\.layers\.1\..*",),
    )
    expected = {"e": np.empty((ROWS, 32), np.float32), "q": np.empty((64, 32), np.float32)}

    def make(rng):
        content = odd(rng, data, end) if rng.randrange(2) else damaged(rng, data, end)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return content

    def read():
        load_config(path)
        load_params(path, table, expected, place=lambda path, array: array)
        tokenizer(path)
        special_tokens(path)
        read_chat_template(path)

    check(1000, make, read, limit=data_limit, names=r"m\.gguf")
