"""Strict loading of weights from a Hugging Face directory or a GGUF file, by a model's `NameTable`.

Nothing is guessed: every tensor that is missing, left over or misshapen is listed, all in one error, before the
first weight is read.
"""

import functools
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ..json_files import read_json
from .gguf import load as gguf
from .name_table import NameTable, Rule, expand, is_stacked, shape_in_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 20
_PIECE = 2**22  # bytes, counted as float32, that are read at a time


def load_config(directory: str | Path) -> dict[str, Any]:
    """Reads `config.json` of a Hugging Face directory, or what a GGUF file has instead, see `gguf.load.config`.

    Raises:
      ValueError: no directory, no such file in it, or it holds no JSON object; or a GGUF file that cannot be read.
    """
    if (file := gguf.find(Path(directory))) is not None:
        return gguf.config(gguf.read(file))
    return read_json(_check_directory(Path(directory)) / "config.json")


def load_params(
    directory: str | Path,
    table: NameTable,
    expected: Mapping[str, Any],
    *,
    new: tuple[str, ...] = (),
    param_dtype: Any = None,
    place: Callable[[str, np.ndarray], Any] | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """Loads a model's parameters from `model.safetensors`, the shards that its index names, or a GGUF file.

    The host holds one leaf at a time and a few MiB, beside the memory-mapped file. Names and shapes are all checked
    first. Quantised tensors are dequantised.

    Args:
      directory: a Hugging Face directory, a GGUF file, or a directory with one of those and no safetensors.
      table: the model's name table.
      expected: the model's parameters as shapes, `jax.eval_shape(model.init, ...)["params"]`.
      new: path prefixes of leaves that do not come from the file, such as a new `"head"`.
      param_dtype: the dtype of all leaves; by default each has the one that `expected` gives it.
      place: called with each leaf's path and host array, returns what to keep of it. By default an array on the
        default device.
      shardings: path to sharding, for leaves that go straight to where they lie: of these each process reads only
        the parts that its own devices hold, and `place` is not called.

    Returns:
      Nested dicts like `expected`, without the `new` leaves.

    Raises:
      ValueError: a tensor is missing, extra or misshapen (all are listed together: `-` missing, `+` extra,
        `~` different); the table does not cover the model; a file is absent, damaged or a pickle; the index
        names a file outside the directory; several GGUF files in the directory.
      ImportError: safetensors, or for a GGUF file gguf, is not installed.

    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> from loraplus_jax.models.name_table import linear_rules
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file({"fc.weight": np.ones((2, 3), np.float32)}, f"{folder}/model.safetensors")
      ...     params = load_params(folder, NameTable(rules=linear_rules("fc", "up", bias=False)),
      ...                          {"up": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)}})
      >>> params["up"]["kernel"].shape, params["up"]["kernel"].dtype.name
      ((3, 2), 'bfloat16')
    """
    leaves, tensors = check_params(directory, table, expected, new=new)
    store = place or (lambda path, array: jax.device_put(array))

    def load(rule: Rule) -> Any:
        leaf, sharding = leaves[rule.path], (shardings or {}).get(rule.path)
        read = functools.partial(_read, rule, leaf, tensors, param_dtype)
        if sharding is None:
            return store(rule.path, read([slice(0, size) for size in leaf.shape]))
        return jax.make_array_from_callback(leaf.shape, sharding, _read_parts_once(read, leaf.shape))

    flat = {rule.path: load(rule) for rule in table.rules}
    return traverse_util.unflatten_dict(flat, sep="/")


def check_params(
    directory: str | Path, table: NameTable, expected: Mapping[str, Any], *, new: tuple[str, ...] = ()
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, "_Tensor"]]:
    """The checks of `load_params`, which read no weight but copies; returns leaves by path and tensors by name."""
    directory = Path(directory)
    leaves = _leaves_from_file(table, expected, new)
    wanted = {name for rule in table.rules for name in expand(rule, leaves[rule.path])}
    tensors, problems = _find_tensors(directory, table, wanted | {name for name, _ in table.copies})
    problems += _compare_shapes(table, leaves, tensors) or _differing_copies(table, tensors)
    if problems:
        raise ValueError(_error_message(directory, problems))
    return leaves, tensors


def rows_digest(tensors: Mapping[str, "_Tensor"]) -> str:
    """A short hex digest of the first, the middle and the last row of every tensor, as `check_params` returns them.

    It tells the weights of another training apart and reads next to nothing of them.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.shape} {tensor.view.get_dtype()}".encode())
        size = tensor.shape[0] if tensor.shape else 0
        for row in sorted({0, size // 2, size - 1} & set(range(size))):
            total.update(np.ascontiguousarray(tensor.view[row : row + 1]).tobytes())
        if not tensor.shape:
            total.update(tensor.file.get_tensor(tensor.name).tobytes())
    return total.hexdigest()[:16]


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a file: its own name there, its contents, and which types are read of such a file."""

    file: Any
    name: str
    view: Any
    dtypes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.view.get_shape())


def _leaves_from_file(
    table: NameTable, expected: Mapping[str, Any], new: tuple[str, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves to load by path, checked to be exactly those that the table has rules for."""
    flat: dict[str, Any] = traverse_util.flatten_dict(dict(expected), sep="/")
    paths_under = {prefix: {p for p in flat if f"{p}/".startswith(f"{prefix}/")} for prefix in new}
    if unused := [prefix for prefix, paths in paths_under.items() if not paths]:
        raise ValueError(
            f"new: the model has nothing under {unused}; it has {sorted({p.split('/')[0] for p in flat})}"
        )
    leaves = {
        path: leaf for path, leaf in flat.items() if not any(path in paths for paths in paths_under.values())
    }
    ruled = {rule.path for rule in table.rules}
    if ruled != set(leaves):
        raise ValueError(
            f"the name table does not cover the model: leaves without a rule {sorted(set(leaves) - ruled)}, "
            f"rules without a leaf {sorted(ruled - set(leaves))}"
        )
    return leaves


def _find_tensors(
    directory: Path, table: NameTable, wanted: set[str]
) -> tuple[dict[str, _Tensor], list[str]]:
    """The wanted tensors in the directory by renamed name, and a line for each that should not be there."""
    tensors: dict[str, _Tensor] = {}
    problems = []
    for file_name, file, dtypes, promised in weight_files(directory):
        names = set(file.keys())
        missing = sorted(promised - names)
        problems += [
            f"- {name} (the index puts it in {file_name}, which does not hold it)" for name in missing
        ]
        for name in sorted(names):
            key, tensor = table.canonical(name), _Tensor(file, name, file.get_slice(name), dtypes)
            if key in tensors:
                problems.append(f"+ {name} (a second tensor for {tensors[key].name}, in {file_name})")
            elif key in wanted:
                tensors[key] = tensor
            elif not table.ignores(key):
                problems.append(f"+ {name} {list(tensor.shape)} (the model has no place for it)")
    return tensors, problems


def weight_files(path: Path) -> Iterator[tuple[str, Any, tuple[str, ...], set[str]]]:
    """Each file with weights: its name, the file opened, the types that are read, the tensors an index promises."""
    if (file := gguf.find(path)) is not None:
        yield file.name, gguf.GgufWeights(gguf.read(file)), gguf.DTYPES, set()
        return
    weight_map = _weight_map(_check_directory(path))
    missing = sorted({name for name in weight_map.values() if not os.path.isfile(path / name)})
    if len(missing) > 1:
        raise ValueError(f"{path}: missing, though the index names them: {', '.join(missing)}")
    for name in sorted(set(weight_map.values())) or [SINGLE_FILE]:
        promised = {tensor for tensor, owner in weight_map.items() if owner == name}
        yield name, _open(path / name), _FLOATS, promised


def _compare_shapes(
    table: NameTable, leaves: Mapping[str, jax.ShapeDtypeStruct], tensors: Mapping[str, _Tensor]
) -> list[str]:
    """A line for each wanted tensor that is absent, misshapen or not of a type that is read."""
    problems = []
    for rule in table.rules:
        shape = shape_in_file(rule, leaves[rule.path])
        for name in expand(rule, leaves[rule.path]):
            tensor = tensors.get(name)
            if tensor is None:
                problems.append(f"- {name} {list(shape)} (the model needs it)")
            elif tensor.shape != shape:
                problems.append(f"~ {tensor.name} is {list(tensor.shape)}, the model needs {list(shape)}")
            elif (dtype := tensor.view.get_dtype()) not in tensor.dtypes:
                problems.append(
                    f"~ {tensor.name} is {dtype}, the model needs one of {', '.join(tensor.dtypes)}"
                )
    return problems


def _differing_copies(table: NameTable, tensors: Mapping[str, _Tensor]) -> list[str]:
    """A line for each tensor that should repeat another and does not: the checkpoint is of another model."""
    problems = []
    for name, original_name in table.copies:
        if name not in tensors:
            continue
        copy, original = tensors[name], tensors[original_name]
        equal = (
            copy.shape == original.shape
            and copy.view.get_dtype() in copy.dtypes
            and all(np.array_equal(copy.view[part], original.view[part]) for part in _pieces(copy.shape))
        )
        if not equal:
            problems.append(
                f"~ {copy.name} differs from {original.name}, and the config says that they are one (are they "
                "tied?)"
            )
    return problems


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis that are small enough to be read at once."""
    rows = _PIECE // max(1, 4 * math.prod(shape[1:])) or 1
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def _error_message(directory: Path, problems: list[str]) -> str:
    """The error message; its first line can stand alone."""
    counts = Counter(line[0] for line in problems)
    words = {"-": "missing", "+": "extra", "~": "misshapen or of another type"}
    summary = ", ".join(f"{counts[sign]} {word}" for sign, word in words.items() if counts[sign])
    first = f"the weights in {directory} do not fit the model: {summary}; the first is {problems[0]}"
    shown = [f"  {line}" for line in problems[:_SHOWN]]
    rest = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n".join([first, *shown, *rest])


def _read_parts_once(
    read: Callable[[list[slice]], np.ndarray], shape: tuple[int, ...]
) -> Callable[[Any], np.ndarray]:
    """A callback for `make_array_from_callback` that reads a part held by several devices only once."""
    parts: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        window = [slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True)]
        key = tuple((s.start, s.stop) for s in window)
        if key not in parts:
            parts[key] = read(window)
        return parts[key]

    return part


def _read(
    rule: Rule,
    leaf: jax.ShapeDtypeStruct,
    tensors: Mapping[str, _Tensor],
    param_dtype: Any,
    window: list[slice],
) -> np.ndarray:
    """Reads a part of one leaf piece by piece into its final array, so that no second copy is made."""
    shape = tuple(s.stop - s.start for s in window)
    out = _empty_aligned(shape, leaf.dtype if param_dtype is None else jnp.dtype(param_dtype))
    names = expand(rule, leaf)
    slots, names, window = (
        (out, names[window[0]], window[1:]) if is_stacked(rule) else (out[None], names, window)
    )
    for index, name in enumerate(names):
        _fill(slots[index : index + 1], tensors[name], window, transposed=rule.transposed)
    return out


def _empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array on a boundary of 64 bytes: on the CPU `jax.device_put` takes it over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    spare = np.empty(size + 63, np.uint8)
    start = -spare.ctypes.data % 64
    return spare[start : start + size].view(dtype).reshape(shape)


def _fill(slot: np.ndarray, tensor: _Tensor, window: list[slice], *, transposed: bool) -> None:
    """Writes a window of a leaf, or of one layer of it, to `slot[0]`."""
    if not tensor.shape:
        slot[0] = tensor.file.get_tensor(tensor.name)
        return
    target = slot[0].T if transposed else slot[0]
    first, *columns = reversed(window) if transposed else window
    for part in _pieces(target.shape):
        rows = slice(first.start + part.start, first.start + part.stop)
        target[part] = tensor.view[(rows, *columns)]


def _check_directory(directory: Path) -> Path:
    if not os.path.isdir(directory):
        raise ValueError(
            f"{directory} is no directory and no GGUF file; give one, or a directory with config.json and "
            f"{SINGLE_FILE}"
        )
    return directory


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name to shard as the index has it; empty where there is a single file."""
    if (directory / SINGLE_FILE).exists():
        return {}
    if not (directory / INDEX_FILE).exists():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ValueError(
                f"{directory} has its weights only as {pickles[0]}, a pickle, which can run any code when opened "
                "and is not read here; convert it where you trust it: "
                "transformers.AutoModel.from_pretrained(d).save_pretrained(d, safe_serialization=True)"
            )
        raise ValueError(f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{directory / INDEX_FILE} must hold a weight_map from tensor names to files, got {weight_map!r:.80}"
        )
    for file_name in weight_map.values():
        # By the name alone: the hub's own cache is made of links that lead out of the directory.
        plain = isinstance(file_name, str) and PureWindowsPath(file_name).name == file_name
        if not plain or not file_name.isprintable() or not file_name.endswith(".safetensors"):
            raise ValueError(
                f"{directory / INDEX_FILE} names {file_name!r}; "
                "only plain .safetensors names in the same directory are read"
            )
    return weight_map


def _open(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("reading weights needs safetensors: pip install 'loraplus_jax[train]'") from error
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long for the file system
        raise ValueError(f"{path} is missing, though the index names it")
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is no whole safetensors file ({error}); "
            "an interrupted download or a Git LFS pointer looks like this: fetch it again"
        ) from error
