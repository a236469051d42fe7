"""The role of every trained leaf: which factor it is, or what else; and the optimizer's own record of it."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import optax
from flax import struct

from ._validation import check_choice
from .factor_pairs import factor_pairs, is_embedding_factor, spec_path
from .spec import Specs
from .tree import leaf_path, leaves_by_path

Role = Literal["a", "b", "embedding", "magnitude", "extra", "vector"]
ROLES: tuple[Role, ...] = ("a", "b", "embedding", "magnitude", "extra", "vector")
Policy = Literal["lora_plus", "peft"]


def label_params(tree: Any, specs: Specs | None = None, *, policy: Policy = "lora_plus") -> Any:
    """The role of every leaf, as a tree of the same structure.

    `"a"` is the factor on the input side, `"b"` the one on the output side, whichever of them starts at zero.
    Embeddings' factors, `lora_embedding_a` and `lora_embedding_b`, are `"embedding"`, everything else is `"extra"`.
    Roles come from paths and shapes and never from values, so that the function also labels a tree of updates.

    Trees of adapters made by others are labelled by side too: `flax.nnx.LoRA` (`lora_a`), qwix (`kernel_lora_a`),
    gemma (`lora/a`), keras (`lora_kernel_a`), PEFT (`lora_A`, whatever the layout), kohya (`lora_down`), and lorax,
    which calls the factor of the input side `b`.

    Args:
      tree: trainable variables, `{"lora": ..., "params": ...}`, or the tree of adapters alone.
      specs: the table from `init_lora`; with it shapes are checked against the table.
      policy: `"peft"` groups as PEFT does: biases and LayerNorms are `"vector"`, what else has one axis is `"b"`.

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
    check_choice("policy", policy, get_args(Policy))
    leaves = leaves_by_path(tree)
    roles = _factor_roles(leaves, specs)

    def label(path: tuple[Any, ...], leaf: Any) -> Role:
        name = leaf_path(path)
        role = roles.get(name, "extra")
        return _peft_role(name, leaf, leaves) if policy == "peft" and role == "extra" else role

    return jax.tree_util.tree_map_with_path(label, tree)


class LoRAPlusState(struct.PyTreeNode):
    """The optimizer's state with what its last update was made with, wherever the transform stands in a chain.

    Attributes:
      inner_state: of the optimizer itself.
      count: updates made, int32.
      rates: role to the learning rate of the last update (before it, of the first), float32; under `lora_plus` the
        multiple of the wrapped optimizer's.
      decays: role to the weight decay, likewise; empty under `lora_plus`, where decay is the wrapped optimizer's.
      roles: `(path, role)` of every leaf.
      relative: whether rates are multiples.
    """

    inner_state: Any
    count: jax.Array
    rates: dict[str, jax.Array]
    decays: dict[str, jax.Array]
    roles: tuple[tuple[str, Role], ...] = struct.field(pytree_node=False)
    relative: bool = struct.field(pytree_node=False)


def find_states(opt_state: Any) -> list[LoRAPlusState]:
    """The states of the LoRA+ transforms in an optimizer's, through `optax.chain` and other wrappers.

    There are two where `optax.multi_transform` or `optax.masked` gives each a part of the tree.
    """
    is_ours = lambda x: isinstance(x, LoRAPlusState)  # noqa: E731
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]


def lr_ratio_of(opt_state: Any) -> float | None:
    """Lambda of the last update; None where no LoRA+ transform moves both factors."""
    ratios = {
        float(state.rates["b"] / state.rates["a"])
        for state in find_states(opt_state)
        if {"a", "b"} <= state.rates.keys()
    }
    if len(ratios) > 1:
        raise ValueError(f"the optimizer's LoRA+ transforms have different ratios: {sorted(ratios)}")
    return float(f"{ratios.pop():.6g}") if ratios else None


def labels_of(opt_state: Any, tree: Any) -> Any:
    """The role of every leaf as the optimizer routes it; for an optimizer without LoRA+ as `label_params` says.

    A leaf that is hidden from the LoRA+ transform (by `optax.masked`) is `"extra"`.
    """
    states = find_states(opt_state)
    if not states:
        return label_params(tree)
    roles = {path: role for state in states for path, role in state.roles}
    return jax.tree_util.tree_map_with_path(lambda path, _: roles.get(leaf_path(path), "extra"), tree)


def _peft_role(path: str, leaf: Any, leaves: Mapping[str, Any]) -> Role:
    """PEFT's groups: everything with one axis learns as fast as B; biases and LayerNorms do so without decay.

    A LayerNorm is told from a RMSNorm, which PEFT decays, by its bias.
    """
    value = "/value" if path.endswith("/value") else ""
    module, _, name = path.removesuffix(value).rpartition("/")
    if name == "bias" or (name == "scale" and f"{module}/bias{value}".lstrip("/") in leaves):
        return "vector"
    return "b" if len(leaf.shape) == 1 else "extra"


def _factor_roles(leaves: Mapping[str, Any], specs: Specs | None) -> dict[str, Role]:
    """The roles of all factors by path."""
    roles: dict[str, Role] = {}
    for module, pair in factor_pairs(leaves, specs).items():
        spec = (specs or {}).get(spec_path(module))
        embedded = is_embedding_factor(pair.a) if spec is None else spec.kind == "embed"
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
