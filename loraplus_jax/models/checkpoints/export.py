"""Writes a tuned model for transformers: safetensors shards, `config.json` and tokenizer files.

Writes one tensor at a time; see `merged`. Also derives a model's path map for PEFT from its name table, so that
names are defined in one place.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ...adapter.tree import flatten
from ...interop.path_map import PathMap, torch_module_of
from ...interop.peft_adapter_config import raise_problems
from ...interop.peft_modules_to_save import name_leaves, slice_leaves
from ..bert.config import BertConfig
from ..bert.model import Pooling
from ..decoder import Config
from ..families import KINDS, family_of
from .hub_directory import INDEX_FILE, SINGLE_FILE, without_places, write_json
from .merge import TYPES, CheckpointMerge, OutputTensor, merged_tensors
from .model_files import ModelFiles
from .name_table import NameTable

SHARD_BYTES = 5 * 10**9
"""Maximum size of a shard (the default of transformers 4)."""
_HEADS = ("lm_head", "classifier")
_ENCODERS = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}


class TransformersClass(NamedTuple):
    """The transformers class that loads a model.

    Attributes:
      architecture: name of the class; empty if transformers has none.
      prefix: prefix of all module names except the heads'.
      heads: (our path, its name) of modules that the name table lacks or names differently.
      task_type: PEFT's task type.
      tied: our modules whose embedding is also the output head.
    """

    architecture: str
    prefix: str
    heads: tuple[tuple[str, str], ...]
    task_type: str | None
    tied: tuple[str, ...] = ()


def causal_lm_class(config: Config) -> TransformersClass:
    """The class of a language model."""
    tied = ("embed_tokens",) if config.tie_word_embeddings else ()
    family = family_of(config.model_type)
    return TransformersClass(KINDS[config.model_type].architecture, family.prefix, (), "CAUSAL_LM", tied)


def encoder_class(config: BertConfig, pooling: Pooling) -> TransformersClass:
    """The class of an encoder with a head: for sequences if transformers has the same head, else the bare encoder.

    In transformers, BERT's head follows the pooler and RoBERTa's contains a layer like a pooler. Neither supports
    mean pooling or the bare first token.
    """
    name = _ENCODERS[config.model_type]
    if pooling != "pooler":
        return TransformersClass(f"{name}Model", "", (), "FEATURE_EXTRACTION")
    if config.model_type == "bert":
        return TransformersClass(
            f"{name}ForSequenceClassification", "bert.", (("head", "classifier"),), "SEQ_CLS"
        )
    heads = (("pooler", "classifier.dense"), ("head", "classifier.out_proj"))
    return TransformersClass(f"{name}ForSequenceClassification", "roberta.", heads, "SEQ_CLS")


def path_map(table: NameTable, form: TransformersClass, *, prefix: str | None = None) -> PathMap:
    """Maps a model's modules to those of its transformers class.

    Args:
      table: the model's name table.
      form: the class.
      prefix: replaces the class's prefix, for adapters of the model without its head.
    """
    rules: dict[tuple[str, str], tuple[str, str] | tuple[str, str, str]] = {
        (ours, theirs): (ours, theirs) for ours, theirs in form.heads
    }
    head_modules = {ours for ours, _ in form.heads}
    prefix = form.prefix if prefix is None else prefix
    conv1d = {rule.path.rpartition("/")[0] for rule in table.rules if rule.is_conv1d}
    for rule in table.rules:
        (ours, _, leaf), name = rule.path.rpartition("/"), rule.name.rpartition(".")[0]
        theirs = name if name.split(".")[0] in _HEADS else prefix + name
        if leaf == "embedding":
            rules[ours, theirs] = (ours, theirs, "TiedEmbedding" if ours in form.tied else "Embedding")
        elif ours not in head_modules:
            if rule.part is not None:
                theirs += "[{}:{} of {}]".format(*rule.part)
            rules[ours, theirs] = (ours, theirs, "Conv1D") if ours in conv1d else (ours, theirs)
    rules |= {(ours, "lm_head"): (ours, "lm_head", "TiedHead") for ours in form.tied}
    return tuple(rules.values())


def write_hf(
    target: Path,
    source: ModelFiles,
    merge: CheckpointMerge,
    form: TransformersClass,
    *,
    new: Mapping[str, Any],
    config: Mapping[str, Any],
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a merged model into an empty directory.

    Args:
      target: the directory.
      source: the base.
      merge: merged values of its tensors.
      form: the class that loads the result.
      new: parameters that the base lacks and the class has, such as `{"params": {"head": ...}}`.
      config: fields to add to the base's `config.json`.
      dtype: dtype of the weights; by default each tensor's in the base, float32 if quantized. Merging always uses
        float32.
      shard_bytes: maximum size of a file, unless a single tensor is larger.

    Raises:
      ValueError: transformers cannot represent part of the model.
    """
    tensors = list(_named_tensors(source, merge, form, new))
    if dtype is not None:
        tensors = [dataclasses.replace(t, dtype=np.dtype(dtype)) if is_float(t.dtype) else t for t in tensors]
    dtypes = {t.dtype.name for t in tensors if is_float(t.dtype)}
    content = {**hf_config(source), **config}
    if form.architecture:
        content["architectures"] = [form.architecture]
    content.pop("torch_dtype", None)
    content["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    write_json(target / "config.json", without_places(content))
    source.copy_tokenizer(target)
    shards = _shards(tensors, shard_bytes)
    count = len(shards)
    names = (
        [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        if count > 1
        else [SINGLE_FILE]
    )
    for name, shard in zip(names, shards, strict=True):
        # Reads and merges its tensors only now, one at a time.
        write_safetensors(target / name, shard)
    if len(shards) > 1:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(map(_size, tensors))
        write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def hf_config(source: ModelFiles) -> dict[str, Any]:
    """The base's `config.json`, or its equivalent from a GGUF file's metadata.

    Raises:
      ValueError: the GGUF file has rotary factors, which transformers cannot read.
    """
    config = dict(source.config)
    if (config.get("rope_scaling") or {}).get("rope_type") == "factors":
        raise ValueError(
            f"{source} stores rotary frequency factors, which transformers' config.json cannot express; "
            "use --format gguf"
        )
    return config


def write_safetensors(path: Path, tensors: Iterable[OutputTensor]) -> None:
    """Writes a safetensors file one tensor at a time; the library's own writer needs all of them in memory.

    Format: https://github.com/huggingface/safetensors#format
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, end = {np.dtype(dtype): name for name, dtype in TYPES.items()}, 0
    for tensor in tensors:
        start, end = end, end + _size(tensor)
        header[tensor.name] = {
            "dtype": names[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the data, which the format wants aligned to 8 bytes; JSON may end in spaces.
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for rows in tensor.rows():
                # As bytes, because a file does not accept bfloat16.
                file.write(np.ascontiguousarray(rows, tensor.dtype).reshape(-1).view(np.uint8).data)


def _named_tensors(
    source: ModelFiles, merge: CheckpointMerge, form: TransformersClass, new: Mapping[str, Any]
) -> Iterator[OutputTensor]:
    """Yields all tensors under the names of the transformers class.

    A bare encoder or a language model keeps the file's names and extra tensors, except the copy of a tied head. A
    model with a new head gets the class's names and drops the file's old heads.
    """
    rules = path_map(merge.table, form)
    for tensor, canonical in merged_tensors(source, merge):
        if not form.heads:
            if canonical not in dict(merge.table.copies):
                yield tensor
        elif canonical in merge.locations:
            (rule, layer), *_ = merge.locations[canonical]
            location = torch_module_of(rules, rule.path.rpartition("/")[0])
            assert location is not None
            name = location.at(() if layer is None else (layer,))
            yield dataclasses.replace(tensor, name=f"{name}.{canonical.rpartition('.')[2]}")
    slots, problems = slice_leaves(flatten(new), rules)
    raise_problems(f"{form.architecture} has no module for some new parameters", problems)
    for name, array in name_leaves(slots, set(), rules)[0].items():
        yield OutputTensor(name, array.shape, array.dtype, lambda array=array: iter([array]))


def is_float(dtype: np.dtype) -> bool:
    """Whether a dtype is floating-point, bfloat16 included."""
    return jnp.issubdtype(dtype, jnp.floating)


def _size(tensor: OutputTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _shards(tensors: Iterable[OutputTensor], max_bytes: int) -> list[list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + _size(tensor) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _size(tensor)
    return shards
