"""Reads the arrays that other libraries saved: orbax checkpoints, safetensors and npz files, as arrays by path."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .._utils.json_files import Links, check_directory_files, check_file
from .._utils.untrusted import run_job
from .adapter_directory import read_tensors
from .library_recipes import clean_paths

_DEPTH = 3
_MAX_NAME = 1000
"""Characters of a tensor's name: over longer ones a regular expression can take hours."""
_KERAS = ".lora.h5"


def read_tree(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a tree of arrays.

    Args:
      path: a `.safetensors` or `.npz` file; a directory with such files; or an orbax checkpoint, or a directory
        that contains one. Names are joined by "/", or else by ".".

    Returns:
      A dict from path, joined by "/", to array, without the levels that `clean_paths` removes.

    Raises:
      FileNotFoundError: nothing of the kind is there.
      ValueError: a file is damaged, unsupported or no regular file, or its arrays need more memory than `run_job`
        allows for its size; there are several checkpoints; two tensors have one name, or one is too long.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    links: Links = "inside" if path.is_dir() else "any"  # a single file is one that the user names
    if not path.is_dir():
        check_file(path, links=links)
    if path.name.endswith(_KERAS):
        raise ValueError(
            f"{path} names no layers, only their numbers in keras-hub's own list: load it into the model, and call "
            "safetensors.numpy.save_file({v.path: np.asarray(v.value) for v in model.variables if 'lora' in "
            "v.path}, ...)"
        )
    files = (
        [path]
        if not path.is_dir()
        else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".npz"))
    )
    if files:
        tree: dict[str, Any] = {}
        for file in files:
            for name, tensor in _read_file(file, links).items():
                if name in tree:
                    raise ValueError(f"{file}: {name} is in another file of {path}, too")
                tree[name] = tensor
    else:
        tree = _read_orbax(path)
    if (size := max(map(len, tree), default=0)) > _MAX_NAME:
        raise ValueError(f"{path}: a tensor has a name of {size} characters; the limit is {_MAX_NAME}")
    if not any("/" in name for name in tree):
        tree = {name.replace(".", "/"): tensor for name, tensor in tree.items()}
    return {name: np.asarray(leaf, order="C") for name, leaf in clean_paths(tree).items()}


def _read_file(file: Path, links: Links) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return read_tensors(file, "numpy", links=links)  # JAX takes minutes for 100,000 small tensors
    if file.suffix == ".npz":
        check_file(file, links=links)
        arrays = run_job(f"{file} cannot be read", "read_npz", files=[file], path=str(file.resolve()))
        # NumPy saves a bfloat16 as two bytes of no type.
        return {n: x.view(ml_dtypes.bfloat16) if x.dtype == "V2" else x for n, x in arrays.items()}
    raise ValueError(f"{file} must be a .safetensors or .npz file, or a directory")


def _read_orbax(path: Path) -> dict[str, Any]:
    found = list(_checkpoints(path, _DEPTH))
    if not found:
        raise FileNotFoundError(
            f"{path} contains no adapter, no .safetensors or .npz file and no orbax checkpoint"
        )
    if len(found) > 1:
        names = ", ".join(str(each.relative_to(path)) for each in found[:5])
        raise ValueError(f"{path} contains {len(found)} orbax checkpoints; choose one: {names}")
    check_directory_files(found[0])
    files = [file for file in found[0].rglob("*") if file.is_file()]
    what = f"{found[0]} cannot be read as an orbax checkpoint"
    return run_job(what, "read_orbax", files=files, path=str(found[0].resolve()))


def _checkpoints(path: Path, depth: int) -> Iterator[Path]:
    if (path / "_METADATA").exists() or (path / "manifest.ocdbt").exists():
        yield path
    elif depth:
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.is_symlink():  # which may lead back, or out of the directory
                yield from _checkpoints(child, depth - 1)
