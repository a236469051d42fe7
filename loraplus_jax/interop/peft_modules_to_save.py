"""Converts fully trained leaves (`modules_to_save`, biases) to PEFT's names and layouts, and back."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .adapter_directory import host_array
from .path_map import SUFFIXES, Index, Outputs, PathMap, leaf_layout, modules_of, tied_heads


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


def leaves_to_torch(
    leaves: Mapping[str, Any], adapted: Collection[str], path_map: PathMap
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Converts leaves (`"params/..."`) to tensors with PyTorch's names, of which `adapted` are adapted modules.

    An embedding that is also the head gives two tensors and two modules: PEFT loads neither from the other.

    Returns:
      The tensors in PyTorch's layout, by name; the names of the fully trained modules, without those of which only
      the bias is trained; and a list of problems, one line per leaf or module that PEFT cannot store.
    """
    tensors, modules, problems = {}, {}, []
    heads = tied_heads(path_map)
    split: dict[str, list[tuple[Outputs, int, np.ndarray]]] = {}
    for path, leaf in leaves.items():
        try:
            layout = leaf_layout(path, leaf.shape, path_map)
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        leaf_array, suffix = host_array(leaf), layout.suffix
        for index in layout.indices:
            name, array = layout.module.at(index), layout.to_torch(leaf_array[(*index, ...)])
            full_name = f"{name}.base_layer.{suffix}" if name in adapted else f"{name}.{suffix}"
            if layout.module.outputs is None:
                tensors[full_name] = array
            else:
                part = (layout.module.outputs, layout.output_axis, array)
                split.setdefault(full_name, []).append(part)
            if suffix == "weight":  # a bias without a weight belongs to `bias=`, not to a saved module
                modules[name] = None
            if layout.module.kind == "TiedEmbedding":
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
    return tensors, list(modules), problems


def leaves_from_torch(
    tensors: Mapping[str, Any], path_map: PathMap, params: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Converts tensors other than factors to leaves; layers missing in a stack come from `params`.

    Returns:
      JAX arrays with the shapes in `params`, by path; where layers are missing and the leaf of `params` is a
      `jax.ShapeDtypeStruct`, that leaf; and a list of problems, one line per invalid tensor and module of ours.
    """
    slots: dict[str, dict[Index, np.ndarray]] = {}
    problems = []
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        leaves = [leaf for leaf, theirs in SUFFIXES.items() if theirs == suffix]
        locations = modules_of(path_map, module.removesuffix(".base_layer")) if leaves else []
        if not locations:
            problems.append(f"+ {name}: no rule of the path map matches")
        for ours, index in locations:
            path = next((p for leaf in leaves if (p := f"params/{ours}/{leaf}") in params), None)
            if path is None:
                problems.append(
                    f"+ {name}: {ours!r} has none of the parameters {', '.join(leaves)}"
                    if params
                    else f"+ {name}: fully trained tensors require params, the base's parameters or their shapes"
                )
                continue
            try:
                layout = leaf_layout(path, params[path].shape, path_map)
                part = layout.from_torch(host_array(tensor))
            except ValueError as error:
                problems.append(f"~ {name}: {error}")
                continue
            if index not in layout.indices:
                problems.append(f"~ {name}: the model has only {len(layout.indices)} layers")
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
    return {path: _stack(parts, params[path]) for path, parts in slots.items()}, problems


def _stack(parts: Mapping[Index, np.ndarray], leaf: Any) -> Any:
    if () in parts:
        return jnp.asarray(parts[()])
    if len(parts) < leaf.shape[0] and isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    rows = [parts[(n,)] if (n,) in parts else host_array(leaf[n]) for n in range(leaf.shape[0])]
    return jnp.asarray(np.stack(rows))
