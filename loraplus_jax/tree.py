"""Trees of variables: paths, the role of every trainable leaf, and what is trained apart from what is frozen."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
from flax import traverse_util

from .config import matches, nearest
from .spec import Specs

Role = Literal["a", "b", "embedding", "magnitude", "extra"]
ROLES: tuple[Role, ...] = ("a", "b", "embedding", "magnitude", "extra")
FACTORS: Mapping[str, Role] = {"lora_a": "a", "lora_b": "b"}


def leaf_path(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as segments joined by "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Path to leaf, in the tree's order.

    >>> leaves_by_path({"params": {"head": {"bias": 1.0}}})
    {'params/head/bias': 1.0}
    """
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as one dict from "/"-joined path to leaf; `unflatten` is the inverse."""
    return dict(traverse_util.flatten_dict(dict(tree), sep="/"))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def label_params(tree: Any, specs: Specs | None = None) -> Any:
    """The role of every leaf, as a tree of the same structure.

    `"a"` is the factor on the input side, `"b"` the one on the output side, whichever of them starts at zero.
    Adapters of embeddings are `"embedding"` (known from `specs` only), everything else is `"extra"`.
    Roles come from paths and never from values, so that the function also labels a tree of updates.

    Args:
      tree: trainable variables, `{"lora": ..., "params": ...}`, or the tree of adapters alone.
      specs: the table from `init_lora`; with it shapes are checked against the table.

    Raises:
      ValueError: a factor without its partner, factors that do not fit each other or the table.

    Example:
      >>> import jax.numpy as jnp
      >>> label_params({"lora": {"q": {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 3))}},
      ...               "params": {"head": {"bias": jnp.zeros(3)}}})
      {'lora': {'q': {'lora_a': 'a', 'lora_b': 'b'}}, 'params': {'head': {'bias': 'extra'}}}
    """
    leaves = leaves_by_path(tree)
    for module in _adapted(leaves):
        _check_pair(module, leaves, specs)
    return jax.tree_util.tree_map_with_path(lambda path, _: _role(leaf_path(path), specs), tree)


def split_trainable(variables: Mapping[str, Any], modules_to_save: tuple[str, ...]) -> tuple[dict, dict]:
    """Variables as `(trainable, frozen)`: the adapters and the modules trained in full, and all the rest.

    Args:
      variables: `{"params": ..., "lora": ..., ...}`.
      modules_to_save: names of modules whose parameters are trained in full; `LoRAPlusConfig` says how they match.

    Raises:
      ValueError: a name that matches no module.
    """
    flat = flatten(variables)
    modules = {m: None for path in flat for m in _parents(path, "params")}
    for name in modules_to_save:
        if not any(matches((name,), module) for module in modules):
            raise ValueError(f"modules_to_save: {name!r} matches no module{nearest(name, modules)}")

    def is_trained(path: str) -> bool:
        return path.startswith("lora/") or any(matches(modules_to_save, m) for m in _parents(path, "params"))

    trainable = {path: leaf for path, leaf in flat.items() if is_trained(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten(trainable), unflatten(frozen)


def combine(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """The disjoint trees as one, the inverse of `split_trainable`; a leaf in two of them is a ValueError.

    >>> combine({"lora": {"q": 1}}, {"params": {"q": 2}})
    {'lora': {'q': 1}, 'params': {'q': 2}}
    """
    flat = [flatten(tree) for tree in trees]
    for one, other in itertools.combinations(flat, 2):
        if both := one.keys() & other.keys():
            raise ValueError(f"the trees to combine share {', '.join(sorted(both))}")
    return unflatten(dict(itertools.chain.from_iterable(f.items() for f in flat)))


def count(tree: Any) -> int:
    """The number of values in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def spec_key(module: str) -> str:
    """A module's path in the specs, given its path in a tree that may have the collection's name on top."""
    return "" if module == "lora" else module.removeprefix("lora/")


def _parents(path: str, collection: str) -> Iterator[str]:
    """The module paths above a leaf of `collection`, without the collection's own segment."""
    first, *segments = path.split("/")
    if first == collection:
        yield from ("/".join(segments[:n]) for n in range(1, len(segments)))


def _role(path: str, specs: Specs | None) -> Role:
    module, _, name = path.rpartition("/")
    if name not in FACTORS:
        return "extra"
    spec = (specs or {}).get(spec_key(module))
    return "embedding" if spec is not None and spec.kind == "embed" else FACTORS[name]


def _adapted(leaves: Mapping[str, Any]) -> list[str]:
    """The paths of modules that hold a factor."""
    split = [path.rpartition("/") for path in leaves]
    return list(dict.fromkeys(module for module, _, name in split if name in FACTORS))


def _check_pair(module: str, leaves: Mapping[str, Any], specs: Specs | None) -> None:
    paths = {name: f"{module}/{name}".removeprefix("/") for name in FACTORS}
    missing = [name for name, path in paths.items() if path not in leaves]
    if missing:
        raise ValueError(f"{module or 'the tree'} holds one factor only: {missing[0]} is missing")
    a, b = (tuple(leaves[path].shape) for path in paths.values())
    spec = (specs or {}).get(spec_key(module))
    if specs is not None and spec is None:
        raise ValueError(f"{module} is not in the specs{nearest(module, specs)}")
    if spec is not None and (a, b) != spec.factor_shapes:
        raise ValueError(f"{module}: factors {a} and {b} do not fit the specs' {spec.factor_shapes}")
    if len(a) < 2 or len(b) < 2 or a[-1] not in b[:-1]:
        raise ValueError(
            f"{module}: lora_a {a} and lora_b {b} do not meet in a rank; lora_a is (in, r), lora_b is (r, out)"
        )
