"""Merges adapters into a checkpoint's weights, one tensor of the file at a time.

Only the current tensor is in memory: the base stays on disk, memory-mapped.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..lora import weight_delta
from ..spec import Specs
from ..tree import flatten
from .hf import weight_files
from .name_table import NameTable, Rule, expand

_PIECE = 2**22  # bytes that are read at a time where a tensor is only copied


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written.

    Attributes:
      name: its name.
      shape: as it is written.
      dtype: in which it is kept now; whoever writes it may take another.
      rows: its contents in pieces along the first axis, or a scalar in one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[], Iterator[np.ndarray]]


class CheckpointMerge:
    """The merged value of each tensor of a checkpoint.

    Args:
      table: the model's name table.
      leaves: its leaves that come from the checkpoint, as `check_params` returns them.
      specs: what is adapted; stacked layers lie on axis 0, as in all models here.
      lora: the tree of factors.
      extras: variables trained in full, `{"params": ...}`; they replace the base's.
    """

    def __init__(
        self,
        table: NameTable,
        leaves: Mapping[str, Any],
        specs: Specs,
        lora: Mapping[str, Any],
        extras: Mapping[str, Any],
    ) -> None:
        self.table, self.factors, self.extras = table, flatten(lora), flatten(extras)
        self.specs = {spec.leaf: (key, spec) for key, spec in specs.items()}
        if unsupported := [spec.leaf for spec in specs.values() if spec.stacked not in ((), (0,))]:
            raise ValueError(
                f"{unsupported[0]} is stacked on another axis than the first, as no checkpoint here is"
            )
        self.places: dict[str, tuple[Rule, int | None]] = {}
        for rule in table.rules:
            names = expand(rule, leaves[rule.path])
            self.places |= {n: (rule, None if n == rule.name else i) for i, n in enumerate(names)}
        self.places |= {name: self.places[original] for name, original in table.copies}

    def changes(self, rule: Rule) -> bool:
        """Whether a tensor differs from the base's."""
        leaf = f"params/{rule.path}"
        return leaf in self.specs or leaf in self.extras

    def value(self, rule: Rule, layer: int | None, base: Callable[[], np.ndarray]) -> np.ndarray:
        """The merged tensor in the file's layout, float32; `base` reads the base's and is called only if needed."""
        leaf = f"params/{rule.path}"
        if leaf in self.extras:
            value = np.asarray(self.extras[leaf] if layer is None else self.extras[leaf][layer], np.float32)
            return value.T if rule.transposed else value
        key, spec = self.specs[leaf]
        a, b = (self.factors[path] for path in spec.factor_paths(key))
        if layer is not None:
            a, b = a[layer], b[layer]
            spec = dataclasses.replace(spec, shape=spec.shape[1:], stacked=(), layers=None)
        delta = np.asarray(weight_delta(a, b, spec))
        # A copy of the base, which may be a view into the file.
        result = base().astype(np.float32)
        result += delta.T if rule.transposed else delta
        return result


def merged_tensors(source: Path, merge: CheckpointMerge) -> Iterator[tuple[OutputTensor, str]]:
    """Every tensor of a checkpoint as it becomes, and its canonical name.

    Names are the file's; those of GGUF files are Hugging Face's.
    """
    for _, file, _, _ in weight_files(source):
        for name in sorted(file.keys()):
            canonical, view = merge.table.canonical(name), file.get_slice(name)
            location, shape = merge.places.get(canonical), tuple(view.get_shape())
            if location is not None and merge.changes(location[0]):
                rows = _merged_rows(merge, *location, file, name)
            else:
                rows = _copied_rows(file, name, shape)
            yield OutputTensor(name, shape, dtype_of(view.get_dtype()), rows), canonical


def _merged_rows(
    merge: CheckpointMerge, rule: Rule, layer: int | None, file: Any, name: str
) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: iter([merge.value(rule, layer, lambda: file.get_slice(name)[:])])


def _copied_rows(file: Any, name: str, shape: tuple[int, ...]) -> Callable[[], Iterator[np.ndarray]]:
    def rows() -> Iterator[np.ndarray]:
        if not shape:
            yield file.get_tensor(name)
            return
        step = max(1, _PIECE // max(1, 4 * int(np.prod(shape[1:]))))
        view = file.get_slice(name)
        for start in range(0, shape[0], step):
            yield view[start : min(start + step, shape[0])]

    return rows


def dtype_of(name: str) -> np.dtype:
    """Of a type of safetensors or GGUF; what is quantised counts as float32, into which it is read."""
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
"""Safetensors' names of types."""
