"""Strict loading of weights from a Hugging Face directory or a GGUF file, by a model's `NameTable`.

Nothing is guessed: before reading any weight, one error lists every missing, extra or misshapen tensor.
"""

import functools
import hashlib
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ..._utils.validation import raise_problems
from ...quantization.packed_array import is_packed
from .model_files import ModelFiles, View
from .name_table import NameTable, Rule, expand, shape_in_file
from .quantized import read_packed

_THREADS = 4
_PIECE = 2**22  # bytes per read, counted as float32
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_ROWS = 128  # of a tensor, copied at a time: transposing more leaves a core's cache


def load_params(
    files: ModelFiles,
    table: NameTable,
    expected: Mapping[str, Any],
    *,
    new: tuple[str, ...] = (),
    param_dtype: Any = None,
    place: Callable[[str, Any], Any] | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """Loads a model's parameters from its files.

    Checks all names and shapes first. Host memory holds one leaf at a time and a few MiB, besides the memory-mapped
    file. Dequantizes quantized tensors, unless `expected` has a `PackedArray` in their place; packs the values of
    other tensors for one.

    Args:
      files: the model's files, from `open_files`.
      table: the model's name table.
      expected: shapes of the model's parameters, `jax.eval_shape(model.init, ...)["params"]`; with a `PackedArray`
        of shapes for each weight to load packed.
      new: path prefixes of leaves that are not in the file, such as a new `"head"`.
      param_dtype: dtype of all leaves; by default each leaf's dtype in `expected`.
      place: called with each leaf's path and host array, or `PackedArray`; returns what to store. By default an
        array on the default device.
      shardings: path to sharding, for leaves to load directly onto their devices: each process reads only the parts
        that its own devices hold, and does not call `place`.

    Returns:
      Nested dicts like `expected`, without the `new` leaves.

    Raises:
      ValueError: a tensor is missing, extra or misshapen (lists all: `-` missing, `+` extra, `~` different); the
        table does not cover the model; or as `ModelFiles.tensors`.
      ImportError: safetensors is not installed.

    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> from loraplus_jax.models.checkpoints.name_table import linear_rules
      >>> from loraplus_jax.models.files import open_files
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file({"fc.weight": np.ones((2, 3), np.float32)}, f"{folder}/model.safetensors")
      ...     params = load_params(open_files(folder), NameTable(rules=linear_rules("fc", "up", bias=False)),
      ...                          {"up": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)}})
      >>> params["up"]["kernel"].shape, params["up"]["kernel"].dtype.name
      ((3, 2), 'bfloat16')
    """
    leaves, tensors = check_params(files, table, expected, new=new)
    store = place or (lambda path, array: jax.device_put(array))

    def to_device(path: str, name: str, part: np.ndarray) -> jax.Array:
        if (sharding := (shardings or {}).get(f"{path}/parts/{name}")) is None:
            return jax.device_put(part)
        return jax.make_array_from_callback(part.shape, sharding, lambda index: part[index])

    def load(rule: Rule) -> Any:
        leaf, sharding = leaves[rule.path], (shardings or {}).get(rule.path)
        if is_packed(leaf):
            views = {name: tensors[name].view for name in expand(rule, leaf)}
            packed = read_packed(rule, leaf, views, functools.partial(to_device, rule.path))
            return packed if place is None else place(rule.path, packed)
        read = functools.partial(_read, rule, leaf, tensors, param_dtype)
        if sharding is None:
            return store(rule.path, read([slice(0, size) for size in leaf.shape]))
        parts: dict[Any, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            window = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, leaf.shape, strict=True))
            # JAX asks once for each device, and several may hold one part. Slices have no hash before Python 3.12.
            if (key := str(window)) not in parts:
                parts[key] = read(list(window))
            return parts[key]

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    flat = {rule.path: load(rule) for rule in table.rules}
    return traverse_util.unflatten_dict(flat, sep="/")


def read_leaf(rule: Rule, leaf: jax.ShapeDtypeStruct, tensors: Mapping[str, "_Tensor"]) -> np.ndarray:
    """Reads a leaf, dequantized, as a host array of a shape and dtype; `tensors` are those of `check_params`."""
    return _read(rule, leaf, tensors, None, [slice(0, size) for size in leaf.shape])


def check_params(
    files: ModelFiles, table: NameTable, expected: Mapping[str, Any], *, new: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, "_Tensor"]]:
    """Runs the checks of `load_params`, reading only tied weights; returns leaves by path, tensors by name."""
    leaves = _leaves_from_file(table, expected, new)
    names = {name for rule in table.rules for name in expand(rule, leaves[rule.path])}
    tensors, problems = _find_tensors(files, table, names | {name for name, _ in table.copies})
    problems += _compare_shapes(table, leaves, tensors) or _compare_copies(table, tensors)
    counts = Counter(line[0] for line in problems)
    words = {"-": "missing", "+": "extra", "~": "misshapen or of the wrong type"}
    summary = ", ".join(f"{counts[sign]} {word}" for sign, word in words.items() if counts[sign])
    raise_problems(f"the weights in {files} do not match the model: {summary}; first", problems)
    return leaves, tensors


def rows_digest(tensors: Mapping[str, "_Tensor"]) -> str:
    """A short hex digest of the first, the middle and the last row of every tensor, as `check_params` returns them.

    Distinguishes differently trained weights, and reads almost nothing of them.
    """

    def rows(view: Any) -> Iterator[np.ndarray]:
        size = (*view.get_shape(), 0)[0]
        picked = sorted({0, size // 2, size - 1} & set(range(size)))
        return (view[row : row + 1] for row in picked) if view.get_shape() else iter([view[()]])

    return _digest(tensors, rows)[:16]


def values_digest(tensors: Mapping[str, "_Tensor"]) -> str:
    """A hex digest of every value of the tensors, as `check_params` returns them; reads all of them."""
    return _digest(tensors, read_pieces)


def _digest(tensors: Mapping[str, "_Tensor"], read: Callable[[Any], Iterator[np.ndarray]]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.shape} {tensor.view.get_dtype()}".encode())
        for values in read(tensor.view):
            total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest()


class _Tensor(NamedTuple):
    """A tensor by its name in the file."""

    name: str
    view: View

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.view.get_shape())


def _leaves_from_file(
    table: NameTable, expected: Mapping[str, Any], new: tuple[str, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves to load, by path; raises unless they are exactly those that the table has rules for."""
    flat: dict[str, Any] = traverse_util.flatten_dict(dict(expected), sep="/")
    paths_under = {prefix: {p for p in flat if f"{p}/".startswith(f"{prefix}/")} for prefix in new}
    if unused := [prefix for prefix, paths in paths_under.items() if not paths]:
        raise ValueError(
            f"new: the model has no parameters under {unused}; "
            f"it has {sorted({p.split('/')[0] for p in flat})}"
        )
    leaves = {
        path: leaf for path, leaf in flat.items() if not any(path in paths for paths in paths_under.values())
    }
    rule_paths = {rule.path for rule in table.rules}
    if rule_paths != set(leaves):
        raise ValueError(
            "the name table does not cover the model: "
            f"leaves without a rule {sorted(set(leaves) - rule_paths)}, "
            f"rules without a leaf {sorted(rule_paths - set(leaves))}"
        )
    return leaves


def _find_tensors(
    files: ModelFiles, table: NameTable, names: set[str]
) -> tuple[dict[str, _Tensor], list[str]]:
    """The tensors with these canonical names, by name, and one line per missing or unexpected tensor."""
    tensors: dict[str, _Tensor] = {}
    problems = []
    for name, view in files.tensors.items():
        key, tensor = table.canonical(name), _Tensor(name, view)
        if key in tensors:
            problems.append(f"+ {name} (a second tensor for {tensors[key].name})")
        elif key in names:
            tensors[key] = tensor
        elif not table.ignores(key):
            problems.append(f"+ {name} {list(tensor.shape)} (not in the model)")
    return tensors, files.index_problems + problems


def _compare_shapes(
    table: NameTable, leaves: Mapping[str, jax.ShapeDtypeStruct], tensors: Mapping[str, _Tensor]
) -> list[str]:
    """One line per required tensor that is missing, misshapen or of an unsupported type."""
    problems = []
    for rule in table.rules:
        shape = shape_in_file(rule, leaves[rule.path])
        for name in expand(rule, leaves[rule.path]):
            tensor = tensors.get(name)
            if tensor is None:
                problems.append(f"- {name} {list(shape)} (required by the model)")
            elif tensor.shape != shape:
                problems.append(f"~ {tensor.name} is {list(tensor.shape)}, the model needs {list(shape)}")
            elif (dtype := tensor.view.get_dtype()) not in tensor.view.supported:
                problems.append(
                    f"~ {tensor.name} is {dtype}, must be one of {', '.join(tensor.view.supported)}"
                )
    # Parts of one tensor have the same problem.
    return list(dict.fromkeys(problems))


def _compare_copies(table: NameTable, tensors: Mapping[str, _Tensor]) -> list[str]:
    """One line per tied tensor that differs from its original: the checkpoint belongs to another model."""
    problems = []
    for name, original_name in table.copies:
        if name not in tensors:
            continue
        copy, original = tensors[name], tensors[original_name]
        equal = (
            copy.shape == original.shape
            and copy.view.get_dtype() in copy.view.supported
            and all(map(np.array_equal, read_pieces(copy.view), read_pieces(original.view)))
        )
        if not equal:
            problems.append(
                f"~ {copy.name} differs from {original.name}, but the config ties them; "
                "check tie_word_embeddings"
            )
    return problems


def read_pieces(view: Any) -> Iterator[np.ndarray]:
    """Yields a tensor's values in pieces along the first axis, each small enough for one read."""
    return (view[part] for part in _pieces(tuple(view.get_shape())))


def _pieces(shape: tuple[int, ...]) -> Iterator[Any]:
    # A scalar has no axis to slice.
    if not shape:
        yield ()
        return
    rows = _PIECE // max(1, 4 * math.prod(shape[1:])) or 1
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _read(
    rule: Rule,
    leaf: jax.ShapeDtypeStruct,
    tensors: Mapping[str, _Tensor],
    param_dtype: Any,
    window: list[slice],
) -> np.ndarray:
    """Reads a window of one leaf in pieces into the final array, without a second copy."""
    shape = tuple(s.stop - s.start for s in window)
    out = _empty(shape, leaf.dtype if param_dtype is None else jnp.dtype(param_dtype))
    stack, window = window[: rule.stacked], window[rule.stacked :]
    jobs: list[tuple[View, list[slice], np.ndarray, Any]] = []
    for name, place in expand(rule, leaf).items():
        if not all(s.start <= n < s.stop for n, s in zip(place.stack, stack, strict=True)):
            continue
        # The ellipsis makes a view of a leaf without axes too.
        slot = out[(*(n - s.start for n, s in zip(place.stack, stack, strict=True)), ...)]
        own = window
        if window:
            *inputs, outputs = window
            # Of the leaf's outputs, those that are wanted and the tensor has, and their numbers in the tensor.
            has = slice(0, leaf.shape[-1]) if place.outputs is None else place.outputs
            start, stop = max(outputs.start, has.start), min(outputs.stop, has.stop)
            slot = slot[..., start - outputs.start : max(start, stop) - outputs.start]
            shift = has.start - (0 if rule.part is None else rule.part.start)
            own = [*inputs, slice(start - shift, max(start, stop) - shift)]
        if slot.size:
            # From here on in the file's layout.
            own, slot = (own[::-1], slot.T) if rule.transposed else (own, slot)
            jobs += [(tensors[name].view, own, slot, part) for part in _pieces(slot.shape)]

    def fill(job: tuple[View, list[slice], np.ndarray, Any]) -> None:
        view, own, slot, part = job
        if not own:
            slot[()] = view[()]
            return
        rows = slice(own[0].start + part.start, own[0].start + part.stop)
        _copy(view[(rows, *own[1:])], slot[part])

    # Most of the time is spent in copies by NumPy, which other threads need not wait for.
    with ThreadPoolExecutor(min(_THREADS, 1 + out.nbytes // _PIECE)) as pool:
        list(pool.map(fill, jobs))
    return out


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialized array in memory pages of its own.

    They are aligned, so XLA's CPU client takes it over without a copy. NumPy would ask for huge pages, which can be
    ten times slower to get on a virtual machine that has given free memory back to its host.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        pages = mmap.mmap(-1, max(1, size), **_PRIVATE)
    except OSError as error:
        raise MemoryError(f"cannot allocate {size:,} bytes for weights") from error
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)


def _copy(values: np.ndarray, target: np.ndarray) -> None:
    for start in range(0, len(target), _ROWS):
        rows = slice(start, start + _ROWS)
        # Converted before it is transposed: NumPy is slow at both in one pass.
        target[rows] = values[rows].astype(target.dtype, copy=False)
