"""GGUF adapters, the files of llama.cpp's `--lora`, written from PEFT directories.

For a weight NAME of the base, `NAME.lora_a` (r, in) and `NAME.lora_b` (out, r) hold PEFT's A and B; for the
embedding `lora_a` is (vocab, r). llama.cpp adds alpha / r · B A, with one alpha for the file. Names, keys and
layouts are those of its `convert_lora_to_gguf.py`; for GPT-2 those that `src/llama-adapter.cpp` requires, since the
script transposes the factors of its layers, which llama.cpp then rejects.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._utils.atomic import atomic_write
from .._utils.validation import check_choice, raise_problems, suggest
from ..adapter.tree import flatten
from ..interop.adapter_directory import host_array
from ..interop.path_map import FACTOR, MAGNITUDE_END
from ..interop.peft_adapter_config import PeftOptions
from ..interop.peft_files import OWN_TENSORS_FILE, read_peft
from ..models.checkpoints.gguf.load import (
    ARCHITECTURE_OF,
    interleaved_heads,
    rotary_order,
    to_gguf_name,
)
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.name_table import expand, shape_in_file
from ..models.families import family_of
from .write_gguf import DTYPES, storage_type

ALPHA, TYPE = "adapter.lora.alpha", "adapter.type"
_TIED = "the embedding is also the head, to which llama.cpp cannot apply an adapter"
_MERGE = "merge it into the weights instead: loraplus export --merged, or loraplus convert --to merged"


class SavedAdapter(NamedTuple):
    """What `save_gguf_adapter` wrote.

    Attributes:
      file: the file.
      architecture: llama.cpp's name of the base's architecture.
      dtype: storage type, one of `DTYPES`.
      modules: number of adapted modules.
      alpha: the alpha of the file.
      factors: for each module with another s · r than alpha, what its B was multiplied by.
    """

    file: Path
    architecture: str
    dtype: str
    modules: int
    alpha: float
    factors: Mapping[str, float]

    def describe(self) -> str:
        """One line on the file, and one on scales that are in B."""
        lines = [
            f"{self.file}: GGUF adapter, architecture {self.architecture}, adapted modules {self.modules}, "
            f"alpha {self.alpha:g}, {self.dtype}"
        ]
        if self.factors:
            # Only a power of two leaves every digit of B as it is.
            exact = all(math.frexp(factor)[0] == 0.5 for factor in self.factors.values())
            name, factor = next(iter(self.factors.items()))
            more = f" and {len(self.factors) - 1} more" if len(self.factors) > 1 else ""
            lines.append(
                f"scales other than alpha / rank are in B, {'exactly' if exact else 'rounded to float32'}: "
                f"{name} × {factor:g}{more}"
            )
        return "\n".join(lines)


class _Module(NamedTuple):
    """A module of the base.

    Attributes:
      tensor: name of its weight in a GGUF file; None if it has none.
      shape: out and in; of an embedding dim and vocab, as PEFT has it.
      heads: number of heads in its outputs, if the file interleaves the two halves of each; else 0.
      is_embedding: whether it is the embedding of the tokens.
      unsupported: why llama.cpp does not compute its adapter; empty if it does.
    """

    tensor: str | None
    shape: tuple[int, ...]
    heads: int
    is_embedding: bool
    unsupported: str


def save_gguf_adapter(file: Path, peft: Path, base: ModelFiles, *, dtype: str = "float16") -> SavedAdapter:
    """Converts an adapter in PEFT's format to a GGUF adapter, atomically.

    A scale that differs between modules, as of rank patterns with rsLoRA, is multiplied into B in float32.
    The copy of an adapted embedding's weight that PEFT saves next to the factors is left out.

    Args:
      file: the new file; an existing one is never overwritten.
      peft: directory with `adapter_config.json` and `adapter_model.safetensors`.
      base: the files of the base model, of which the config suffices.
      dtype: storage type of the factors, one of `DTYPES`; where rows do not divide into blocks, Q8_0 becomes F16.

    Returns:
      What was written; `describe()` is its text.

    Raises:
      FileNotFoundError, ValueError: as in `read_peft` and `ModelFiles.config`; or the base's architecture is
        unsupported; or the adapter has DoRA, weights or biases trained in full, or modules that llama.cpp does not
        adapt (lists all); or a value is too large for `dtype`; or the file exists.
    """
    check_choice("dtype", dtype, tuple(DTYPES))
    options, tensors = read_peft(peft)
    architecture, modules = _modules(base)
    pairs, problems = _pairs(tensors, options, modules)
    if (peft / OWN_TENSORS_FILE).is_file():
        problems.append(
            f"{OWN_TENSORS_FILE} has weights trained in full, and a GGUF adapter has only A and B"
        )
    raise_problems(f"llama.cpp cannot serve this adapter without merging; {_MERGE}", problems)
    settings = options.ranks_and_alphas(list(pairs))
    # In float32, as the file stores alpha.
    alphas = {name: float(np.float32(options.scale(*each) * each[0])) for name, each in settings.items()}
    # Most modules keep the values of their B.
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    factors = {name: value / alpha for name, value in alphas.items() if value != alpha}
    stored = {}
    for name, (a, b) in pairs.items():
        module = modules[name]
        b = (b * factors.get(name, 1.0)).astype(np.float32)
        if module.heads:
            rows = np.empty_like(b)
            rows[rotary_order(len(b), module.heads)] = b
            b = rows
        stored[f"{module.tensor}.lora_a"] = a.T if module.is_embedding else a
        stored[f"{module.tensor}.lora_b"] = b
    with atomic_write(file.resolve(), new=True) as partial:
        _write(partial, stored, architecture, alpha, dtype)
    return SavedAdapter(file, architecture, dtype, len(pairs), alpha, factors)


def _modules(base: ModelFiles) -> tuple[str, dict[str, _Module]]:
    """The base's architecture in llama.cpp, and its modules by Hugging Face's name."""
    values = base.config
    kind: Any = values.get("model_type")
    try:
        check_choice(f"{base}: model_type", kind, tuple(ARCHITECTURE_OF))
    except ValueError as error:
        raise ValueError(
            f"{error}; {_MERGE}, and convert that with llama.cpp's convert_hf_to_gguf.py"
        ) from None
    architecture, family = ARCHITECTURE_OF[kind], family_of(kind)
    config: Any = family.config.from_hf(values)
    table, ids = family.name_table(config), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = flatten(jax.eval_shape(family.model(config).init, jax.random.key(0), ids)["params"])
    modules = {}
    for rule in table.rules:
        _, _, leaf = rule.path.rpartition("/")
        if leaf not in ("kernel", "embedding"):
            continue
        shape = shape_in_file(rule, shapes[rule.path])
        out_in = shape if rule.transposed else shape[::-1]
        for name in expand(rule, shapes[rule.path]):
            full = name if rule.path.startswith("lm_head/") else family.prefix + name
            tensor = to_gguf_name(full, architecture)
            unsupported, is_tokens = "", tensor == "token_embd.weight"
            if leaf == "embedding" and not is_tokens:
                unsupported = "llama.cpp ignores adapters on the embedding of positions"
            elif is_tokens and config.tie_word_embeddings:
                unsupported = _TIED
            heads = interleaved_heads(tensor or "", architecture, vars(config))
            modules[full.removesuffix(".weight")] = _Module(tensor, out_in, heads, is_tokens, unsupported)
    for copy, _ in table.copies:
        tensor = to_gguf_name(copy, architecture)
        modules[copy.removesuffix(".weight")] = _Module(tensor, (), 0, False, _TIED)
    return architecture, modules


def _pairs(
    tensors: Mapping[str, Any], options: PeftOptions, modules: Mapping[str, _Module]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """A (r, in) and B (out, r) of each module in float32; and one line for each tensor that a file cannot hold."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    problems = ["use_dora is true: llama.cpp does not compute DoRA"] if options.use_dora else []
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        owner = name.removesuffix(".base_layer.weight")
        if match and match[1] in modules and not modules[match[1]].unsupported:
            factors.setdefault(match[1], {})[match[2]] = host_array(tensor).astype(np.float32)
        elif match and match[1] in modules:
            problems.append(f"{name}: {modules[match[1]].unsupported}")
        elif match:
            problems.append(f"{name}: the base has no such layer{suggest(match[1], modules, fallback=False)}")
        elif name.endswith(MAGNITUDE_END):
            problems.append(f"{name}: llama.cpp does not compute DoRA")
        elif owner == name or owner not in modules:
            problems.append(f"{name} is trained in full, and a GGUF adapter has only A and B")
    pairs = {}
    for name, (rank, _) in options.ranks_and_alphas(list(factors)).items():
        pair = factors[name]
        if missing := {"A", "B"} - pair.keys():
            problems.append(f"{name}: {missing.pop()} is missing")
        elif problem := _shape_problem(name, pair["A"], pair["B"], modules[name], rank):
            problems.append(problem)
        else:
            pairs[name] = pair["A"], pair["B"]
    if not factors and not problems:
        problems.append("it has no factors")
    return pairs, problems


def _shape_problem(
    name: str, a: np.ndarray, b: np.ndarray, module: _Module, rank: int | None = None
) -> str | None:
    (out, inner), rank = module.shape, rank or a.shape[0]
    if a.shape == (rank, inner) and b.shape == (out, rank):
        return None
    return f"~ {name}: A and B must be {(rank, inner)} and {(out, rank)}, got {a.shape} and {b.shape}"


def _write(
    path: Path, tensors: Mapping[str, np.ndarray], architecture: str, alpha: float, dtype: str
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(TYPE, "lora")
        writer.add_float32(ALPHA, alpha)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, values in tensors.items():
            kind = storage_type(values.shape, dtype)
            if kind == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > (most := np.finfo("f2").max):
                raise ValueError(f"{name} has values above {most:g}, float16's largest; use dtype float32")
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
