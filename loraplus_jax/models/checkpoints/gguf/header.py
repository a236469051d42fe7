"""Reads and checks the header of a GGUF file; `load` interprets it.

This replaces the `gguf` package's reader, which trusts every count in the file and takes seconds for a vocabulary;
the package only dequantizes. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ...._utils.json_files import check_file
from ...families import KINDS

ARCHITECTURES = tuple(dict.fromkeys(kind.gguf for kind in KINDS.values() if kind.gguf))

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_MAGIC, _TEXT, _ARRAY = b"GGUF", 8, 9
_MIN_ENTRY, _MIN_TENSOR = 13, 33  # minimum size in bytes
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in the file.

    Attributes:
      shape: in numpy's order, rows first; the file stores it reversed.
      dtype: type name such as `"Q4_K"`, or `"type 99"` for a number that the package does not know.
      start: offset of its first byte in the file.
      size: size in bytes; 0 for an unknown type.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int


@dataclass(frozen=True)
class Gguf:
    """A GGUF file with a checked header; the tensors stay on disk.

    Attributes:
      metadata: numbers, strings, lists of strings, and 1-D arrays of numbers, by key.
      tensors: tensors by their names in the file.
      data: the file's bytes, memory-mapped.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    data: mmap.mmap

    @property
    def architecture(self) -> str:
        """`general.architecture`, which must be one of `ARCHITECTURES`."""
        value = self.one("general.architecture")
        if value not in ARCHITECTURES:
            raise ValueError(
                f"{self.path}: general.architecture must be one of {', '.join(ARCHITECTURES)}, "
                f"got {value!r:.80}"
            )
        return value

    def one(self, key: str, default: Any = None) -> Any:
        """A number or string from the metadata; raises ValueError if the key holds a list."""
        value = self.metadata.get(key, default)
        if isinstance(value, list | np.ndarray):
            raise ValueError(f"{self.path}: {key:.80} must be a single value, got a list of {len(value)}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """Same as `one`, for a key below the architecture's name."""
        return self.one(f"{self.architecture}.{key}", default)


def find(path: Path) -> Path | None:
    """The GGUF file at a path: the path itself, or the only one in a directory without safetensors; else None.

    Raises:
      ValueError: the directory contains several; lists all.
    """
    # Path.is_file raises for a name that is too long for the file system.
    if os.path.isfile(path):
        with path.open("rb") as file:
            return path if path.suffix.lower() == ".gguf" or file.read(4) == _MAGIC else None
    if not os.path.isdir(path) or any(".safetensors" in p.suffixes for p in path.iterdir()):
        return None
    files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf" and p.is_file())
    if len(files) > 1:
        names = ", ".join(p.name for p in files)
        raise ValueError(f"{path} contains {len(files)} GGUF files; pass the path of one: {names}")
    if not files:
        return None
    check_file(files[0])
    return files[0]


def read(path: Path) -> Gguf:
    """Reads a file's header and checks every number in it against the file's size before using it.

    Raises:
      ValueError: the file is not GGUF version 2 or 3, is damaged or truncated, or is one part of several.
      ImportError: `gguf` is not installed.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with path.open("rb") as file:
        # Mapped, so that of the tensors nothing is read yet.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    metadata, count = _read_metadata(cursor)
    tensors = _read_tensors(cursor, count, metadata.get("general.alignment", 32))
    file = Gguf(path, metadata, tensors, data)
    if (parts := file.one("split.count", 1)) not in (0, 1):
        raise ValueError(
            f"{path} is one of {parts} parts; merge them first: llama-gguf-split --merge FIRST OUT"
        )
    return file


class _Cursor:
    """A read position in the file; every read is checked against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, reason: str) -> NoReturn:
        raise ValueError(
            f"{self.path} ({len(self.data)} bytes) is not a complete GGUF file: {reason}; "
            "download it again (truncated, or a Git LFS pointer?)"
        )

    def numbers(self, dtype: str, count: int) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        if size > len(self.data) - self.at:
            self.fail(f"expected {size} bytes at byte {self.at}")
        # A copy: a view of the file would keep it open.
        values = np.frombuffer(self.data[self.at : self.at + size], dtype)
        self.at += size
        return values

    def number(self, dtype: str) -> Any:
        values = self.numbers("u1" if dtype == "?" else dtype, 1)
        if dtype == "<f4":
            # The shortest equal number: 1e-05, not 9.99999974e-06, so that configs equal those of directories.
            return float(str(values[0]))
        return bool(values[0]) if dtype == "?" else values[0].item()

    def count(self, what: str, min_size: int) -> int:
        """Reads how many items follow, each of at least `min_size` bytes."""
        count = self.number("<u8")
        if count > (len(self.data) - self.at) // min_size:
            self.fail(f"it declares {count} {what}, more than fit in it")
        return count

    def text(self) -> str:
        size, start = self.count("bytes of a string", 1), self.at
        self.at += size
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"the string at byte {start} is not UTF-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(self._scalar(kind))
        inner = self.number("<u4")
        if inner == _TEXT:
            return [self.text() for _ in range(self.count("strings", 8))]
        dtype = "u1" if inner == 7 else self._scalar(inner)
        return self.numbers(dtype, self.count("numbers", np.dtype(dtype).itemsize))

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            self.fail(f"unknown value type {kind} before byte {self.at}")
        return _SCALARS[kind]


def _read_metadata(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    if cursor.data[:4] != _MAGIC:
        cursor.fail(f"it begins with {cursor.data[:4]!r}, not {_MAGIC!r}")
    cursor.at = 4
    if (version := cursor.number("<u4")) not in (2, 3):
        cursor.fail(f"its version must be 2 or 3, little-endian, got {version}")
    tensors = cursor.count("tensors", _MIN_TENSOR)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("metadata entries", _MIN_ENTRY)):
        key = cursor.text()
        if key in metadata:
            cursor.fail(f"duplicate key {key!r:.80}")
        metadata[key] = cursor.value(cursor.number("<u4"))
    return metadata, tensors


def _read_tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ImportError("reading GGUF files needs gguf: pip install 'loraplus_jax[train]'") from error
    # Type number to name, values per block, and bytes per block.
    types = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    infos = []
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("<u4")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            cursor.fail(f"tensor {name!r:.80} has {dimensions} dimensions, must have 1 to {_MAX_DIMENSIONS}")
        shape = tuple(reversed(cursor.numbers("<u8", dimensions).tolist()))
        infos.append((name, shape, cursor.number("<u4"), cursor.number("<u8")))
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment must be a power of 2, got {alignment!r:.80}")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            cursor.fail(f"duplicate tensor {name!r:.80}")
        dtype, block, block_bytes = types.get(kind, (f"type {kind}", 0, 0))
        if min(shape) < 1 or (block and shape[-1] % block):
            cursor.fail(
                f"tensor {name!r:.80} has shape {list(shape)}; sizes must be positive, and {dtype} rows come in "
                f"blocks of {block}"
            )
        size = math.prod(shape) // block * block_bytes if block else 0
        if base + offset + size > len(cursor.data):
            cursor.fail(f"tensor {name!r:.80} ends at byte {base + offset + size}, beyond the file")
        tensors[name] = TensorInfo(shape, dtype, base + offset, size)
    return tensors
