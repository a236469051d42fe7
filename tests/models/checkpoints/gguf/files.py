"""Small GGUF files for tests."""

import json

import gguf
import numpy as np
from safetensors.numpy import load_file

KINDS = {kind.name: kind for kind in gguf.GGMLQuantizationType}
SIZES = {"embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "context_length": 128}
HEADS, KEY_HEADS, HEAD, ROWS = 4, 2, 16, 40
SHAPES = {"attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64)}
SHAPES |= {"attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}


def metadata(arch="llama", **changes):
    values = {f"{arch}.{key}": value for key, value in SIZES.items()}
    values |= {f"{arch}.attention.head_count": HEADS, f"{arch}.attention.head_count_kv": KEY_HEADS}
    values |= {f"{arch}.attention.layer_norm_rms_epsilon": 1e-5, f"{arch}.rope.freq_base": 1e6}
    values |= {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def tensors(head=False, bias=False, qk_norm=False):
    """A whole model's tensors in the file's names, float32."""
    rng, found = np.random.default_rng(0), {"token_embd.weight": (ROWS, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
        if bias:
            found |= {f"blk.{layer}.attn_{p}.bias": SHAPES[f"attn_{p}"][:1] for p in "qkv"}
        if qk_norm:
            found |= {f"blk.{layer}.attn_{p}_norm.weight": (HEAD,) for p in "qk"}
    if head:
        found["output.weight"] = (ROWS, 64)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in found.items()}


def write(path, content, values=None, arch="llama", dtypes=None):
    """A GGUF file of float32 tensors, or of raw bytes where `dtypes` names a type."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata(arch) if values is None else values).items():
        add = {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
        }
        (add | {list: writer.add_array})[type(value)](key, value)
    for name, value in content.items():
        writer.add_tensor(name, value, raw_dtype=KINDS[dtypes[name]] if name in (dtypes or {}) else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_of(folder, path, **changes):
    """The GPT-2 of a directory as llama.cpp's converter writes it: it transposes the weights of Conv1D."""
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
    names |= {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv"}
    names |= {"attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    content = {}
    for name, value in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("transformer.")
        is_conv1d = name.startswith("h.") and value.ndim == 2
        for old, new in names.items():
            name = name.replace(f"{old}.", f"{new}.")
        name = f"blk.{name.removeprefix('h.')}" if name.startswith("h.") else name
        content[name] = np.ascontiguousarray(value.T if is_conv1d else value)
    config = json.loads((folder / "config.json").read_text())
    values = {
        "gpt2.embedding_length": config["n_embd"],
        "gpt2.block_count": config["n_layer"],
        "gpt2.context_length": config["n_positions"],
        "gpt2.feed_forward_length": config["n_inner"] or 4 * config["n_embd"],
        "gpt2.attention.head_count": config["n_head"],
        "gpt2.attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "tokenizer.ggml.eos_token_id": 7,
    }
    values = {key: value for key, value in (values | changes).items() if value is not None}
    return write(path, content, values, "gpt2")
