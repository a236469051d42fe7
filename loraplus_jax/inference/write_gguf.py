"""Exports a tuned model to GGUF: copies the base file's metadata and tokenizer and merges the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..models.checkpoints.gguf.file import GgufFile
from ..models.checkpoints.gguf.header import Gguf
from ..models.checkpoints.gguf.load import ROPE, View, to_hf_name, views
from .checkpoint_merge import CheckpointMerge

DTYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
"""Storage types of matrices; tensors with one axis are always float32, as llama.cpp requires."""


def write_gguf(target: Path, source: GgufFile, merge: CheckpointMerge, dtype: str) -> None:
    """Writes a merged model, one tensor at a time.

    Args:
      target: the new file.
      source: the base.
      merge: merged values of its tensors.
      dtype: storage type of matrices, one of `DTYPES`; where rows do not divide into blocks, Q8_0 becomes F16.
    """
    import gguf

    file, weights = source.header, views(source.header)
    kinds = {name: storage_type(tensor.shape, dtype) for name, tensor in file.tensors.items()}
    reader, writer = gguf.GGUFReader(file.path), gguf.GGUFWriter(target, file.architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        inner = field.types[-1] if is_list else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    file_types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[DTYPES[dtype]]])
    writer.data_alignment = reader.alignment
    quantize = gguf.quants.quantize
    for name, tensor in file.tensors.items():
        # One row of zeros shows the stored shape and size of a row.
        sample = quantize(np.zeros((1, tensor.shape[-1]), np.float32), kinds[name])
        shape = (*tensor.shape[:-1], sample.shape[-1])
        size = int(np.prod(shape)) * sample.itemsize
        writer.add_tensor_info(name, shape, sample.dtype, size, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for name in file.tensors:
            # Not bound to a name, so that only one tensor is in memory.
            writer.write_tensor_data(quantize(_read_merged(file, weights, merge, name), kinds[name]))
    finally:
        writer.close()


def _read_merged(file: Gguf, weights: Mapping[str, View], merge: CheckpointMerge, name: str) -> np.ndarray:
    """A tensor, merged if adapted, in the file's order of rows, float32."""
    # Rotary factors are part of our config, so no weight of the model.
    if name == ROPE:
        return View(file, file.tensors[name])[:]
    ours = to_hf_name(name, file.architecture)
    view, canonical = weights[ours], merge.table.canonical(ours)
    if not merge.changes(canonical):
        return view.restored(view[:])
    return view.restored(merge.value(canonical, lambda _: view[:]))


def storage_type(shape: tuple[int, ...], dtype: str) -> Any:
    """The `GGMLQuantizationType` in which a tensor of this shape is stored, for one of `DTYPES`."""
    import gguf

    types = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return types.F32
    kind = types[DTYPES[dtype]]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else types.F16
