"""Leaves trained in full (`modules_to_save`, biases) under PEFT's names, and back."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .adapter_files import host_array
from .path_map import Index, PathMap, leaf_from_torch, leaf_to_torch, module_of, torch_module_of
from .peft_config import raise_problems

LeafSlices = dict[str, dict[Index, Any]]
"""Leaves by their paths here, `"params/..."`, in slices by index; `()` is a whole leaf."""


def drop_copies(tensors: Mapping[str, Any], path_map: PathMap) -> tuple[dict[str, Any], list[str]]:
    """The tensors of PEFT's file without what stands there twice, and a line for each copy that is none.

    PEFT writes the biases of a module trained in full under its wrapper's names too, with those from before
    training, and the factors of a tied embedding once more as the head's.
    """
    kept, problems = {}, []
    heads = {rule[1]: rule[0] for rule in path_map if rule[2:] == ("TiedHead",)}
    for name, tensor in tensors.items():
        if re.fullmatch(r".+\.original_module\..+", name):
            continue
        wrapped = re.fullmatch(r"(.+)\.modules_to_save\.(?:default\.)?(.+)", name)
        original, transposed = (f"{wrapped[1]}.{wrapped[2]}", False) if wrapped else (None, False)
        head = next((head for head in heads if name.startswith(f"{head}.")), None)
        if head is not None and (place := torch_module_of(path_map, heads[head])) is not None:
            end = name.removeprefix(f"{head}.")
            original = f"{place.name}.{_OF_HEAD.get(end, end)}"
            transposed = end in _OF_HEAD
        if original is None:
            kept[name] = tensor
        elif original not in tensors:
            problems.append(f"{name} is there without {original}, of which it is a copy")
        elif not np.array_equal(
            host_array(tensor), host_array(tensors[original]).T if transposed else tensors[original]
        ):
            problems.append(f"{name} differs from {original}, of which it is to be a copy")
    return kept, problems


_OF_HEAD = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
"""A tied head's factors, and those of the embedding that they are, turned."""


def slice_leaves(leaves: Mapping[str, Any], path_map: PathMap) -> tuple[LeafSlices, list[str]]:
    """Leaves trained in full, cut where their rule has an index; and a line for each that has no place."""
    slots, problems = {}, []
    for path, leaf in leaves.items():
        module = path.removeprefix("params/").rpartition("/")[0]
        place = torch_module_of(path_map, module) if path.startswith("params/") else None
        if place is None:
            problems.append(f"{path}: no rule of the path map matches {module!r}")
        elif len(place.holes) > 1:
            problems.append(
                f"{path}: {place.name} has {len(place.holes)} indices, a leaf trained in full takes one"
            )
        else:
            array = host_array(leaf)
            slots[path] = {(n,): part for n, part in enumerate(array)} if place.holes else {(): array}
    return slots, problems


def name_leaves(
    slots: LeafSlices, adapted: set[str], path_map: PathMap
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The leaves under their names there, and the modules that they are the whole of."""
    tensors, modules, problems = {}, {}, []
    for path, parts in slots.items():
        module, _, leaf = path.removeprefix("params/").rpartition("/")
        place = torch_module_of(path_map, module)
        assert place is not None
        for index, part in parts.items():
            name = place.at(index)
            try:
                suffix, array = leaf_to_torch(leaf, part, place.kind)
            except ValueError as error:
                problems.append(f"{path}: {error}")
                break
            tensors[f"{name}.base_layer.{suffix}" if name in adapted else f"{name}.{suffix}"] = array
            if suffix == "weight":  # a bias alone is one of `bias=`, not of a saved module
                modules[name] = None
    raise_problems("the adapter cannot be written for PEFT", problems)
    return tensors, list(modules)


def assign_tensors(
    tensors: Mapping[str, Any], path_map: PathMap, params: Mapping[str, Any]
) -> tuple[LeafSlices, list[str]]:
    """Tensors that are no factors, as slices of our leaves; and a line for each that has no place or is no copy."""
    slots: LeafSlices = {}
    problems = []
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        location = module_of(path_map, module.removesuffix(".base_layer"))
        if location is None or suffix not in ("weight", "bias"):
            problems.append(f"+ {name}: no rule of the path map matches")
            continue
        leaves = ("bias",) if suffix == "bias" else ("kernel", "scale", "embedding")
        path = next((p for leaf in leaves if (p := f"params/{location[0]}/{leaf}") in params), None)
        if path is None:
            problems.append(
                f"+ {name}: the parameters have none of {', '.join(leaves)} in {location[0]!r}"
                if params
                else f"+ {name}: to read what was trained in full, give the base's params or their shapes"
            )
            continue
        try:
            part = _to_leaf_layout(host_array(tensor), path, location[1], path_map, params[path])
        except ValueError as error:
            problems.append(f"~ {name}: {error}")
            continue
        if suffix == "weight" and module.endswith(".base_layer"):
            problems += _copy_problems(name, part, params[path], location[1])
        else:
            slots.setdefault(path, {})[location[1]] = part
    return slots, problems


def _to_leaf_layout(array: np.ndarray, path: str, index: Index, path_map: PathMap, leaf: Any) -> np.ndarray:
    """A tensor as a slice of our leaf."""
    module, _, name = path.removeprefix("params/").rpartition("/")
    place = torch_module_of(path_map, module)
    shape = tuple(leaf.shape)[len(index) :]
    if any(n >= size for n, size in zip(index, leaf.shape, strict=False)):
        raise ValueError(f"the model has {leaf.shape[0]} layers")
    kind = place.kind if place else None
    expected = leaf_to_torch(name, np.broadcast_to(np.zeros((), np.int8), shape), kind)[1].shape
    if array.shape != expected:
        raise ValueError(f"it is {list(array.shape)}, the model needs {list(expected)}")
    return leaf_from_torch(name, array, shape, kind)


def _copy_problems(name: str, part: np.ndarray, leaf: Any, index: Index) -> list[str]:
    """PEFT puts the base's embedding into the file where it is adapted."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return []
    same = np.array_equal(host_array(leaf)[index].astype(part.dtype), part)
    return [] if same else [f"~ {name} is another weight than the base's"]


def stack_slices(slots: LeafSlices, params: Mapping[str, Any]) -> dict[str, Any]:
    """Slices put together; what a stack lacks is the base's, and stays a shape where only that is known."""
    leaves = {}
    for path, parts in slots.items():
        leaf = params[path]
        if () in parts:
            leaves[path] = jnp.asarray(parts[()])
        elif len(parts) < leaf.shape[0] and isinstance(leaf, jax.ShapeDtypeStruct):
            leaves[path] = leaf
        else:
            rows = [parts[(n,)] if (n,) in parts else host_array(leaf[n]) for n in range(leaf.shape[0])]
            leaves[path] = jnp.asarray(np.stack(rows))
    return leaves
