"""The two trees: what is trained, what is frozen, and both together again."""

import jax
import jax.numpy as jnp
import pytest

from loraplus_jax import LoRAPlusConfig, combine, label_params, split_trainable
from loraplus_jax.adapter.tree import count, flatten, leaves_by_path, unflatten

from ..messages import mentions
from ..refusals import refusals

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


def test_flatten_and_unflatten_are_inverse():
    assert flatten(VARIABLES)["params/head/norm/scale"] == 4
    assert unflatten(flatten(VARIABLES)) == VARIABLES


def test_count():
    assert count({"a": jnp.zeros((4, 2)), "b": jnp.zeros((2, 3))}) == 14
    assert count(jax.eval_shape(lambda: jnp.zeros((4, 2)))) == 8


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


OTHER = BIASED | {"lora": {"k": {"lora_a": 1, "lora_b": 2}}}

test_what_cannot_be_split_or_combined = refusals(
    (lambda: split_trainable(VARIABLES, ("hea",)), "'hea'", "'head'"),
    (lambda: split_trainable(OTHER, bias="lora_only"), "bias", "'lora_only'"),
    (lambda: split_trainable(BIASED, bias="some"), "bias", "none", "all", "lora_only", "'some'"),
    (lambda: combine({"params": {"q": 1}}, {"params": {"q": 2, "k": 3}}), "params/q"),
    error=ValueError,
)


def test_lists_of_layers_have_integer_keys():
    pair = {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 6))}
    variables = {
        "params": {"layers": {0: {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}},
        "lora": {"layers": {0: pair}},
    }
    assert split_trainable(variables, ("layers/0",)) == (variables, {})
    trainable, frozen = split_trainable(variables)
    assert leaves_by_path(combine(trainable, frozen)).keys() == leaves_by_path(variables).keys()
    assert label_params(trainable) == {"lora": {"layers": {0: {"lora_a": "a", "lora_b": "b"}}}}
    with pytest.raises(ValueError, match="params/layers/0/bias"):
        combine(frozen, frozen)
