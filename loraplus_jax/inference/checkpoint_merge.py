"""Merges adapters into a checkpoint's weights, one tensor of the file at a time.

Only the current tensor is in memory: the base stays on disk, memory-mapped.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..adapter.lora import adapted_weight
from ..adapter.spec import AdapterSpec, Specs
from ..adapter.tree import flatten
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.name_table import NameTable, Place, Rule, expand
from ..models.checkpoints.params import read_pieces
from ..models.checkpoints.quantized import in_rows
from ..quantization.formats import packed_values
from ..quantization.packed_array import PackedArray, is_packed


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write.

    Attributes:
      name: its name.
      shape: its shape in the output.
      dtype: its current dtype; the writer may use another.
      rows: yields its values in pieces along the first axis; a scalar in one piece.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[], Iterator[np.ndarray]]


class CheckpointMerge:
    """Computes the merged value of each tensor of a checkpoint.

    Args:
      table: the model's name table.
      leaves: the model's leaves in the checkpoint, as `check_params` returns them.
      specs: the adapted parameters; layers are stacked on axis 0, as in all models here.
      lora: the tree of factors.
      extras: fully trained variables, `{"params": ...}`; they replace the base's.
      dequantize: whether to merge into the values of the base as packed, where `leaves` has a `PackedArray`.
        `rounding` then tells how far they are from the checkpoint's, once the tensors are written.
    """

    def __init__(
        self,
        table: NameTable,
        leaves: Mapping[str, Any],
        specs: Specs,
        lora: Mapping[str, Any],
        extras: Mapping[str, Any],
        *,
        dequantize: bool = False,
    ) -> None:
        self.packed = {path: leaf for path, leaf in leaves.items() if dequantize and is_packed(leaf)}
        self._squares = np.zeros(2)  # of the rounding, and of the checkpoint's values
        self.table, self.factors, self.extras = table, flatten(lora), flatten(extras)
        self.specs = {spec.leaf: (key, spec) for key, spec in specs.items()}
        self.locations: dict[str, list[tuple[Rule, Place]]] = {}
        self.joined: dict[tuple[str, tuple[int, ...]], list[str]] = {}  # the tensors of each matrix
        for rule in table.rules:
            if f"params/{rule.path}" in self.specs:
                _check_stack(self.specs[f"params/{rule.path}"][1], rule)
            for name, place in expand(rule, leaves[rule.path]).items():
                self.locations.setdefault(name, []).append((rule, place))
                self.joined.setdefault((rule.path, place.stack), []).append(name)
        self.locations |= {name: self.locations[original] for name, original in table.copies}

    @property
    def rounding(self) -> float:
        """The norm of the difference between packed values and the checkpoint's, relative to theirs."""
        return float(np.sqrt(self._squares[0] / max(self._squares[1], np.finfo(float).tiny)))

    def changes(self, name: str) -> bool:
        """Whether merging changes the tensor with this canonical name."""
        paths = [rule.path for rule, _ in self.locations.get(name, ())]
        leaves = (*self.specs, *self.extras)
        return any(path in self.packed or f"params/{path}" in leaves for path in paths)

    def value(self, name: str, base: Callable[[str], np.ndarray]) -> np.ndarray:
        """The merged tensor in the file's layout, float32; `base` reads a tensor of the base, only if needed."""
        first, *others = self.locations[name]
        if first[0].part is None:
            return self._value(name, *first, base)
        # A copy: the base may be a view of the mapped file.
        result = base(name).astype(np.float32)
        for rule, place in (first, *others):
            result[rule.index] = self._value(name, rule, place, lambda _, index=rule.index: result[index])
        return result

    def _value(self, name: str, rule: Rule, place: Place, base: Callable[[str], np.ndarray]) -> np.ndarray:
        leaf = f"params/{rule.path}"
        if leaf in self.extras:
            value = np.asarray(self.extras[leaf][place.in_leaf], np.float32)
            return value.T if rule.transposed else value
        result = base(name).astype(np.float32)
        if rule.path in self.packed:
            # A matrix is packed as a whole, with the tensors that it is joined of.
            names = self.joined[rule.path, place.stack]
            joined = [in_rows(rule, result if n == name else base(n).astype(np.float32)) for n in names]
            packed = self._packed(np.concatenate(joined), self.packed[rule.path])
            result = in_rows(rule, packed[place.outputs or slice(None)])
        if leaf in self.specs:
            key, spec = self.specs[leaf]
            whole = (*place.stack, *(slice(None) for _ in spec.shape[rule.stacked :]))
            index = dict(zip(spec.base_letters, whole, strict=True))
            if place.outputs is not None:
                index[spec.base_letters[-1]] = place.outputs
            factors: Any = [
                np.asarray(self.factors[factor.path])[
                    tuple(index.get(c, slice(None)) for c in factor.letters)
                ]
                for factor in spec.factors_of(key)
            ]
            matrix = result.T if rule.transposed else result
            axes = spec.axes[rule.stacked - len(spec.stacked) :]
            spec = dataclasses.replace(spec, axes=axes, shape=matrix.shape, stacked=(), layers=None)
            merged = np.asarray(adapted_weight(matrix, factors, spec))
            result = merged.T if rule.transposed else merged
        return result

    def _packed(self, values: np.ndarray, leaf: PackedArray) -> np.ndarray:
        rounded = packed_values(leaf.kind, values).astype(leaf.dtype).astype(np.float32)
        self._squares += np.square(rounded - values).sum(), np.square(values).sum()
        return rounded


def _check_stack(spec: AdapterSpec, rule: Rule) -> None:
    """Raises ValueError unless each tensor that a leaf stacks has an A and a B of its own."""
    if not set(spec.base_letters[: rule.stacked]) <= set.intersection(*map(set, spec.factor_letters)):
        what, example = ("layer", "lio") if rule.stacked == 1 else ("layer and expert", "leio")
        raise ValueError(
            f"{spec.leaf}: the files have one tensor for each {what}, but axes {spec.axes!r} share A or B between "
            f"them: give each of the first axes a letter of its own in lora.target_parameters, such as {example!r}"
        )


def merged_tensors(source: ModelFiles, merge: CheckpointMerge) -> Iterator[tuple[OutputTensor, str]]:
    """Yields every tensor of a checkpoint, merged if adapted, and its canonical name.

    Tensors keep the file's names; those of a GGUF file get Hugging Face's.
    """
    views = {merge.table.canonical(name): view for name, view in source.tensors.items()}
    for name, view in source.tensors.items():
        canonical, shape = merge.table.canonical(name), tuple(view.get_shape())
        # Called later: bound to this tensor by arguments, since the loop's variables change.
        if merge.changes(canonical):
            rows = functools.partial(_merged_rows, merge, canonical, views)
        else:
            rows = functools.partial(read_pieces, view)
        yield OutputTensor(name, shape, dtype_of(view.get_dtype()), rows), canonical


def _merged_rows(merge: CheckpointMerge, canonical: str, views: Mapping[str, Any]) -> Iterator[np.ndarray]:
    yield merge.value(canonical, lambda name: views[name][:])


def dtype_of(name: str) -> np.dtype:
    """The dtype of a safetensors or GGUF type; float32 for quantized types, which are read as float32."""
    return np.dtype(TYPES.get(name, np.float32))


TYPES: Mapping[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "BOOL": np.bool_,
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
"""Safetensors' names of dtypes."""
