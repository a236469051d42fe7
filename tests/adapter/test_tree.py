"""Roles by path and side, and the two trees: what is trained, what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, combine, label_params, merge, split_trainable
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.tree import count, flatten, leaves_by_path, unflatten

from ..messages import mentions


def zeros(*shape):
    return jnp.zeros(shape)


def pair(a=(4, 2), b=(2, 3)):
    return {"lora_a": zeros(*a), "lora_b": zeros(*b)}


def spec(shape=(4, 3), **fields):
    return AdapterSpec(
        leaf="params/q/kernel", kind="dense", axes="io", shape=shape, rank=2, scale=1.0, **fields
    )


@pytest.mark.parametrize(
    "tree",
    [
        {"lora": {"q": pair()}},
        {"q": pair()},
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
    tree = {"params": {"a": zeros(2), "b": {"kernel": zeros(4, 2)}, "lora": {"bias": zeros(1)}}}
    assert set(jax.tree.leaves(label_params(tree))) == {"extra"}


def test_roles_do_not_come_from_values():
    tree = {"q": pair()}
    other = jax.tree.map(lambda x: x + 1, tree) | {
        "q": {**pair(), "lora_a": zeros(4, 2), "lora_b": zeros(2, 3) + 1}
    }
    assert label_params(tree) == label_params(other) == {"q": {"lora_a": "a", "lora_b": "b"}}


def test_shapes_and_traced_values_can_be_labelled():
    shapes = jax.eval_shape(lambda: {"q": pair()})
    assert label_params(shapes) == {"q": {"lora_a": "a", "lora_b": "b"}}


@pytest.mark.parametrize(
    ("tree", "specs", "message"),
    [
        ({"q": {"lora_a": zeros(4, 2)}}, None, mentions("q", "lora_b")),
        ({"lora": {"q": {"lora_b": zeros(2, 3)}}}, None, mentions("lora/q", "lora_a")),
        ({"q": pair((2, 4), (3, 2))}, None, mentions("q", "(2, 4)", "(3, 2)")),
        ({"q": pair((4,), (2, 3))}, None, mentions("q", "(4,)", "(2, 3)")),
        ({"lora": {"q": pair()}}, {"q": spec((5, 3))}, mentions("lora/q", "(4, 2)", "(5, 2)")),
        ({"lora": {"q": pair()}}, {"qq": spec()}, mentions("lora/q", "qq")),
    ],
)
def test_invalid_factors_are_rejected(tree, specs, message):
    with pytest.raises(ValueError, match=message):
        label_params(tree, specs)


def test_square_factors_are_rejected_by_the_table_when_swapped():
    swapped = {"lora": {"q": pair((2, 4), (4, 2))}}
    assert label_params(swapped)  # (2, 4)(4, 2): a legal pair of rank 4 as far as shapes go
    with pytest.raises(ValueError, match=mentions("lora/q", "(2, 4)", "(4, 2)")):
        label_params(swapped, {"q": spec((4, 4))})


VARIABLES = {
    "params": {"enc": {"q": {"kernel": 1}, "head": {"bias": 2}}, "head": {"kernel": 3, "norm": {"scale": 4}}},
    "lora": {"enc": {"q": {"lora_a": 5, "lora_b": 6}}},
    "batch_stats": {"head": {"mean": 7}},
}


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        ((), {5, 6}),
        (("head",), {2, 3, 4, 5, 6}),
        (("enc/head",), {2, 5, 6}),
        (("norm", "q"), {1, 4, 5, 6}),
        (("enc",), {1, 2, 5, 6}),
    ],
)
def test_split_trainable(names, trained):
    trainable, frozen = split_trainable(VARIABLES, names)
    assert set(jax.tree.leaves(trainable)) == trained
    assert set(jax.tree.leaves(frozen)) == set(range(1, 8)) - trained
    assert combine(trainable, frozen) == VARIABLES


def test_a_module_to_save_that_does_not_exist_names_the_nearest():
    with pytest.raises(ValueError, match=r"'hea'.*'head'"):
        split_trainable(VARIABLES, ("hea",))


def test_a_leaf_in_two_trees_is_rejected():
    with pytest.raises(ValueError, match="params/q"):
        combine({"params": {"q": 1}}, {"params": {"q": 2, "k": 3}})


def test_flatten_and_unflatten_are_inverse():
    assert flatten(VARIABLES)["params/head/norm/scale"] == 4
    assert unflatten(flatten(VARIABLES)) == VARIABLES


def test_count():
    assert count(pair()) == 4 * 2 + 2 * 3
    assert count(jax.eval_shape(pair)) == 14


def test_an_adapter_of_the_whole_model_is_known_by_its_empty_path():
    from loraplus_jax.adapter.spec import AdapterSpec

    spec = AdapterSpec(leaf="params/kernel", kind="dense", axes="io", shape=(4, 3), rank=2, scale=1.0)
    for tree in ({"lora": pair()}, pair()):
        assert set(leaves_by_path(label_params(tree, {"": spec})).values()) == {"a", "b"}


# adapters made by others: name, tree, the paths of the input side's factors

A, B = jnp.zeros((4, 2)), jnp.zeros((2, 6))
T_A, T_B = A.T, B.T  # as torch keeps them
OTHERS = {
    "nnx": ({"fc": {"lora": {"lora_a": A, "lora_b": B}}}, ["fc/lora/lora_a"]),
    "qwix": (
        {"fc": {"kernel": jnp.zeros((4, 6)), "kernel_lora_a": A, "kernel_lora_b": B}},
        ["fc/kernel_lora_a"],
    ),
    "gemma": ({"attn": {"q": {"lora": {"a": A, "b": B}, "w": jnp.zeros((4, 6))}}}, ["attn/q/lora/a"]),
    "keras": ({"dense": {"lora_kernel_a": A, "lora_kernel_b": B}}, ["dense/lora_kernel_a"]),
    "peft": ({"q": {"lora_A": {"weight": T_A}, "lora_B": {"weight": T_B}}}, ["q/lora_A/weight"]),
    "peft, bare": ({"q": {"lora_A": T_A, "lora_B": T_B}}, ["q/lora_A"]),
    "peft, in Flax's layout": ({"q": {"lora_A": A, "lora_B": B}}, ["q/lora_A"]),
    "peft, dotted": (
        {"q.lora_A.weight": T_A, "q.lora_B.weight": T_B, "q.base_layer.weight": jnp.zeros((6, 4))},
        ["q.lora_A.weight"],
    ),
    "peft, an adapter's name": (
        {
            "q.lora_A.default.weight": T_A,
            "q.lora_B.default.weight": T_B,
            "q.lora_B.default.bias": jnp.zeros(6),
        },
        ["q.lora_A.default.weight"],
    ),
    "peft, embedding": ({"e": {"lora_embedding_A": T_A, "lora_embedding_B": T_B}}, ["e/lora_embedding_A"]),
    "peft, magnitude": (
        {"q": {"lora_A": T_A, "lora_B": T_B, "lora_magnitude_vector": {"weight": jnp.zeros((6, 1))}}},
        ["q/lora_A"],
    ),
    "layers": ({"q": {"lora_a": {"kernel": A}, "lora_b": {"kernel": B}}}, ["q/lora_a/kernel"]),
    "torchtune": ({"q": {"lora_a": {"weight": T_A}, "lora_b": {"weight": T_B}}}, ["q/lora_a/weight"]),
    "kohya": ({"q.lora_down.weight": T_A, "q.lora_up.weight": T_B}, ["q.lora_down.weight"]),
    "down and up": ({"q": {"lora_down": {"kernel": A}, "lora_up": {"kernel": B}}}, ["q/lora_down/kernel"]),
    "a user's own layer": (
        {
            "LoRADense_0": {"kernel": jnp.zeros((4, 6)), "lora_a": A, "lora_b": B},
            "exploration": {"kernel": A},
        },
        ["LoRADense_0/lora_a"],
    ),
    "beside a kernel of other axes": (
        {"q": {"kernel": jnp.zeros((4, 2, 3)), "lora_a": A, "lora_b": jnp.zeros((2, 2, 3))}},
        ["q/lora_a"],
    ),
    "lorax": ({"fc": {"w": jnp.zeros((4, 6)), "b": A, "a": B}}, ["fc/b"]),
    "named by side beside a weight": ({"fc": {"w": jnp.zeros((4, 6)), "a": A, "b": B}}, ["fc/a"]),
    "square, the names say it": (
        {"fc": {"kernel_lora_a": jnp.zeros((4, 4)), "kernel_lora_b": jnp.zeros((4, 4))}},
        ["fc/kernel_lora_a"],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_of_others_are_labelled_by_side(name):
    tree, inputs = OTHERS[name]
    labels = leaves_by_path(label_params(tree))
    if name == "peft, embedding":
        assert set(labels.values()) == {"embedding"}
        return
    assert [path for path, role in labels.items() if role == "a"] == inputs
    assert list(labels.values()).count("b") == 1
    assert set(labels.values()) - {"magnitude"} <= {"a", "b", "extra"}
    assert ("magnitude" in labels.values()) == (name == "peft, magnitude")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"fc": {"w": jnp.zeros((4, 4)), "a": jnp.zeros((4, 4)), "b": jnp.zeros((4, 4))}},
            "fc: .*both",
        ),
        (
            {"fc": {"w": jnp.zeros((4, 6)), "a": jnp.zeros((3, 2)), "b": jnp.zeros((2, 6))}},
            "fc: .*neither",
        ),
        ({"q": {"a": A, "b": B}}, mentions("q", "a (4, 2)", "b (2, 6)")),
        ({"q": {"A": B, "B": A}}, mentions("q", "a (2, 6)", "b (4, 2)")),
        (
            {"q": {"kernel": jnp.zeros((6, 4)), "lora_a": A, "lora_b": B}},
            mentions("q", "kernel (6, 4)"),
        ),
        (
            {"q": {"lora_left": A, "lora_right": B}},
            mentions("q/lora_left", "(4, 2)", "LoRA", "lora_A", "lora_B"),
        ),
        ({"q": {"loraA": T_A, "loraB": T_B}}, mentions("q/loraA", "LoRA")),
        ({"q": {"lora": {"left": A, "right": B}}}, mentions("q/lora/left", "LoRA")),
        ({"lora": {"q": {"lora_a": A, "lora_b": B}, "k": {"left": A}}}, mentions("lora/k/left", "LoRA")),
        ({"q": {"lora_a": A, "lora_b": B, "lora_c": A}}, mentions("q/lora_c", "LoRA")),
        ({"q": {"lora_a": T_A, "lora_b": T_B}}, mentions("q", "(2, 4)", "(6, 2)")),
        (
            {"q": {"lora_A": T_A, "lora_B": jnp.zeros((5, 3))}},
            mentions("q", "(2, 4)", "(5, 3)", "(r, in)", "(out, r)"),
        ),
        ({"q": {"lora_A": T_A, "lora_a": A, "lora_b": B}}, mentions("lora_A", "lora_a", "q")),
        ({"q.lora_A.weight": T_A}, mentions("q", "lora_b")),
        ({"fc": {"kernel_lora_a": A}}, mentions("fc/kernel", "lora_b")),
        (
            {"fc": {"kernel_lora_a": B, "kernel_lora_b": jnp.zeros((4, 3))}},
            mentions("fc", "(2, 6)", "(4, 3)"),
        ),
    ],
)
def test_ambiguous_trees_are_rejected(tree, message):
    with pytest.raises(ValueError, match=message):
        label_params(tree)


def test_what_is_trained_in_full_beside_our_adapters_may_have_any_name():
    extra = {"lora_head": {"kernel": A}, "ssm": {"a": A, "b": B}}
    labels = label_params({"lora": {"q": {"lora_a": A, "lora_b": B}}, "params": extra})
    assert set(jax.tree.leaves(labels["params"])) == {"extra"}
    square = jnp.zeros((4, 4))
    assert label_params({"ssm": {"A": square, "B": A}}) == {"ssm": {"A": "extra", "B": "extra"}}


# biases

BIASED = {
    "params": {"q": {"kernel": 1, "bias": 2}, "norm": {"scale": 3, "bias": 4}},
    "lora": {"q": {"lora_a": 5, "lora_b": 6}},
}


@pytest.mark.parametrize(
    ("bias", "trained"),
    [("none", set()), ("all", {"params/q/bias", "params/norm/bias"}), ("lora_only", {"params/q/bias"})],
)
def test_biases_are_trained_as_asked(bias, trained):
    found, frozen = split_trainable(BIASED, bias=bias)
    assert leaves_by_path(found).keys() == trained | {"lora/q/lora_a", "lora/q/lora_b"}
    assert combine(found, frozen) == BIASED


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("names", [(), ("norm",)])
def test_a_config_says_all_that_is_trained(bias, names):
    config = LoRAPlusConfig(target_modules=["q"], modules_to_save=names, bias=bias)
    assert split_trainable(BIASED, config) == split_trainable(BIASED, names, bias=bias)
    with pytest.raises(ValueError, match=mentions("config", f"'{bias}'", "'none'")):
        split_trainable(BIASED, config, bias="none")


def test_biases_that_do_not_exist_are_rejected():
    with pytest.raises(ValueError, match=r"bias.*'lora_only'"):
        split_trainable({**BIASED, "lora": {"k": {"lora_a": 1, "lora_b": 2}}}, bias="lora_only")
    with pytest.raises(ValueError, match=mentions("bias", "none", "all", "lora_only", "'some'")):
        split_trainable(BIASED, bias="some")


def test_lists_of_layers_have_integer_keys():
    kernel, pair = jnp.ones((4, 6)), {"lora_a": A, "lora_b": B}
    variables = {
        "params": {"layers": {0: {"kernel": kernel, "bias": jnp.ones(6)}}},
        "lora": {"layers": {0: pair}},
    }
    table = {
        "layers/0": AdapterSpec(
            leaf="params/layers/0/kernel", kind="dense", axes="io", shape=(4, 6), rank=2, scale=1.0
        )
    }
    trainable, frozen = split_trainable(variables, ("layers/0",))
    assert (trainable, frozen) == (variables, {})
    trainable, frozen = split_trainable(variables)
    assert leaves_by_path(combine(trainable, frozen)).keys() == leaves_by_path(variables).keys()
    assert label_params(trainable) == {"lora": {"layers": {0: {"lora_a": "a", "lora_b": "b"}}}}
    merged = merge({"params": variables["params"]}, variables["lora"], table)
    np.testing.assert_allclose(merged["params"]["layers"][0]["kernel"], kernel + A @ B)
    with pytest.raises(ValueError, match="params/layers/0/bias"):
        combine(frozen, frozen)
