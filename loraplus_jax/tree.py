"""Trees of variables: paths, and what is trained apart from what is frozen."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import jax
from flax import traverse_util

from ._validation import check_choice, suggest
from .config import Bias, LoRAPlusConfig, matches
from .spec import Specs


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
    """Nested dicts as one dict from "/"-joined path to leaf; `unflatten` is the inverse if no name holds a "/".

    >>> flatten({"layers": {0: {"kernel": 1.0}}})
    {'layers/0/kernel': 1.0}
    """
    return {join_path(path): leaf for path, leaf in traverse_util.flatten_dict(dict(tree)).items()}


def join_path(path: tuple[Any, ...]) -> str:
    """The keys of nested dicts, which may be integers, joined by "/"."""
    return "/".join(map(str, path))


def replace_leaves(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts with other leaves at some "/"-joined paths; names may hold a "/" themselves.

    >>> replace_leaves({"a": {"b": 1, "c/d": 2}}, {"a/c/d": 3})
    {'a': {'b': 1, 'c/d': 3}}
    """
    flat = traverse_util.flatten_dict(dict(tree))
    return traverse_util.unflatten_dict(
        {path: leaves.get(join_path(path), leaf) for path, leaf in flat.items()}
    )


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def split_trainable(
    variables: Mapping[str, Any], trained: LoRAPlusConfig | tuple[str, ...] = (), *, bias: Bias | None = None
) -> tuple[dict, dict]:
    """Variables as `(trainable, frozen)`: the adapters and what is trained in full, and all the rest.

    Args:
      variables: `{"params": ..., "lora": ..., ...}`.
      trained: the config, whose `modules_to_save` and `bias` say what is trained in full; or names of modules
        alone, which match as those do.
      bias: without a config, which leaves called `bias` are trained in full too: none (the default), all, or
        (`"lora_only"`) those of modules with an adapter.

    Raises:
      ValueError: a name that matches no module, biases are asked for and there is none, or `bias` beside a config.
    """
    if isinstance(trained, LoRAPlusConfig):
        if bias is not None:
            raise ValueError(f"the config says bias={trained.bias!r} already, got bias={bias!r} beside it")
        trained, bias = trained.modules_to_save, trained.bias
    flat = flatten(variables)
    modules = {m: None for path in flat for m in _parents(path, "params")}
    for name in trained:
        if not any(matches((name,), module) for module in modules):
            raise ValueError(f"modules_to_save: {name!r} matches no module{suggest(name, modules)}")

    biases = _biases(flat, "none" if bias is None else bias)

    def is_trained(path: str) -> bool:
        saved = any(matches(trained, m) for m in _parents(path, "params"))
        return path.startswith("lora/") or path in biases or saved

    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in traverse_util.flatten_dict(dict(variables)).items():
        parts[not is_trained(join_path(path))][path] = leaf
    return traverse_util.unflatten_dict(parts[0]), traverse_util.unflatten_dict(parts[1])


def with_collection(lora: Mapping[str, Any], specs: Specs) -> Mapping[str, Any]:
    """Variables `{"lora": factors, ...}`, given them or the tree of factors alone."""
    flat = flatten(lora)
    is_bare = any(path in flat for module, spec in specs.items() for path in spec.factor_paths(module))
    return {"lora": lora} if is_bare or (specs and "lora" not in lora) else lora


def flat_factors(lora: Mapping[str, Any], specs: Specs) -> dict[str, Any]:
    """Path to factor, given the tree of factors or `{"lora": factors}`.

    Raises:
      ValueError: the tree also holds what is trained in full, which the caller would lose.
    """
    variables = with_collection(lora, specs)
    if others := variables.keys() - {"lora"}:
        if not specs:
            return flatten(lora)
        raise ValueError(
            f"pass the adapters only, got {sorted(others)} beside them: parameters trained in full"
        )
    return flatten(variables["lora"])


def combine(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """The disjoint trees as one, the inverse of `split_trainable`; a leaf in two of them is a ValueError.

    >>> combine({"lora": {"q": 1}}, {"params": {"q": 2}})
    {'lora': {'q': 1}, 'params': {'q': 2}}
    """
    flat = [traverse_util.flatten_dict(dict(tree)) for tree in trees]
    for one, other in itertools.combinations(flat, 2):
        if both := one.keys() & other.keys():
            raise ValueError(f"the trees to combine share {', '.join(sorted(map(join_path, both)))}")
    return traverse_util.unflatten_dict(dict(itertools.chain.from_iterable(f.items() for f in flat)))


def count(tree: Any) -> int:
    """The number of values in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _biases(flat: Mapping[str, Any], bias: Bias) -> set[str]:
    """The paths of the biases to train."""
    check_choice("bias", bias, get_args(Bias))
    modules = {path.removeprefix("lora/").rpartition("/")[0] for path in flat if path.startswith("lora/")}
    found = {
        path
        for path in flat
        if path.startswith("params/") and path.rpartition("/")[2] == "bias"
        if bias == "all"
        or (bias == "lora_only" and path.removeprefix("params/").rpartition("/")[0] in modules)
    }
    if bias != "none" and not found:
        why = "the model has none" if bias == "all" else "no adapted layer has one"
        raise ValueError(f"bias={bias!r} matches no bias: {why}")
    return found


def _parents(path: str, collection: str) -> Iterator[str]:
    """The module paths above a leaf of `collection`, without the collection's own segment."""
    first, *segments = path.split("/")
    if first == collection:
        yield from ("/".join(segments[:n]) for n in range(1, len(segments)))
