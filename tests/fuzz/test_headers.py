"""A hundred thousand damaged headers: weights, their index, config.json, and both files of an adapter."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from loraplus_jax import LoRAPlusConfig, load_adapter, save_adapter
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.interop.adapter_directory import read_adapter_json
from loraplus_jax.models.checkpoints.hf import INDEX_FILE, SINGLE_FILE, load_params
from loraplus_jax.models.checkpoints.name_table import NameTable, embedding_rules, linear_rules

from .damage import JSON_KEYS, JSON_VALUES, check, damaged, data_limit, odd_json, words

pytestmark = pytest.mark.slow

TABLE = NameTable(
    rules=(*embedding_rules("tok", "embed"), *linear_rules("h.{layer}.fc", "up", bias=False)),
    ignore=("h.0.mask",),
)
LEAVES = {"embed": {"embedding": (5, 3)}, "up": {"kernel": (2, 3, 4)}}
EXPECTED = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32), LEAVES, is_leaf=lambda x: isinstance(x, tuple)
)
FIRST = {"tok.weight": np.ones((5, 3), np.float16), "h.0.mask": np.ones((2, 2), bool)}
SECOND = {f"h.{layer}.fc.weight": np.ones((4, 3), np.float32) for layer in range(2)}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "is_decoder": False,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    **dict.fromkeys((*SIZES, "max_position_embeddings", "type_vocab_size"), 4),
}
DTYPES = tuple(f'"{name}"' for name in words("F64 F16 BF16 I64 U8 BOOL F8_E4M3 F4 C64 f32"))
OFFSETS = words("[0,0] [0,4] [8,4] [-4,0] [0,18446744073709551615] [1e3,2e3] [0] [4,1e999]")
SHAPES = words("[0] [] [1] [-1,3] [9223372036854775807,4] [4294967296,4294967296] [1,1,1,1,3]")
OUTSIDE = (
    *words(r'"../outside.safetensors" "/etc/passwd" "C:\\x.safetensors" ".safetensors"'),
    f'"{SINGLE_FILE}"',
)


def odd_header(rng, data):
    """A safetensors file whose header is wrong as JSON, in its values, or in the length before it."""
    length = int.from_bytes(data[:8], "little")
    text = odd_json(rng, json.loads(data[8 : 8 + length]), (*JSON_VALUES, *DTYPES, *OFFSETS, *SHAPES))
    header = text.encode(errors="surrogatepass")
    told = len(header)
    if not rng.randrange(4):
        told = rng.choice((0, 1, told - 1, told + 1, len(data), 10**8, 2**31, 2**63, 2**64 - 1))
    return told.to_bytes(8, "little") + header + data[8 + length :]


def writer(path, data, odd):
    """Half of the files get faults of bytes in their first part, half are of the right form with odd contents.

    Each is a new file, since some file systems write a file to the disk when its contents are replaced.
    """
    end = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)

    def make(rng):
        content = odd(rng) if rng.randrange(2) else damaged(rng, data, end)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return content

    return make


def json_writer(path, tree, **odd):
    return writer(
        path, json.dumps(tree).encode(), lambda rng: odd_json(rng, tree, **odd).encode(errors="surrogatepass")
    )


def load(directory):
    return load_params(directory, TABLE, EXPECTED, place=lambda path, array: array)


def test_weights(tmp_path):
    data = save(FIRST | SECOND, {"format": "pt"})
    make = writer(tmp_path / SINGLE_FILE, data, lambda rng: odd_header(rng, data))
    check(45_000, make, lambda: load(tmp_path), limit=data_limit, names=re.escape(str(tmp_path)))


def test_an_index_and_its_shards(tmp_path):
    """The file outside would do, if it were opened."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(FIRST | SECOND, tmp_path / "outside.safetensors")
    shards = {"1.safetensors": FIRST, "2.safetensors": SECOND}
    for name, content in shards.items():
        save_file(content, folder / name)
    index = {"metadata": {}, "weight_map": {n: name for name, content in shards.items() for n in content}}

    def odd(rng):
        if rng.randrange(10):
            values, keys = (*JSON_VALUES, *OUTSIDE * 9), (*JSON_KEYS, *FIRST)
            return odd_json(rng, index, values, keys).encode(errors="surrogatepass")
        places = dict.fromkeys(index["weight_map"], json.loads(rng.choice(OUTSIDE)))
        return json.dumps({"weight_map": places}).encode()

    make = writer(folder / INDEX_FILE, json.dumps(index).encode(), odd)

    def read():
        load(folder)
        assert set(json.loads((folder / INDEX_FILE).read_bytes())["weight_map"].values()) <= set(shards)

    check(15_000, make, read, limit=data_limit, names=re.escape(str(folder)))


@pytest.fixture
def adapter(tmp_path):
    spec = AdapterSpec(
        leaf="params/q/kernel", kind="dense", axes="io", shape=(2, 4, 3), rank=2, scale=8.0, stacked=(0,)
    )
    factors = {"lora_a": jnp.ones((2, 4, 2)), "lora_b": jnp.zeros((2, 2, 3))}
    config = LoRAPlusConfig(target_modules=["q"], rank=2)
    trainable = {"lora": {"q": factors}, "params": {"head": {"bias": jnp.ones(3)}}}
    save_adapter(tmp_path / "adapter", trainable, {"q": spec}, config, base="0123")
    load_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_notes_of_an_adapter(adapter):
    path = adapter / "adapter.json"
    make = json_writer(path, json.loads(path.read_text()), keys=(*JSON_KEYS, "q/x", "rank"))

    def read():
        read_adapter_json(adapter)
        load_adapter(adapter)

    check(10_000, make, read, limit=data_limit, names=re.escape(str(adapter)))


def test_the_tensors_of_an_adapter(adapter):
    path = adapter / "adapter.safetensors"
    data = path.read_bytes()
    make = writer(path, data, lambda rng: odd_header(rng, data))
    check(10_000, make, lambda: load_adapter(adapter), limit=data_limit, names=re.escape(str(adapter)))
