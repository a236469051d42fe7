"""Converts fully trained leaves (`modules_to_save`, biases) to PEFT's names and layouts, and back."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._utils.validation import raise_problems
from .adapter_directory import host_array
from .path_map import (
    Index,
    Outputs,
    PathMap,
    leaf_from_torch,
    leaf_to_torch,
    modules_of,
    output_axis,
    tied_heads,
    torch_module_of,
)

LeafSlices = dict[str, dict[Index, Any]]
"""Slices of our leaves, by path (`"params/..."`) and index; the index `()` is a whole leaf."""


def drop_copies(tensors: Mapping[str, Any], path_map: PathMap) -> tuple[dict[str, Any], list[str]]:
    """Drops duplicate tensors of PEFT's file.

    PEFT also writes the biases of a fully trained module under its wrapper's names, along with the biases from
    before training, and repeats the factors of a tied embedding as the head's.

    Returns:
      The other tensors by name; and a list of problems, one line per invalid duplicate and per tied head whose
      weight or factors are missing.
    """
    kept, problems = {}, []
    heads = tied_heads(path_map)
    for name, tensor in tensors.items():
        if re.fullmatch(r".+\.original_module\..+", name):
            continue
        wrapped = re.fullmatch(r"(.+)\.modules_to_save\.(?:default\.)?(.+)", name)
        original, transposed, why = f"{wrapped[1]}.{wrapped[2]}" if wrapped else None, False, ""
        head = next((head for head in heads if name.startswith(f"{head}.")), None)
        if head is not None:
            end = name.removeprefix(f"{head}.")
            original = f"{heads[head]}.{OF_HEAD.get(end, end)}"
            transposed = end in OF_HEAD
            why = (
                f", since the model's head is tied to {heads[head]}; `loraplus convert --to merged` unties it"
            )
        if original is None:
            kept[name] = tensor
        elif original not in tensors:
            problems.append(f"{name} must be a copy of {original}, which is missing{why}")
        elif not np.array_equal(
            host_array(tensor), host_array(tensors[original]).T if transposed else tensors[original]
        ):
            problems.append(f"{name} must be a copy of {original}, but differs{why}")
    # PEFT's embedding without the head's tensors is one whose head it left alone.
    for head, embedding in heads.items():
        for option, ends in (("modules_to_save", {"weight": "weight"}), ("target_modules", OF_HEAD)):
            needed = [f"{head}.{end}" for end, name in ends.items() if f"{embedding}.{name}" in tensors]
            if missing := [name for name in needed if name not in tensors]:
                problems.append(
                    f"the file lacks {' and '.join(missing)}, but the model's head is tied to {embedding}, which "
                    f"is trained: train in PEFT with ensure_weight_tying=True and {head} in {option}; {_UNTIE}"
                )
    return kept, problems


_UNTIE = "or merge it with `loraplus convert --to merged`, which unties the head"
OF_HEAD = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
"""Maps the factors of a tied head to the factors of the embedding, which are their transposes."""


def slice_leaves(leaves: Mapping[str, Any], path_map: PathMap) -> tuple[LeafSlices, list[str]]:
    """Slices fully trained leaves whose rule has an index.

    Returns:
      The slices as numpy arrays, by path and index; and a list of problems, one line per leaf without a valid rule.
    """
    slots, problems = {}, []
    for path, leaf in leaves.items():
        module = path.removeprefix("params/").rpartition("/")[0]
        torch_module = torch_module_of(path_map, module) if path.startswith("params/") else None
        if torch_module is None:
            problems.append(f"{path}: no rule of the path map matches {module!r}")
        elif len(torch_module.holes) > 1:
            problems.append(
                f"{path}: a fully trained leaf must have at most one index, got {len(torch_module.holes)} in "
                f"{torch_module.name}"
            )
        elif torch_module.parts and len(leaf) != len(torch_module.parts):
            problems.append(
                f"{path}: its first axis must have size {len(torch_module.parts)} for {torch_module.name}, got "
                f"shape {tuple(leaf.shape)}"
            )
        else:
            array = host_array(leaf)
            slots[path] = {(n,): part for n, part in enumerate(array)} if torch_module.holes else {(): array}
    return slots, problems


def name_leaves(
    slots: LeafSlices, adapted: set[str], path_map: PathMap
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts leaves to tensors with PyTorch's names.

    An embedding that is also the head gives two tensors and two modules: PEFT loads neither from the other.

    Returns:
      The tensors in PyTorch's layout, by name; and the names of the fully trained modules, without those of which
      only the bias is trained.
    """
    tensors, modules, problems = {}, {}, []
    heads = tied_heads(path_map)
    split: dict[str, list[tuple[Outputs, int, np.ndarray]]] = {}
    for path, parts in slots.items():
        module, _, leaf = path.removeprefix("params/").rpartition("/")
        torch_module = torch_module_of(path_map, module)
        assert torch_module is not None
        for index, part in parts.items():
            name = torch_module.at(index)
            try:
                suffix, array = leaf_to_torch(leaf, part, torch_module.kind)
            except ValueError as error:
                problems.append(f"{path}: {error}")
                break
            full_name = f"{name}.base_layer.{suffix}" if name in adapted else f"{name}.{suffix}"
            if torch_module.outputs is None:
                tensors[full_name] = array
            else:
                axis = output_axis(suffix, torch_module.kind)
                split.setdefault(full_name, []).append((torch_module.outputs, axis, array))
            if suffix == "weight":  # a bias without a weight belongs to `bias=`, not to a saved module
                modules[name] = None
            if torch_module.kind == "TiedEmbedding":
                head = next((head for head, embedding in heads.items() if embedding == name), None)
                if head is None:
                    problems.append(
                        f"{path}: {name} is also the head, whose name is missing: add a rule of kind TiedHead to "
                        "the path map"
                    )
                    break
                tensors[f"{head}.{suffix}"], modules[head] = array, None
    for name, parts in split.items():
        parts.sort(key=lambda part: part[0])
        size, axis = parts[0][0].size, parts[0][1]
        if sum(outputs.stop - outputs.start for outputs, _, _ in parts) != size:
            trained = ", ".join(f"{outputs.start}:{outputs.stop}" for outputs, _, _ in parts)
            problems.append(
                f"{name}: of its {size} outputs only {trained} are fully trained, but PEFT trains all or none: "
                "train all its parts, or merge the adapter instead"
            )
        tensors[name] = np.concatenate([array for _, _, array in parts], axis)
    raise_problems("cannot convert the adapter to PEFT", problems)
    return tensors, list(modules)


def assign_tensors(
    tensors: Mapping[str, Any], path_map: PathMap, params: Mapping[str, Any]
) -> tuple[LeafSlices, list[str]]:
    """Converts tensors other than factors to slices of our leaves.

    Returns:
      The slices as numpy arrays in our layout, by path and index; and a list of problems, one line per invalid
      tensor and module of ours.
    """
    slots: LeafSlices = {}
    problems = []
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        locations = modules_of(path_map, module.removesuffix(".base_layer"))
        if not locations or suffix not in ("weight", "bias"):
            problems.append(f"+ {name}: no rule of the path map matches")
        for ours, index in locations if suffix in ("weight", "bias") else ():
            leaves = ("bias",) if suffix == "bias" else ("kernel", "scale", "embedding")
            path = next((p for leaf in leaves if (p := f"params/{ours}/{leaf}") in params), None)
            if path is None:
                problems.append(
                    f"+ {name}: {ours!r} has none of the parameters {', '.join(leaves)}"
                    if params
                    else f"+ {name}: fully trained tensors require params, the base's parameters or their shapes"
                )
                continue
            try:
                part = _to_leaf_layout(host_array(tensor), path, index, path_map, params[path])
            except ValueError as error:
                problems.append(f"~ {name}: {error}")
                continue
            if suffix == "weight" and module.endswith(".base_layer"):
                # PEFT saves the base's embedding if it is adapted; a shape cannot be compared with it.
                leaf = params[path]
                if not isinstance(leaf, jax.ShapeDtypeStruct) and not np.array_equal(
                    host_array(leaf)[index].astype(part.dtype), part
                ):
                    problems.append(f"~ {name} differs from the base's weight")
            else:
                slots.setdefault(path, {})[index] = part
    return slots, problems


def _to_leaf_layout(array: np.ndarray, path: str, index: Index, path_map: PathMap, leaf: Any) -> np.ndarray:
    """Converts a tensor, or the outputs of it that our leaf has, to a slice of our leaf."""
    module, _, name = path.removeprefix("params/").rpartition("/")
    torch_module = torch_module_of(path_map, module)
    shape = tuple(leaf.shape)[len(index) :]
    if any(n >= size for n, size in zip(index, leaf.shape, strict=False)):
        raise ValueError(f"the model has only {leaf.shape[0]} layers")
    kind, outputs = (torch_module.kind, torch_module.outputs) if torch_module else (None, None)
    suffix, sample = leaf_to_torch(name, np.broadcast_to(np.zeros((), np.int8), shape), kind)
    expected, axis = list(sample.shape), output_axis(suffix, kind)
    if outputs is not None:
        expected[axis] = outputs.size
    if list(array.shape) != expected:
        raise ValueError(f"must have shape {expected}, got {list(array.shape)}")
    if outputs is not None:
        array = array[(slice(None),) * axis + (outputs.rows,)]
    return leaf_from_torch(name, array, shape, kind)


def stack_slices(slots: LeafSlices, params: Mapping[str, Any]) -> dict[str, Any]:
    """Combines slices into leaves; layers missing in a stack come from `params`.

    Returns:
      A dict from paths to JAX arrays with the shapes in `params`; where layers are missing and the leaf of `params`
      is a `jax.ShapeDtypeStruct`, that leaf.
    """
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
