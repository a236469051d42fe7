"""Writes a tuned model for transformers: safetensors shards, `config.json` and tokenizer files.

Writes one tensor at a time.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._utils.validation import raise_problems
from ..adapter.tree import flatten
from ..interop.path_map import torch_module_of
from ..interop.peft_modules_to_save import leaves_to_torch
from ..models.checkpoints.hub_directory import INDEX_FILE, SINGLE_FILE, without_places, write_json
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.transformers_class import TransformersClass, path_map
from .checkpoint_merge import TYPES, CheckpointMerge, OutputTensor, merged_tensors

SHARD_BYTES = 5 * 10**9
"""Maximum size of a shard (the default of transformers 4)."""


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
            (rule, place), *_ = merge.locations[canonical]
            location = torch_module_of(rules, rule.path.rpartition("/")[0])
            assert location is not None
            name = location.at(place.stack)
            yield dataclasses.replace(tensor, name=f"{name}.{canonical.rpartition('.')[2]}")
    tensors, _, problems = leaves_to_torch(flatten(new), (), rules)
    raise_problems(f"{form.architecture} has no module for some new parameters", problems)
    for name, array in tensors.items():
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
