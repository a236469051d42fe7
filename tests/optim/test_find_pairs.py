"""Which factor is A and which is B, in our trees and in those of other libraries, and trees that leave it open."""

import jax
import jax.numpy as jnp
import pytest

from loraplus_jax import label_params
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.tree import leaves_by_path
from loraplus_jax.optim.roles import role_norms

from ..messages import mentions
from ..refusals import refusals


def spec(*shape):
    return AdapterSpec(leaf="params/q/kernel", kind="dense", axes="io", shape=shape, rank=2, scale=1.0)


def zeros(*shape):
    return jnp.zeros(shape)


A, B = zeros(4, 2), zeros(2, 6)
T_A, T_B = A.T, B.T  # as torch keeps them
OTHER = zeros(5, 3)
PAIR = {"lora_a": A, "lora_b": B}
OTHERS = {  # by name: a tree, and the path of A
    "nnx": ({"fc": {"lora": PAIR}}, "fc/lora/lora_a"),
    "qwix": ({"fc": {"kernel": zeros(4, 6), "kernel_lora_a": A, "kernel_lora_b": B}}, "fc/kernel_lora_a"),
    "gemma": ({"attn": {"q": {"lora": {"a": A, "b": B}, "w": zeros(4, 6)}}}, "attn/q/lora/a"),
    "keras": ({"dense": {"lora_kernel_a": A, "lora_kernel_b": B}}, "dense/lora_kernel_a"),
    "peft": ({"q": {"lora_A": {"weight": T_A}, "lora_B": {"weight": T_B}}}, "q/lora_A/weight"),
    "peft, bare": ({"q": {"lora_A": T_A, "lora_B": T_B}}, "q/lora_A"),
    "peft, in Flax's layout": ({"q": {"lora_A": A, "lora_B": B}}, "q/lora_A"),
    "peft, dotted": (
        {"q.lora_A.weight": T_A, "q.lora_B.weight": T_B, "q.base_layer.weight": zeros(6, 4)},
        "q.lora_A.weight",
    ),
    "peft, an adapter's name": (
        {"q.lora_A.one.weight": T_A, "q.lora_B.one.weight": T_B, "q.lora_B.one.bias": zeros(6)},
        "q.lora_A.one.weight",
    ),
    "peft, magnitude": (
        {"q": {"lora_A": T_A, "lora_B": T_B, "lora_magnitude_vector": {"weight": zeros(6, 1)}}},
        "q/lora_A",
    ),
    "layers": ({"q": {"lora_a": {"kernel": A}, "lora_b": {"kernel": B}}}, "q/lora_a/kernel"),
    "torchtune": ({"q": {"lora_a": {"weight": T_A}, "lora_b": {"weight": T_B}}}, "q/lora_a/weight"),
    "kohya": ({"q.lora_down.weight": T_A, "q.lora_up.weight": T_B}, "q.lora_down.weight"),
    "down and up": ({"q": {"lora_down": {"kernel": A}, "lora_up": {"kernel": B}}}, "q/lora_down/kernel"),
    "a user's own layer": (
        {"LoRADense_0": {"kernel": zeros(4, 6), **PAIR}, "exploration": {"kernel": A}},
        "LoRADense_0/lora_a",
    ),
    "beside a kernel of other axes": (
        {"q": {"kernel": zeros(4, 2, 3), "lora_a": A, "lora_b": zeros(2, 2, 3)}},
        "q/lora_a",
    ),
    "square": ({"fc": {"kernel_lora_a": zeros(4, 4), "kernel_lora_b": zeros(4, 4)}}, "fc/kernel_lora_a"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_of_others_are_labelled_by_side(name):
    tree, path = OTHERS[name]
    labels = leaves_by_path(label_params(tree))
    assert [p for p, role in labels.items() if role == "a"] == [path]
    assert list(labels.values()).count("b") == 1
    assert set(labels.values()) - {"magnitude"} <= {"a", "b", "extra"}
    assert ("magnitude" in labels.values()) == (name == "peft, magnitude")


def test_factors_of_embeddings_are_known_by_name():
    tree = {"e": {"lora_embedding_A": T_A, "lora_embedding_B": T_B}}
    assert set(jax.tree.leaves(label_params(tree))) == {"embedding"}


def labels_of(**modules):
    return label_params(modules)


test_ambiguous_trees_are_rejected = refusals(
    (lambda: labels_of(fc={"w": zeros(4, 6), "b": A, "a": B}), "fc", "fc/a (2, 6)", "fc/b (4, 2)"),
    (lambda: labels_of(q={"a": A, "b": B}), "q", "q/a (4, 2)", "q/b (2, 6)"),
    (lambda: labels_of(q={"A": B, "B": A}), "q", "q/A (2, 6)", "q/B (4, 2)"),
    (lambda: labels_of(q={"kernel": zeros(6, 4), **PAIR}), "q", "kernel (6, 4)"),
    (lambda: labels_of(q={"lora_left": A}), "q/lora_left", "(4, 2)", "LoRA", "lora_A", "lora_B"),
    (lambda: labels_of(q={"loraA": T_A, "loraB": T_B}), "q/loraA", "LoRA"),
    (lambda: labels_of(q={"lora": {"left": A, "right": B}}), "q/lora/left", "LoRA"),
    (lambda: labels_of(lora={"q": PAIR, "k": {"left": A}}), "lora/k/left", "LoRA"),
    (lambda: labels_of(q={**PAIR, "lora_c": A}), "q/lora_c", "LoRA"),
    (lambda: labels_of(q={"lora_a": T_A, "lora_b": T_B}), "q", "(2, 4)", "(6, 2)"),
    (lambda: labels_of(q={"lora_a": zeros(4), "lora_b": B}), "q", "(4,)", "(2, 6)"),
    (lambda: labels_of(q={"lora_A": T_A, "lora_B": OTHER}), "q", "(2, 4)", "(5, 3)", "(r, in)", "(out, r)"),
    (lambda: labels_of(q={"lora_A": T_A, **PAIR}), "lora_A", "lora_a", "q"),
    (lambda: label_params({"q.lora_A.weight": T_A}), "q", "lora_b"),
    (lambda: labels_of(lora={"q": {"lora_b": B}}), "lora/q", "lora_a"),
    (lambda: labels_of(fc={"kernel_lora_a": A}), "fc/kernel", "lora_b"),
    (lambda: labels_of(fc={"kernel_lora_a": B, "kernel_lora_b": zeros(4, 3)}), "fc", "(2, 6)", "(4, 3)"),
    error=ValueError,
)


def test_factors_are_compared_with_the_specs():
    tree = {"lora": {"q": PAIR}}
    label_params(tree, {"q": spec(4, 6)})
    # Modules that are called like the collection.
    inner = dict.fromkeys(("lora", "lora/q"), spec(4, 6))
    for module in ({"lora": PAIR | {"q": PAIR}}, {"lora": {"lora": PAIR | {"q": PAIR}}}):
        assert set(jax.tree.leaves(label_params(module, inner))) == {"a", "b"}
    for specs, words in (({"q": spec(5, 6)}, ["(4, 2)", "(5, 2)"]), ({"qq": spec(4, 6)}, ["qq"])):
        with pytest.raises(ValueError, match=mentions("lora/q", *words)):
            label_params(tree, specs)
    swapped = {"lora": {"q": {"lora_a": zeros(2, 4), "lora_b": zeros(4, 2)}}}
    assert label_params(swapped)  # a legal pair of rank 4 as far as shapes go
    with pytest.raises(ValueError, match=mentions("lora/q", "(2, 4)", "(4, 2)")):
        label_params(swapped, {"q": spec(4, 4)})


def test_what_is_trained_in_full_beside_our_adapters_may_have_any_name():
    extra = {"lora_head": {"kernel": A}, "ssm": {"a": A, "b": B}}
    labels = label_params({"lora": {"q": PAIR}, "params": extra})
    assert set(jax.tree.leaves(labels["params"])) == {"extra"}
    square = {"ssm": {"A": zeros(4, 4), "B": A}}
    assert set(jax.tree.leaves(label_params(square))) == {"extra"}


# Roles by path and side, never by value


def pair(a=(4, 2), b=(2, 3), fill=jnp.zeros):
    return {"lora_a": fill(a), "lora_b": fill(b)}


@pytest.mark.parametrize(
    "tree",
    [
        {"lora": {"q": pair()}},
        {"q": {**pair(), "lora_a": jnp.ones((4, 2))}},
        jax.eval_shape(lambda: {"q": pair()}),
        pair(),
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
