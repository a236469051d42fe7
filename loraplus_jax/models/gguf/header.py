"""The header of a GGUF file, checked; what it means is said in `load`.

It is read here and not by the `gguf` package's reader, which believes every count in it and takes seconds
for a vocabulary; the package dequantises. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_MAGIC, _TEXT, _ARRAY = b"GGUF", 8, 9
_LEAST_ENTRY, _LEAST_TENSOR = 13, 33  # bytes that one takes at least
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file.

    Attributes:
      shape: rows first, as numpy has it; the file has it the other way round.
      dtype: `"Q4_K"`, or `"type 99"` where the package knows no such number.
      start: its first byte in the file.
      size: how many bytes it has; 0 for an unknown type.
    """

    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int


@dataclass(frozen=True)
class Gguf:
    """A file whose header has been read and checked; the rest stays on disk.

    Attributes:
      metadata: numbers, texts, lists of texts, and 1-D arrays of numbers, by key.
      tensors: under the file's own names.
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
                f"{self.path}: the architecture is {value!r:.80}, must be one of {', '.join(ARCHITECTURES)}"
            )
        return value

    def one(self, key: str, default: Any = None) -> Any:
        """A number or a text of the metadata; a ValueError where a list stands instead."""
        value = self.metadata.get(key, default)
        if isinstance(value, list | np.ndarray):
            raise ValueError(f"{self.path}: {key:.80} must be one value, got a list of {len(value)}")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """`one`, under the architecture's name."""
        return self.one(f"{self.architecture}.{key}", default)


def find(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a directory without safetensors; else None.

    Raises:
      ValueError: the directory holds several; all are named.
    """
    if os.path.isfile(path):  # unlike Path.is_file, False for a name too long for the file system
        with path.open("rb") as file:
            return path if path.suffix.lower() == ".gguf" or file.read(4) == _MAGIC else None
    if not os.path.isdir(path) or any(".safetensors" in p.suffixes for p in path.iterdir()):
        return None
    files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf" and p.is_file())
    if len(files) > 1:
        names = ", ".join(p.name for p in files)
        raise ValueError(f"{path} holds {len(files)} GGUF files, give the path of one: {names}")
    return files[0] if files else None


def read(path: Path) -> Gguf:
    """Reads a file's header and checks every number in it against the file's size before using it.

    Raises:
      ValueError: no GGUF file of version 2 or 3, a damaged or truncated one, or one of several parts.
      ImportError: `gguf` is not installed.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    metadata, count = _read_metadata(cursor)
    tensors = _read_tensors(cursor, count, metadata.get("general.alignment", 32))
    file = Gguf(path, metadata, tensors, data)
    if (parts := file.one("split.count", 1)) not in (0, 1):
        raise ValueError(f"{path} is one of {parts} parts; join them: llama-gguf-split --merge FIRST OUT")
    return file


class _Cursor:
    """A read position in the file; every read is checked against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, why: str) -> NoReturn:
        raise ValueError(
            f"{self.path} ({len(self.data)} bytes) is no whole GGUF file ({why}); "
            "an interrupted download or a Git LFS pointer looks like this: fetch it again"
        )

    def numbers(self, dtype: str, count: int) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        if size > len(self.data) - self.at:
            self.fail(f"{size} bytes are announced at byte {self.at}")
        # A copy: an array that looks into the file would keep it open.
        values = np.frombuffer(self.data[self.at : self.at + size], dtype)
        self.at += size
        return values

    def number(self, dtype: str) -> Any:
        values = self.numbers("u1" if dtype == "?" else dtype, 1)
        if dtype == "<f4":
            return float(str(values[0]))  # the shortest number that means it: 1e-05, not 9.99999974e-06
        return bool(values[0]) if dtype == "?" else values[0].item()

    def count(self, what: str, least: int) -> int:
        """How many items follow, each of at least `least` bytes."""
        count = self.number("<u8")
        if count > (len(self.data) - self.at) // least:
            self.fail(f"{count} {what} are announced")
        return count

    def text(self) -> str:
        size, start = self.count("bytes of text", 1), self.at
        self.at += size
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"the text at byte {start} is not UTF-8")

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(self._scalar(kind))
        inner = self.number("<u4")
        if inner == _TEXT:
            return [self.text() for _ in range(self.count("texts", 8))]
        dtype = "u1" if inner == 7 else self._scalar(inner)
        return self.numbers(dtype, self.count("numbers", np.dtype(dtype).itemsize))

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            self.fail(f"a value before byte {self.at} is of type {kind}")
        return _SCALARS[kind]


def _read_metadata(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """The metadata, and how many tensors follow."""
    if cursor.data[:4] != _MAGIC:
        cursor.fail(f"it begins with {cursor.data[:4]!r}")
    cursor.at = 4
    if (version := cursor.number("<u4")) not in (2, 3):
        cursor.fail(f"its version is {version}, only 2 and 3 are read, in little-endian order")
    tensors = cursor.count("tensors", _LEAST_TENSOR)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("metadata entries", _LEAST_ENTRY)):
        key = cursor.text()
        if key in metadata:
            cursor.fail(f"the key {key!r:.80} stands twice")
        metadata[key] = cursor.value(cursor.number("<u4"))
    return metadata, tensors


def _read_tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    """The table of tensors, which ends the header, with each tensor's position in the file."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs gguf: pip install 'loraplus_jax[train]'") from error
    # By the number of a type: its name, values in a block, bytes of a block.
    types = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    infos = []
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("<u4")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            cursor.fail(f"{name!r:.80} has {dimensions} dimensions")
        shape = tuple(reversed(cursor.numbers("<u8", dimensions).tolist()))
        infos.append((name, shape, cursor.number("<u4"), cursor.number("<u8")))
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"its alignment is {alignment!r:.80}")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            cursor.fail(f"two tensors are called {name!r:.80}")
        dtype, block, block_bytes = types.get(kind, (f"type {kind}", 0, 0))
        if min(shape) < 1 or (block and shape[-1] % block):
            cursor.fail(f"{name!r:.80} has the shape {list(shape)}, and {dtype} comes in blocks of {block}")
        size = math.prod(shape) // block * block_bytes if block else 0
        if base + offset + size > len(cursor.data):
            cursor.fail(f"{name!r:.80} ends at byte {base + offset + size}")
        tensors[name] = TensorInfo(shape, dtype, base + offset, size)
    return tensors
