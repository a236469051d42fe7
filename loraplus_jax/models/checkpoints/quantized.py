"""Which weights of a model are packed, in which format, and how they are read from its files leaf by leaf."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..._utils.validation import suggest
from ...adapter.config import matches
from ...quantization.formats import BLOCK_BYTES, FormatName, pack_matrix
from ...quantization.packed_array import PackedArray, packed_shape
from ..choices import Quantize
from .model_files import ModelFiles
from .name_table import NameTable, Rule, expand

HEADS = ("lm_head", "pooler", "head")
"""Modules whose kernels stay as they are unless the user says otherwise; so do embeddings."""


def choose_formats(
    table: NameTable, quantize: Quantize, exclude: Sequence[str] | None, files: ModelFiles
) -> dict[str, FormatName]:
    """The format of each weight to pack, by path.

    Args:
      table: the model's name table.
      quantize: `"nf4"` or `"int8"`; or `"file"`, for the blocks of a GGUF file as they are.
      exclude: names of modules whose weights stay as they are; None for embeddings and `HEADS`.
      files: the model's files.

    Raises:
      ValueError: a name matches no weight, or with `"file"` the files store no weight in blocks, as only GGUF files
        do, or the layers of a weight in several formats.
    """
    if quantize == "none":
        return {}
    weights = [r for r in table.rules if r.path.rpartition("/")[2] in ("kernel", "embedding")]
    modules = {rule.path: rule.path.rpartition("/")[0] for rule in weights}
    for name in exclude or ():
        if not any(matches((name,), module) for module in modules.values()):
            raise ValueError(
                f"model.quantize_exclude: {name!r} matches no weight{suggest(name, modules.values())}"
            )
    if exclude is None:
        weights = [r for r in weights if r.path.endswith("/kernel") and not matches(HEADS, modules[r.path])]
    else:
        weights = [r for r in weights if not matches(tuple(exclude), modules[r.path])]
    if quantize != "file":
        return dict.fromkeys((rule.path for rule in weights), quantize)
    return _formats_in_file(table, weights, files)


def _formats_in_file(table: NameTable, weights: Sequence[Rule], files: ModelFiles) -> dict[str, FormatName]:
    kinds: dict[str, set[str]] = {}
    for name, view in files.tensors.items():
        kinds.setdefault(_general(table.canonical(name)), set()).add(view.get_dtype())
    found = {}
    for rule in weights:
        types = sorted(kinds.get(_general(rule.name), ()))
        if not any(name.lower() in BLOCK_BYTES for name in types):
            continue
        if len(types) > 1:
            raise ValueError(
                f"{files}: the layers of {rule.name} are stored as {' and '.join(types)}, but layers that run in a "
                "loop need one format: add its name to model.quantize_exclude, or set model.quantize nf4"
            )
        found[rule.path] = types[0].lower()
    if not found:
        raise ValueError(
            f"model.quantize file needs a GGUF file with weights in blocks, got {files}; nf4 and int8 pack the "
            "weights of any model"
        )
    return found


def _general(name: str) -> str:
    """A tensor's name with `{layer}` for the number of its layer."""
    return ".".join("{layer}" if part.isdigit() else part for part in name.split("."))


def pack_shapes(
    params: Mapping[str, Any], formats: Mapping[str, FormatName], table: NameTable
) -> dict[str, Any]:
    """Replaces shapes by those of packed weights, by path; paths that `params` lacks are left out."""
    rules = {rule.path: rule for rule in table.rules}
    return {
        path: packed_shape(
            formats[path],
            leaf.shape,
            transposed=path.endswith("/kernel"),
            stacked=rules[path].stacked,
            dtype=leaf.dtype,
        )
        if path in formats
        else leaf
        for path, leaf in params.items()
    }


def read_packed(
    rule: Rule, leaf: PackedArray, tensors: Mapping[str, Any], place: Callable[[str, np.ndarray], Any]
) -> PackedArray:
    """Reads a weight matrix by matrix; the host holds one matrix's values and the packed weight.

    Args:
      rule: the weight's rule.
      leaf: its shapes.
      tensors: lazy views of its tensors by canonical name, rows first.
      place: makes an array on the devices, of a part's name and its values on the host.
    """
    parts = {name: np.empty(part.shape, part.dtype) for name, part in leaf.parts.items()}
    matrices: dict[tuple[int, ...], list[Any]] = {}
    for name, (stack, _) in expand(rule, leaf).items():  # pyright: ignore[reportArgumentType]
        matrices.setdefault(stack, []).append(tensors[name])
    for stack, joined in matrices.items():
        if leaf.kind in BLOCK_BYTES:
            rows = [tensor.packed_rows()[rule.outputs] for tensor in joined]
        else:
            rows = [in_rows(rule, tensor[rule.index]) for tensor in joined]
        values = rows[0] if len(rows) == 1 else np.concatenate(rows)
        for name, part in pack_matrix(leaf.kind, values).items():
            parts[name][stack] = part
    # Popped one by one, so that the host frees a part once it is on the devices.
    return dataclasses.replace(leaf, parts={name: place(name, parts.pop(name)) for name in list(parts)})


def in_rows(rule: Rule, values: np.ndarray) -> np.ndarray:
    """A tensor of the file, or a packed weight's values, in the other's layout: rows are a kernel's outputs."""
    return values.T if rule.is_conv1d else values
