"""Trees of variables: paths, flattening, and splitting trainable from frozen variables."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax
from flax import traverse_util
from flax.core import meta
from jax import tree_util

from .._utils.validation import check_choice, suggest
from ..quantization.packed_array import is_from_qwix, is_packed
from .config import Bias, LoRAPlusConfig, matches
from .spec import AdapterSpec, Specs, check_floating_weight


def leaf_path(path: tuple[Any, ...]) -> str:
    """The segments of a key path of `jax.tree_util`, joined by "/"."""
    return tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of any tree by their paths, in the tree's order; `is_leaf` as in `jax.tree.leaves`.

    >>> leaves_by_path({"params": {"head": {"bias": 1.0}}})
    {'params/head/bias': 1.0}
    """
    return {leaf_path(path): leaf for path, leaf in tree_util.tree_leaves_with_path(tree, is_leaf)}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested dicts, and any trees in them, to "/"-joined paths.

    `unflatten` is the inverse if all are dicts and no key contains "/".

    Returns:
      A dict from path to leaf. A box of metadata or a packed weight is one leaf; empty dicts are dropped.

    Raises:
      TypeError: `tree` is no dict.

    >>> flatten({"layers": {0: {"kernel": 1.0}, 1: [2.0]}})
    {'layers/0/kernel': 1.0, 'layers/1/0': 2.0}
    """
    if not isinstance(tree, Mapping):
        raise TypeError(
            f'variables must be a dict such as {{"params": tree}}, got a {type(tree).__name__}; its values '
            "may be any trees"
        )
    flat = {}
    # Dicts not by jax.tree, which would sort their keys.
    for path, leaf in traverse_util.flatten_dict(dict(tree)).items():
        name = join_path(path)
        inner = {"": leaf} if _is_leaf(leaf) else leaves_by_path(leaf, _is_leaf)
        flat |= {f"{name}/{own}" if own else name: x for own, x in inner.items()}
    return flat


def _is_leaf(value: Any) -> bool:
    # Boxes of metadata and packed weights, ours and qwix's, are trees to JAX.
    return (
        value is None
        or isinstance(value, meta.AxisMetadata)
        or is_packed(value)
        or is_from_qwix(value)
        or tree_util.all_leaves([value])
    )


def join_path(path: tuple[Any, ...]) -> str:
    """The keys of nested dicts, which may be integers, joined by "/"."""
    return "/".join(map(str, path))


def replace_leaves(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested dicts, and any trees in them, with other leaves at some paths; those it lacks are ignored.

    >>> replace_leaves({"a": {"b": 1, "c/d": 2}}, {"a/c/d": 3})
    {'a': {'b': 1, 'c/d': 3}}
    """

    def new(name: str, leaf: Any) -> Any:
        if _is_leaf(leaf):
            return leaves.get(name, leaf)
        replaced = lambda path, x: leaves.get(f"{name}/{leaf_path(path)}", x)  # noqa: E731
        return tree_util.tree_map_with_path(replaced, leaf, is_leaf=_is_leaf)

    flat = traverse_util.flatten_dict(dict(tree))
    return traverse_util.unflatten_dict({path: new(join_path(path), leaf) for path, leaf in flat.items()})


def replace_paths(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree like `tree`, such as a module's state, with other leaves at some paths; those it lacks are ignored.

    >>> replace_paths({"a": (1, 2)}, {"a/1": 3})
    {'a': (1, 3)}
    """
    return tree_util.tree_map_with_path(lambda path, leaf: leaves.get(leaf_path(path), leaf), tree)


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    Returns:
      Nested dicts with strings as keys.
    """
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def split_trainable(
    variables: Mapping[str, Any], trained: LoRAPlusConfig | Sequence[str] = (), *, bias: Bias | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits variables into those to train, which are adapters and fully trained parameters, and all others.

    Args:
      variables: `{"params": ..., "lora": ..., ...}`.
      trained: the config, whose `modules_to_save` and `bias` select the fully trained parameters; or module names
        like those in `modules_to_save`.
      bias: without a config, which biases to train: `"none"` (the default), `"all"`, or `"lora_only"` (those of
        modules with an adapter).

    Returns:
      `(trainable, frozen)`, nested dicts like `variables` that share no leaf; `combine` is the inverse.

    Raises:
      ValueError: a name matches no module, `bias` matches no bias, or both `bias` and a config are passed.
    """
    if isinstance(trained, LoRAPlusConfig):
        if bias is not None:
            raise ValueError(
                f"pass bias or a config, not both; the config has bias={trained.bias!r}, not {bias!r}"
            )
        trained, bias = trained.modules_to_save, trained.bias
    bias = "none" if bias is None else bias
    check_choice("bias", bias, get_args(Bias))
    # By tuples of keys, since keys may be integers or contain "/".
    leaves = traverse_util.flatten_dict(dict(variables))
    flat = list(map(join_path, leaves))
    modules = {module: None for path in flat for module in _modules_above(path)}
    for name in trained:
        if not any(matches((name,), module) for module in modules):
            raise ValueError(f"modules_to_save: {name!r} matches no module{suggest(name, modules)}")
    adapted = {path.removeprefix("lora/").rpartition("/")[0] for path in flat if path.startswith("lora/")}
    biases = {
        path
        for path in flat
        if path.startswith("params/") and path.rpartition("/")[2] == "bias"
        if bias == "all" or (bias == "lora_only" and path[len("params/") :].rpartition("/")[0] in adapted)
    }
    if bias != "none" and not biases:
        reason = "the model has no biases" if bias == "all" else "no adapted layer has a bias"
        raise ValueError(f"bias={bias!r} matches nothing: {reason}")
    parts: tuple[dict, dict] = ({}, {})
    for path, (keys, leaf) in zip(flat, leaves.items(), strict=True):
        is_saved = any(matches(trained, module) for module in _modules_above(path))
        parts[not (is_saved or path in biases or path.startswith("lora/"))][keys] = leaf
    return traverse_util.unflatten_dict(parts[0]), traverse_util.unflatten_dict(parts[1])


def with_collection(lora: Mapping[str, Any], specs: Specs) -> Mapping[str, Any]:
    """Variables with a bare tree of factors in the collection `"lora"`, or `lora` itself if it has one."""
    # A module may be called "lora", so the key alone does not tell.
    flat = flatten(lora)
    is_bare = any(path in flat for module, spec in specs.items() for path in spec.factor_paths(module))
    return {"lora": lora} if is_bare or (specs and "lora" not in lora) else lora


def factors_by_module(where: str, lora: Mapping[str, Any], specs: Specs) -> dict[str, tuple[Any, ...]]:
    """A, B and, if there are any, the magnitudes of every module, from a tree of factors or `{"lora": factors}`.

    Raises:
      ValueError: factors and specs differ in paths or shapes, or the tree also contains fully trained parameters,
        which the caller would lose. The message begins with `where`.
    """
    variables = with_collection(lora, specs)
    if "lora" in variables and (others := variables.keys() - {"lora"}):
        raise ValueError(
            f"{where}: pass only the adapters, got also fully trained parameters in {sorted(others)[:5]}"
        )
    flat = flatten(variables.get("lora", lora))
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in flat.items()}
    expected = {f.path: f.shape for module, spec in specs.items() for f in spec.factors_of(module)}
    paths = sorted(shapes.keys() | expected.keys())
    if differing := [path for path in paths if shapes.get(path) != expected.get(path)]:
        first = differing[0]
        raise ValueError(
            f"{where}: factors and specs differ at {', '.join(differing[:5])}; the shape of {first} is "
            f"{shapes.get(first, 'absent')} in the factors and {expected.get(first, 'absent')} in the specs"
        )
    return {module: tuple(map(flat.get, spec.factor_paths(module))) for module, spec in specs.items()}


def weight_of(where: str, flat: Mapping[str, Any], spec: AdapterSpec) -> Any:
    """The weight of a spec among flattened variables, without its box; `where` names them in messages.

    Raises:
      ValueError: the weight is missing, has another shape or holds integers.
    """
    weight = meta.unbox(flat.get(spec.leaf))
    if (shape := getattr(weight, "shape", None)) != spec.shape:
        problem = "but is missing" if shape is None else f"got {shape}"
        raise ValueError(f"{spec.leaf} in {where} must have shape {spec.shape}, {problem}")
    check_floating_weight(f"{spec.leaf} in {where}", weight.dtype)
    return weight


def combine(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Combines disjoint trees, the inverse of `split_trainable`; raises ValueError if two share a leaf.

    Returns:
      Nested dicts with the leaves of all trees.

    >>> combine({"lora": {"q": 1}}, {"params": {"q": 2}})
    {'lora': {'q': 1}, 'params': {'q': 2}}
    """
    flat = [traverse_util.flatten_dict(dict(tree)) for tree in trees]
    for first, second in itertools.combinations(flat, 2):
        if shared := first.keys() & second.keys():
            raise ValueError(f"trees to combine share {', '.join(sorted(map(join_path, shared)))}")
    return traverse_util.unflatten_dict(dict(itertools.chain.from_iterable(f.items() for f in flat)))


def count(tree: Any) -> int:
    """Counts the values in a tree of arrays or shapes.

    Returns:
      The number of values; a packed weight counts as the array that it stands for.
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_packed))


def _modules_above(path: str) -> list[str]:
    """The paths of the modules that hold a parameter, from its path in the variables."""
    first, *segments = path.split("/")
    return ["/".join(segments[:n]) for n in range(1, len(segments))] if first == "params" else []


def rebox(box: Any, value: Any) -> Any:
    """`value` in a copy of the metadata box of the old value, if it has one."""
    return box.replace_boxed(value) if isinstance(box, meta.AxisMetadata) else value
