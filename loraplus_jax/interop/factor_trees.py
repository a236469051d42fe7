"""Reads the arrays that other libraries saved: orbax checkpoints, safetensors and npz files, as arrays by path."""

import logging
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .._utils.json_files import check_file
from .adapter_directory import host_array, read_tensors
from .library_recipes import clean_paths

_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
_DEPTH = 3
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
      ValueError: a file is damaged or unsupported, there are several checkpoints, or two tensors have one name.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.name.endswith(_KERAS):
        raise ValueError(
            f"{path} names no layers, only their numbers in keras-hub's own list: load it into the model, and call "
            "safetensors.numpy.save_file({v.path: np.asarray(v.value) for v in model.variables if 'lora' in "
            "v.path}, ...)"
        )
    files = (
        [path]
        if path.is_file()
        else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".npz"))
    )
    if files:
        tree: dict[str, Any] = {}
        for file in files:
            for name, tensor in _read_file(file).items():
                if name in tree:
                    raise ValueError(f"{file}: {name} is in another file of {path}, too")
                tree[name] = tensor
    else:
        tree = _read_orbax(path)
    if not any("/" in name for name in tree):
        tree = {name.replace(".", "/"): tensor for name, tensor in tree.items()}
    return {name: host_array(leaf) for name, leaf in clean_paths(tree).items()}


def _read_file(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return read_tensors(file)
    if file.suffix == ".npz":
        check_file(file)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                # NumPy saves a bfloat16 as two bytes of no type.
                return {n: x.view(ml_dtypes.bfloat16) if x.dtype == "V2" else x for n, x in arrays.items()}
        except (ValueError, OSError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
    raise ValueError(f"{file} must be a .safetensors or .npz file, or a directory")


def _read_orbax(path: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    found = list(_checkpoints(path, _DEPTH))
    if not found:
        raise FileNotFoundError(
            f"{path} contains no adapter, no .safetensors or .npz file and no orbax checkpoint"
        )
    if len(found) > 1:
        names = ", ".join(str(each.relative_to(path)) for each in found[:5])
        raise ValueError(f"{path} contains {len(found)} orbax checkpoints; choose one: {names}")
    logger = logging.getLogger("absl")
    level, checkpointer = logger.level, ocp.PyTreeCheckpointer()
    logger.setLevel(logging.ERROR)
    try:
        metadata: Any = checkpointer.metadata(found[0])
        shapes = metadata.item_metadata.tree
        # As host arrays: the devices that saved them need not be here.
        as_numpy = _map_leaves(shapes, lambda _: ocp.RestoreArgs(restore_type=np.ndarray))
        restored = checkpointer.restore(found[0], restore_args=as_numpy)
    except Exception as error:  # of orbax, tensorstore and their files
        raise ValueError(f"{found[0]} cannot be read as an orbax checkpoint: {error}") from None
    finally:
        logger.setLevel(level)
        checkpointer.close()
    return dict(_leaves(restored))


def _checkpoints(path: Path, depth: int) -> Iterator[Path]:
    if (path / "_METADATA").is_file() or (path / "manifest.ocdbt").is_file():
        yield path
    elif depth:
        for child in sorted(path.iterdir()):
            if child.is_dir():
                yield from _checkpoints(child, depth - 1)


def _map_leaves(tree: Any, function: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _map_leaves(part, function) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map_leaves(part, function) for part in tree]
    return function(tree)


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, part in tree.items():
            yield from _leaves(part, (*path, str(name)))
    elif isinstance(tree, list | tuple):
        for n, part in enumerate(tree):
            yield from _leaves(part, (*path, str(n)))
    elif tree is not None:
        yield "/".join(path), tree
