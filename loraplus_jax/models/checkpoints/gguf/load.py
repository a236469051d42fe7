"""Reads GGUF files as Hugging Face checkpoints: metadata as `config.json`, tensors dequantized and renamed."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ...config import Kind
from ...families import KINDS
from ...gpt2.config import NAMES as GPT2_NAMES
from ...llama.config import KINDS as LLAMA_KINDS
from .header import Gguf, TensorInfo

DTYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
"""Supported tensor types."""
ARCHITECTURE_OF = {name: kind.gguf for name, kind in KINDS.items() if kind.gguf}
"""The architecture of a GGUF file for each `model_type` of `config.json`."""

# Layers of the 27B models, the only ones whose scores llama.cpp does not divide by the root of a head's size.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_EMBEDDING, _HEAD, ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
# Hugging Face's name of each size, and its GGUF key without the architecture's prefix.
_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
_EPSILON, _LAYER_EPSILON = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_ORIGINAL = "original_context_length"
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def config(file: Gguf) -> dict[str, Any]:
    """The metadata in the form of Hugging Face's `config.json`.

    `rope_scaling` may have the type `"factors"`, which exists only here: divisors of the frequencies, which Llama 3
    files store instead of the four numbers that define them.

    Raises:
      ValueError: the file holds an adapter, the architecture is unsupported, or sizes are missing or invalid; lists
        all problems.
    """
    if (kind := file.one("general.type", "model")) != "model":
        raise ValueError(f"{file.path} is no model: its general.type is {kind!r:.80}")
    values = _gpt2_config(file) if file.architecture == "gpt2" else _llama_config(file)
    values |= {f"{end}_token_id": file.one(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos")}
    return {key: value for key, value in values.items() if value is not None}


def _sizes(file: Gguf) -> dict[str, Any]:
    sizes = {ours: file.get(key) for ours, key in _SIZES.items()}
    sizes["num_key_value_heads"] = file.get("attention.head_count_kv", sizes["num_attention_heads"])
    invalid = {ours: n for ours, n in sizes.items() if type(n) is not int or n < 1}
    _raise_if_any(
        file, [f"{ours} must be an int of at least 1, got {n!r:.80}" for ours, n in invalid.items()]
    )
    return sizes


def _gpt2_config(file: Gguf) -> dict[str, Any]:
    sizes = _sizes(file)
    only = {"attention.head_count_kv": sizes["num_attention_heads"], "attention.causal": True}
    _raise_if_any(file, _option_problems(file, _LAYER_EPSILON, only))
    return {
        "model_type": "gpt2",
        "vocab_size": embedding_rows(file),
        **{theirs: sizes[ours] for ours, theirs in GPT2_NAMES.items()},
        "activation_function": "gelu_new",
        "layer_norm_epsilon": file.get(_LAYER_EPSILON),
        "tie_word_embeddings": _HEAD not in file.tensors,
    }


def _llama_config(file: Gguf) -> dict[str, Any]:
    arch, sizes = file.architecture, _sizes(file)
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    head = file.get("attention.key_length", hidden // heads)
    scaling, problems = _rope_scaling(file)
    window = file.get("attention.sliding_window")
    # Types with one architecture differ in having a window.
    kinds = {name: kind for name, kind in LLAMA_KINDS.items() if kind.gguf == arch}
    first, *_ = kinds
    model_type = next((name for name, kind in kinds.items() if kind.windows == bool(window)), first)
    kind = kinds[model_type]
    only = {"attention.value_length": head, "rope.dimension_count": head, "expert_count": 0}
    only |= {"attention.causal": True} | ({} if kind.windows else {"attention.sliding_window": 0})
    _raise_if_any(file, [*_option_problems(file, _EPSILON, only), *problems])
    values = {
        "model_type": model_type,
        "vocab_size": embedding_rows(file),
        **sizes,
        "head_dim": head,
        kind.activation: kind.defaults.get(kind.activation, "silu"),
        "rms_norm_eps": file.get(_EPSILON),
        "rope_theta": file.get("rope.freq_base", 10_000.0),
        "rope_scaling": scaling,
        "tie_word_embeddings": _HEAD not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "sliding_window": window,
        **{name: file.get(key) for name, key in kind.gguf_options.items()},
    }
    if (largest := _GEMMA_27B.get(arch)) is not None:
        values["query_pre_attn_scalar"] = hidden // heads if sizes["num_hidden_layers"] == largest else head
    return values


def _raise_if_any(file: Gguf, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{file.path}: " + "; ".join(problems))


def embedding_rows(file: Gguf) -> int | None:
    """Rows of the embedding, or None if the file does not say."""
    if _EMBEDDING in file.tensors:
        return file.tensors[_EMBEDDING].shape[0]
    return file.get("vocab_size")


def _option_problems(file: Gguf, epsilon: str, only: Mapping[str, Any]) -> list[str]:
    """One line for an invalid epsilon, and per option with another than its only supported value."""
    invalid = (
        [] if _positive(file.get(epsilon)) else [f"{file.architecture}.{epsilon} must be a positive number"]
    )
    return invalid + [
        f"{file.architecture}.{key} is {file.get(key)!r:.80}, only {value!r:.80} is supported"
        for key, value in only.items()
        if file.get(key, value) != value
    ]


def _rope_scaling(file: Gguf) -> tuple[dict[str, Any] | None, list[str]]:
    """`rope_scaling`, and one line per problem in it."""
    prefix = f"{file.architecture}.rope.scaling."
    options = {key.removeprefix(prefix): file.one(key) for key in file.metadata if key.startswith(prefix)}
    if (linear := file.get("rope.scale_linear", 1)) != 1:
        options = {"type": "linear", "factor": linear} | options
    kind = options.pop("type", "none")
    options.pop("finetuned", None)
    factors = _rope_factors(file)
    if kind == "none":
        return None if factors is None else {"rope_type": "factors", "factors": factors}, []
    # Some files state the original length although linear scaling ignores it.
    allowed = {"linear": ("factor", _ORIGINAL), "yarn": ("factor", _ORIGINAL, "attn_factor", *_YARN)}
    if kind not in allowed or factors is not None:
        also = "" if factors is None else f" beside the tensor {ROPE}"
        return None, [
            f"{prefix}type is {kind!r:.80}{also}; supported: none, linear, yarn, or only the tensor {ROPE}"
        ]
    unknown = sorted(set(options) - set(allowed[kind]))
    problems = [f"{prefix}{key:.80} is not supported with type {kind}" for key in unknown]
    problems += [
        f"{prefix}{key} must be a positive number, got {value!r:.80}"
        for key, value in ({"factor": None} | options).items()
        if not _positive(value)
    ]
    if problems:
        return None, problems
    factor = options["factor"]
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {ours: options[key] for key, ours in _YARN.items() if key in options}
        if _ORIGINAL in options:
            scaling["original_max_position_embeddings"] = options[_ORIGINAL]
        if (temperature := options.get("attn_factor", 1)) != 1:  # on top of YaRN's own
            scaling["attention_factor"] = temperature * (0.1 * math.log(max(factor, 1)) + 1)
    return scaling, []


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _rope_factors(file: Gguf) -> list[float] | None:
    """Divisor of each rotary frequency; None if the file has none or all are 1."""
    if ROPE not in file.tensors:
        return None
    tensor = file.tensors[ROPE]
    if tensor.dtype != "F32" or len(tensor.shape) != 1:
        raise ValueError(
            f"{file.path}: {ROPE} must be 1-D and F32, got shape {list(tensor.shape)} of {tensor.dtype}"
        )
    factors = View(file, tensor)[:]
    if not np.all(np.isfinite(factors) & (factors > 0)):
        raise ValueError(f"{file.path}: {ROPE} must hold positive numbers, got {factors.tolist()!r:.80}")
    return None if np.all(factors == 1) else [float(str(f)) for f in factors]


@dataclass(frozen=True)
class View:
    """A lazy tensor with safetensors' slice interface: `view[start:stop]` dequantizes only those rows.

    For a matrix, `view[start:stop, first:last]` reads only the blocks that contain these columns.

    Attributes:
      heads: number of heads in the rows, if the file interleaves the two halves of each; else 0.
      transposed: whether Hugging Face has the matrix transposed; rows are then its own, the file's columns.
      offset: what the file's values have more than Hugging Face's: 1 in the norms of Gemma.
    """

    file: Gguf
    tensor: TensorInfo
    heads: int = 0
    transposed: bool = False
    offset: float = 0.0
    supported: ClassVar[Sequence[str]] = DTYPES

    def get_shape(self) -> list[int]:
        """The shape, rows first."""
        return list(reversed(self.tensor.shape) if self.transposed else self.tensor.shape)

    def get_dtype(self) -> str:
        """GGUF's name of the type: `"F16"`, `"Q4_K"`."""
        return self.tensor.dtype

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        """Float32 values, with the rows of each head in Hugging Face's order."""
        import gguf

        rows, *columns = index if isinstance(index, tuple) else (index,)
        if self.transposed:
            turned = dataclasses.replace(self, transposed=False)
            return turned[(*(columns or [slice(None)]), rows)].T
        raw, kind = self._raw, gguf.GGMLQuantizationType[self.tensor.dtype]
        if len(self.tensor.shape) == 1:
            values = gguf.quants.dequantize(raw, kind) - np.float32(self.offset)
            return values[self._order[rows]] if self.heads else values[rows]
        raw_rows = raw[self._order[rows]] if self.heads else raw[rows]
        if len(columns) != 1 or len(self.tensor.shape) != 2:
            values = gguf.quants.dequantize(raw_rows, kind).reshape(-1, *self.tensor.shape[1:])
            return values[(slice(None), *columns)]
        start, stop, _ = columns[0].indices(self.tensor.shape[1])
        block, size = gguf.GGML_QUANT_SIZES[kind]
        # Whole blocks: the values of one share a scale.
        first = start // block
        values = gguf.quants.dequantize(raw_rows[:, first * size : -(-stop // block) * size], kind)
        return values[:, start - first * block : stop - first * block]

    def packed_rows(self) -> np.ndarray:
        """The bytes of the whole matrix, uint8 (rows, bytes of a row), with the rows in Hugging Face's order.

        Rows are those of the file, also of a `transposed` matrix.
        """
        return self._raw[self._order] if self.heads else self._raw

    def restored(self, values: np.ndarray) -> np.ndarray:
        """Turns a tensor from Hugging Face's layout to the file's."""
        if self.transposed:
            return values.T
        if not self.heads:
            return values + np.float32(self.offset)
        rows = np.empty_like(values)
        rows[self._order] = values
        return rows

    @cached_property
    def _raw(self) -> np.ndarray:
        # A view of the mapped file: nothing is read before rows are.
        t = self.tensor
        raw = np.frombuffer(self.file.data, np.uint8, t.size, t.start)
        return raw if len(t.shape) == 1 else raw.reshape(t.shape[0], -1)

    @cached_property
    def _order(self) -> np.ndarray:
        rows = self.tensor.shape[0]
        if rows % (2 * self.heads):
            raise ValueError(
                f"{self.file.path}: {rows} rows of queries or keys do not divide into {self.heads} heads "
                "of even size"
            )
        return rotary_order(rows, self.heads)


def views(file: Gguf) -> dict[str, View]:
    """The tensors by Hugging Face's names; an unknown tensor keeps its name.

    Includes all tensors except the rotary factors, which are part of the config.
    """
    sizes, kind = config(file), _kind(file.architecture)
    found: dict[str, View] = {}
    for name, tensor in file.tensors.items():
        if (ours := to_hf_name(name, file.architecture)) in found:
            raise ValueError(f"{file.path} has two tensors for {ours:.80}")
        if name != ROPE:
            heads = interleaved_heads(name, file.architecture, sizes)
            transposed = name.removesuffix(".weight").rpartition(".")[2] in kind.transposed
            offset = kind.norm_offset if len(tensor.shape) == 1 else 0.0
            found[ours] = View(file, tensor, heads, transposed, offset)
    return dict(sorted(found.items()))


def interleaved_heads(name: str, architecture: str, config: Mapping[str, Any]) -> int:
    """The number of heads in the rows of a tensor, if the file interleaves the two halves of each; else 0.

    `config` has the sizes that `config` returns.
    """
    attention = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if attention is None or not _kind(architecture).interleaved:
        return 0
    return config["num_attention_heads" if attention[1] == "q" else "num_key_value_heads"]


def rotary_order(rows: int, heads: int) -> np.ndarray:
    """The row of the file in which each of Hugging Face's rows of queries or keys is.

    llama.cpp keeps rotary pairs in adjacent rows; Hugging Face has them half a head apart.

    >>> rotary_order(8, heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def to_hf_name(name: str, architecture: str) -> str:
    """Hugging Face's name for a tensor of a GGUF file; an unknown tensor keeps its name."""
    kind = _kind(architecture)
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in kind.gguf_names:
        return name
    layer = "" if match[1] is None else f"{kind.layers}.{match[1]}."
    return f"{layer}{kind.gguf_names[match[2]]}.{match[3]}"


def to_gguf_name(name: str, architecture: str) -> str | None:
    """The name in a GGUF file of Hugging Face's tensor, or None if it has none.

    >>> to_gguf_name("model.layers.3.self_attn.q_proj.weight", "llama")
    'blk.3.attn_q.weight'
    """
    kind = _kind(architecture)
    names = {theirs: ours for ours, theirs in kind.gguf_names.items()}
    match = re.fullmatch(rf"(?:{re.escape(kind.layers)}\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if not match or match[2] not in names:
        return None
    layer = "" if match[1] is None else f"blk.{match[1]}."
    return f"{layer}{names[match[2]]}.{match[3]}"


def _kind(architecture: str) -> Kind:
    """What the types with an architecture share."""
    return next(kind for kind in KINDS.values() if kind.gguf == architecture)
