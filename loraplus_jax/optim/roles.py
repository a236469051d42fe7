"""Labels trainable leaves by role (A, B, embedding factor, ...), and reads the roles from optimizer states."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import optax
from flax import struct

from .._utils.validation import check_choice, repeated
from ..adapter.spec import Specs
from ..adapter.tree import leaves_by_path, replace_paths
from .find_pairs import factor_pairs, is_embedding_factor, is_magnitude, spec_paths

Role = Literal["a", "b", "embedding", "magnitude", "extra", "vector"]
ROLES: tuple[Role, ...] = ("a", "b", "embedding", "magnitude", "extra", "vector")
Policy = Literal["lora_plus", "peft"]


def label_params(tree: Any, specs: Specs | None = None, *, policy: Policy = "lora_plus") -> Any:
    """Labels every leaf with its role.

    `"a"` is the factor on the input side, `"b"` the factor on the output side, whichever is initialized to zero.
    Factors of embeddings are `"embedding"`, DoRA's magnitudes `"magnitude"`, all other leaves `"extra"`. Roles
    depend on paths and shapes, never on values, so it also labels trees of updates.

    It also labels adapter trees of other libraries by side: `flax.nnx.LoRA` (`lora_a`), qwix (`kernel_lora_a`),
    gemma (`lora/a`), keras (`lora_kernel_a`), PEFT (`lora_A`, in any layout) and kohya (`lora_down`).

    Args:
      tree: trainable variables, `{"lora": ..., "params": ...}`, or only the tree of adapters.
      specs: the table from `init_lora`, to check shapes; optional.
      policy: `"peft"` groups as PEFT does: biases and LayerNorms are `"vector"`, magnitudes and other leaves with
        one axis are `"b"`. Leaves named `bias` or `scale` count as having one axis, also in stacked layers.

    Returns:
      A tree like `tree`, with a `Role`, str, in place of each leaf.

    Raises:
      ValueError: a factor has no partner, factors do not match each other or the specs, the sides are ambiguous,
        another leaf with two or more axes looks like a LoRA factor, or the tree is a single array.

    Example:
      >>> import jax.numpy as jnp
      >>> label_params({"lora": {"q": {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 3))}},
      ...               "params": {"head": {"bias": jnp.zeros(3)}}})
      {'lora': {'q': {'lora_a': 'a', 'lora_b': 'b'}}, 'params': {'head': {'bias': 'extra'}}}
    """
    check_choice("policy", policy, get_args(Policy))
    leaves = leaves_by_path(tree)
    if "" in leaves:
        raise ValueError(
            "the parameters are one array, whose parts have no names, as inside optax.flatten: put the LoRA+ "
            "optimizer outside of it"
        )
    is_peft = policy == "peft"
    roles: dict[str, Role] = {}
    pairs = factor_pairs(leaves, specs)
    paths = spec_paths(pairs, specs)
    for module, pair in pairs.items():
        spec = (specs or {}).get(paths[module])
        embedded = is_embedding_factor(pair.a) if spec is None else spec.kind == "embed"
        roles |= dict.fromkeys(pair, "embedding") if embedded else {pair.a: "a", pair.b: "b"}
    for path in leaves.keys() - roles.keys():
        if is_magnitude(path):
            roles[path] = "b" if is_peft else "magnitude"
        else:
            roles[path] = _peft_role(path, leaves) if is_peft else "extra"
    return replace_paths(tree, roles)


class LoRAPlusState(struct.PyTreeNode):
    """An optimizer state with the roles and rates of its last update; `find_states` finds it in any chain.

    Attributes:
      inner_state: state of the optimizer itself.
      count: number of updates, int32.
      rates: learning rate of the last update by role, float32 (initially that of the first update).
      decays: weight decay by role, likewise; empty with `lora_plus`, where the wrapped optimizer sets it.
      roles: `(path, role)` of every leaf.
      relative: whether rates are multiples of a wrapped optimizer's, as with `lora_plus`.
      undecayed: paths of the leaves without weight decay, whatever their role's.
    """

    inner_state: Any
    count: jax.Array
    rates: dict[str, jax.Array]
    decays: dict[str, jax.Array]
    roles: tuple[tuple[str, Role], ...] = struct.field(pytree_node=False)
    relative: bool = struct.field(pytree_node=False)
    undecayed: frozenset[str] = struct.field(pytree_node=False, default=frozenset())

    # As a chain's state does: tunix looks among these parts for an injected learning rate, to log it.
    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner_state)


def find_states(opt_state: Any, *kinds: type) -> list[Any]:
    """Finds states by type, by default those of LoRA+ transforms, inside `optax.chain` and other wrappers.

    Returns:
      The states, in the order of `opt_state`; empty if there is none.

    Raises:
      ValueError: two LoRA+ transforms update one leaf, so that its ratio would be the product of theirs.
    """
    # Several, if optax.multi_transform or optax.masked gives each transform a part of the tree.
    is_kind = lambda x: isinstance(x, kinds or LoRAPlusState)  # noqa: E731
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=is_kind) if is_kind(x)]
    paths = [path for x in states if isinstance(x, LoRAPlusState) for path, _ in x.roles]
    if twice := repeated(paths):
        raise ValueError(
            f"lr_ratio applies twice: two LoRA+ transforms update {twice[0]}; keep one, or give each separate "
            "leaves by optax.multi_transform"
        )
    return states


def lr_ratio_of(opt_state: Any) -> float | None:
    """Lambda of the last update, at first of the first, to six digits; None without one or if both rates are 0."""
    ratios = {
        float(state.rates["b"] / state.rates["a"])
        for state in find_states(opt_state)
        if {"a", "b"} <= state.rates.keys() and state.rates["a"] != 0
    }
    if not ratios:
        return None
    # Quotients of float32 rates.
    if not math.isclose(min(ratios), max(ratios), rel_tol=1e-5):
        raise ValueError(f"all LoRA+ transforms of an optimizer must have one ratio, got {sorted(ratios)}")
    return float(f"{min(ratios):.6g}")


def labels_of(opt_state: Any, tree: Any) -> Any:
    """A tree with the role of each leaf by an optimizer state; without LoRA+ in it, as by `label_params`."""
    states = find_states(opt_state)
    if not states:
        return label_params(tree)
    # Leaves hidden from the LoRA+ transform, as by optax.masked, are "extra".
    roles = {path: role for state in states for path, role in state.roles}
    return replace_paths(jax.tree.map(lambda _: "extra", tree), roles)


def _peft_role(path: str, leaves: Mapping[str, Any]) -> Role:
    # PEFT gives B's rate to all leaves with one axis, and no decay to biases and LayerNorms. Only names show which
    # leaves of stacked layers have one axis. A norm without a bias is an RMSNorm, which PEFT decays.
    value = "/value" if path.endswith("/value") else ""
    module, _, name = path.removesuffix(value).rpartition("/")
    if name == "bias" or (name == "scale" and f"{module}/bias{value}".lstrip("/") in leaves):
        return "vector"
    return "b" if name == "scale" or len(leaves[path].shape) == 1 else "extra"


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf is a factor or a kernel, not a bias, the scale of a norm or a magnitude, by name and axes."""
    # Only names show it of stacked layers, whose biases have two axes.
    name = path.removesuffix("/value").rpartition("/")[2]
    return len(leaf.shape) > 1 and name not in ("bias", "scale") and not is_magnitude(path)


def role_norms(tree: Any, labels: Any) -> dict[str, jax.Array]:
    """The global norm of the leaves of each role that occurs; `labels` is a tree from `label_params`.

    >>> import jax.numpy as jnp
    >>> role_norms({"x": jnp.array([3.0, 4.0])}, {"x": "extra"})["extra"].item()
    5.0
    """
    return {role: optax.tree.norm(leaves) for role, leaves in leaves_by_role(tree, labels).items()}


def leaves_by_role(tree: Any, labels: Any) -> dict[str, list[Any]]:
    """The leaves of each role that occurs, in the order of `ROLES`; `labels` is a tree from `label_params`."""
    roles, leaves = jax.tree.leaves(labels), jax.tree.leaves(tree)
    groups = {role: [leaf for leaf, r in zip(leaves, roles, strict=True) if r == role] for role in ROLES}
    return {role: group for role, group in groups.items() if group}
