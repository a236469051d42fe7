"""Trees of variables: paths, the role of every trainable leaf, and what is trained apart from what is frozen."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import optax
from flax import traverse_util

from ._validation import suggest
from .config import Bias, LoRAPlusConfig, matches
from .factor_pairs import factor_pairs, spec_path
from .spec import Specs

Role = Literal["a", "b", "embedding", "magnitude", "extra", "vector"]
ROLES: tuple[Role, ...] = ("a", "b", "embedding", "magnitude", "extra", "vector")
Policy = Literal["lora_plus", "peft"]
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
    """Nested dicts as one dict from "/"-joined path to leaf; `unflatten` is the inverse if no name holds a "/"."""
    return dict(traverse_util.flatten_dict(dict(tree), sep="/"))


def replace_leaves(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts with other leaves at some "/"-joined paths; names may hold a "/" themselves.

    >>> replace_leaves({"a": {"b": 1, "c/d": 2}}, {"a/c/d": 3})
    {'a': {'b': 1, 'c/d': 3}}
    """
    flat = traverse_util.flatten_dict(dict(tree))
    return traverse_util.unflatten_dict(
        {path: leaves.get("/".join(path), leaf) for path, leaf in flat.items()}
    )


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def label_params(tree: Any, specs: Specs | None = None, *, policy: Policy = "lora_plus") -> Any:
    """The role of every leaf, as a tree of the same structure.

    `"a"` is the factor on the input side, `"b"` the one on the output side, whichever of them starts at zero.
    Adapters of embeddings are `"embedding"` (known from `specs` only), everything else is `"extra"`.
    Roles come from paths and shapes and never from values, so that the function also labels a tree of updates.

    Trees of adapters made by others are labelled by side too: `flax.nnx.LoRA` (`lora_a`), qwix (`kernel_lora_a`),
    gemma (`lora/a`), keras (`lora_kernel_a`), PEFT (`lora_A`, whatever the layout), kohya (`lora_down`), and lorax,
    which calls the factor of the input side `b`.

    Args:
      tree: trainable variables, `{"lora": ..., "params": ...}`, or the tree of adapters alone.
      specs: the table from `init_lora`; with it shapes are checked against the table.
      policy: `"peft"` labels biases and scales `"vector"`, and what else has one axis `"b"`, as PEFT groups them.

    Raises:
      ValueError: a factor without its partner, factors that do not fit each other or the table, sides that cannot
        be told (a pair `a`, `b` alone or beside a square weight, a kernel that says otherwise than the names), or
        another leaf with two axes or more and a name that speaks of LoRA.

    Example:
      >>> import jax.numpy as jnp
      >>> label_params({"lora": {"q": {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 3))}},
      ...               "params": {"head": {"bias": jnp.zeros(3)}}})
      {'lora': {'q': {'lora_a': 'a', 'lora_b': 'b'}}, 'params': {'head': {'bias': 'extra'}}}
    """
    if policy not in get_args(Policy):
        raise ValueError(f"policy must be one of {', '.join(get_args(Policy))}, got {policy!r}")
    leaves = leaves_by_path(tree)
    roles = _factor_roles(leaves, specs)

    def label(path: tuple[Any, ...], leaf: Any) -> Role:
        name = leaf_path(path)
        role = roles.get(name, "extra")
        return _peft_role(name, leaf) if policy == "peft" and role == "extra" else role

    return jax.tree_util.tree_map_with_path(label, tree)


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
        parts[not is_trained("/".join(path))][path] = leaf
    return traverse_util.unflatten_dict(parts[0]), traverse_util.unflatten_dict(parts[1])


def combine(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """The disjoint trees as one, the inverse of `split_trainable`; a leaf in two of them is a ValueError.

    >>> combine({"lora": {"q": 1}}, {"params": {"q": 2}})
    {'lora': {'q': 1}, 'params': {'q': 2}}
    """
    flat = [traverse_util.flatten_dict(dict(tree)) for tree in trees]
    for one, other in itertools.combinations(flat, 2):
        if both := one.keys() & other.keys():
            raise ValueError(f"the trees to combine share {', '.join(sorted(map('/'.join, both)))}")
    return traverse_util.unflatten_dict(dict(itertools.chain.from_iterable(f.items() for f in flat)))


def count(tree: Any) -> int:
    """The number of values in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _biases(flat: Mapping[str, Any], bias: Bias) -> set[str]:
    """The paths of the biases to train."""
    if bias not in get_args(Bias):
        raise ValueError(f"bias must be one of {', '.join(get_args(Bias))}, got {bias!r}")
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


def _peft_role(path: str, leaf: Any) -> Role:
    """PEFT's groups: everything with one axis learns as fast as B, biases and norms among it without decay."""
    if path.rpartition("/")[2] in ("bias", "scale"):
        return "vector"
    return "b" if len(leaf.shape) == 1 else "extra"


def _factor_roles(leaves: Mapping[str, Any], specs: Specs | None) -> dict[str, Role]:
    """The roles of all factors by path."""
    roles: dict[str, Role] = {}
    for module, pair in factor_pairs(leaves, specs).items():
        spec = (specs or {}).get(spec_path(module))
        embedded = spec is not None and spec.kind == "embed"
        roles |= dict.fromkeys(pair, "embedding") if embedded else {pair.a: "a", pair.b: "b"}
    return roles


def role_norms(tree: Any, labels: Any) -> dict[str, jax.Array]:
    """The global norm over the leaves of each role that occurs.

    Args:
      tree: gradients, updates or parameters.
      labels: `label_params` of a tree of that structure.

    >>> import jax.numpy as jnp
    >>> role_norms({"x": jnp.array([3.0, 4.0])}, {"x": "extra"})["extra"].item()
    5.0
    """
    return {role: optax.tree.norm(leaves) for role, leaves in leaves_by_role(tree, labels).items()}


def leaves_by_role(tree: Any, labels: Any) -> dict[str, list[Any]]:
    """The leaves of each role that occurs, in the order of `ROLES`."""
    roles, leaves = jax.tree.leaves(labels), jax.tree.leaves(tree)
    found = {role: [leaf for leaf, r in zip(leaves, roles, strict=True) if r == role] for role in ROLES}
    return {role: chosen for role, chosen in found.items() if chosen}
