"""Roles of our own adapters, by path and side and never by value; norms by role."""

import jax
import jax.numpy as jnp
import pytest

from loraplus_jax import label_params
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.optim.roles import role_norms


def pair(a=(4, 2), b=(2, 3), fill=jnp.zeros):
    return {"lora_a": fill(a), "lora_b": fill(b)}


@pytest.mark.parametrize(
    "tree",
    [
        {"lora": {"q": pair()}},
        {"q": pair()},
        {"q": pair(fill=jnp.ones)},
        {"q": {**pair(), "lora_a": jnp.ones((4, 2))}},
        jax.eval_shape(lambda: {"q": pair()}),
        {"lora": pair()},
        pair(),
        {"lora": {"layers": {"q": pair((6, 4, 2), (6, 2, 3))}}},
        {"lora": {"layers": {"q": pair((4, 6, 2), (2, 6, 3))}}},
        {"lora": {"b": pair(), "lora_alike": pair()}},
    ],
)
def test_roles_of_adapters(tree):
    assert leaves_by_path(label_params(tree)) == {path: path[-1] for path in leaves_by_path(tree)}


def test_everything_else_is_extra_whatever_its_name():
    zeros = jnp.zeros
    tree = {"params": {"a": zeros(2), "b": {"kernel": zeros((4, 2))}, "lora": {"bias": zeros(1)}}}
    assert set(jax.tree.leaves(label_params(tree))) == {"extra"}


def test_an_adapter_of_the_whole_model_is_known_by_its_empty_path():
    spec = AdapterSpec(leaf="params/kernel", kind="dense", axes="io", shape=(4, 3), rank=2, scale=1.0)
    for tree in ({"lora": pair()}, pair()):
        assert set(leaves_by_path(label_params(tree, {"": spec})).values()) == {"a", "b"}


def test_role_norms_are_global_over_a_role():
    tree = {
        "x": {"lora_a": jnp.array([[3.0]]), "lora_b": jnp.array([[5.0]])},
        "y": {"lora_a": jnp.array([[4.0]]), "lora_b": jnp.array([[12.0]])},
    }
    norms = role_norms(tree, label_params(tree))
    assert {role: float(norm) for role, norm in norms.items()} == {"a": 5.0, "b": 13.0}
