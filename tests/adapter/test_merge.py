"""Merging by hand: the sum is float32, the base stays, and what does not fit is rejected by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import merge, unmerge
from loraplus_jax.adapter.quantize_base import quantize_base
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.quantization import quantize

from ..refusals import refusals


def spec(shape=(2, 2), scale=0.5, rank=1, leaf="params/q/kernel"):
    return AdapterSpec(leaf=leaf, kind="dense", axes="io", shape=shape, rank=rank, scale=scale)


KERNEL = jnp.array([[1.0, 2.0], [3.0, 4.0]])
BASE = {"params": {"q": {"kernel": KERNEL, "bias": jnp.array([7.0, 8.0])}}}
LORA = {"q": {"lora_a": jnp.array([[1.0], [2.0]]), "lora_b": jnp.array([[10.0, 20.0]])}}


def test_merge_by_hand_and_the_base_stays():
    before = jax.tree.map(np.array, BASE)
    merged = merge(BASE, LORA, {"q": spec()})
    assert merged["params"]["q"]["kernel"].tolist() == [[6.0, 12.0], [13.0, 24.0]]
    assert merged["params"]["q"]["bias"] is BASE["params"]["q"]["bias"]
    jax.tree.map(np.testing.assert_array_equal, BASE, before)
    assert unmerge(merged, BASE, {"q": spec()})["params"]["q"]["kernel"] is KERNEL


@pytest.mark.parametrize("path", ["", "layers/0"])
def test_merge_of_a_model_that_is_one_layer_or_has_a_list_of_them(path):
    nest = lambda leaves: {"layers": {0: leaves}} if path else leaves  # noqa: E731
    table = {path: spec(leaf=f"params/{path}/kernel".replace("//", "/"))}
    merged = merge({"params": nest(BASE["params"]["q"])}, nest(LORA["q"]), table)["params"]
    kernel = merged["layers"][0]["kernel"] if path else merged["kernel"]
    assert kernel.tolist() == [[6.0, 12.0], [13.0, 24.0]]


def test_merge_sums_in_float32_and_stores_the_base_dtype():
    # A B = 1 + 2^-8, which bfloat16 cannot hold: -1 plus it is 0 in bfloat16 and 2^-8 in float32.
    factors = {"lora_a": jnp.array([[1.0, 2.0**-8]]), "lora_b": jnp.ones((2, 1))}
    lora = {"q": jax.tree.map(lambda x: x.astype(jnp.bfloat16), factors)}
    base = {"params": {"q": {"kernel": jnp.full((1, 1), -1.0, jnp.bfloat16)}}}
    kernel = merge(base, lora, {"q": spec((1, 1), 1.0, rank=2)})["params"]["q"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert kernel.item() == 2.0**-8


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_merge_of_weights_of_8_bits(dtype):
    base = {"params": {"q": {"kernel": KERNEL.astype(dtype)}}}
    kernel = merge(base, LORA, {"q": spec()})["params"]["q"]["kernel"]
    assert kernel.dtype == dtype
    # 13 lies between 12 and 14 of e5m2, and rounds to even.
    assert kernel.astype("f").tolist() == [[6.0, 12.0], [12.0 if dtype == jnp.float8_e5m2 else 13.0, 24.0]]


INTEGERS = {"params": {"q": {"kernel": KERNEL.astype(jnp.int8)}}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A tree that is no dict, as Equinox's modules are."""

    q: jax.Array


PACKED = {"params": {"q": {"kernel": quantize(KERNEL, "int8")}}}


def test_a_packed_weight_is_merged_on_request():
    kernel = merge(PACKED, LORA, {"q": spec()}, dequantize=True)["params"]["q"]["kernel"]
    np.testing.assert_allclose(kernel, [[6.0, 12.0], [13.0, 24.0]], atol=0.02)


test_merge_rejects_what_does_not_fit = refusals(
    (lambda: merge(BASE, LORA, {"k": spec()}), "k/lora_a", "k/lora_b", "q/lora_a", "q/lora_b"),
    (lambda: merge(BASE, {}, {"q": spec()}), "q/lora_a"),
    (lambda: merge(BASE, LORA, {}), "q/lora_a"),
    (lambda: merge(BASE, {"lora": {}, "params": {"h": KERNEL}}, {}), "fully trained", "params"),
    (lambda: merge(BASE, {"q": LORA["q"] | {"lora_a": 1.0}}, {"q": spec()}), "q/lora_a", "()", "(2, 1)"),
    (lambda: merge({"params": {}}, LORA, {"q": spec()}), "params/q/kernel", "(2, 2)", "missing"),
    (
        lambda: merge({"params": {"q": {"kernel": KERNEL[:1]}}}, LORA, {"q": spec()}),
        "params/q/kernel",
        "(1, 2)",
    ),
    (lambda: merge(BASE, LORA, {"q": spec(rank=2)}), "q", "(2, 1)", "(2, 2)"),
    (lambda: merge(INTEGERS, LORA, {"q": spec()}), "params/q/kernel", "int8", "floating", "quantize_base"),
    (lambda: merge(BASE, LORA, {"q": spec()}, dtype="int8"), "dtype", "int8", "floating"),
    (lambda: merge({"q": KERNEL}, LORA, {"q": spec()}), "params", "q"),
    (lambda: merge([KERNEL], LORA, {"q": spec()}), '{"params": tree}', "list"),
    (lambda: merge(Module(KERNEL), LORA, {"q": spec()}), '{"params": tree}', "Module"),
    (lambda: unmerge(BASE, Module(KERNEL), {"q": spec()}), '{"params": tree}', "Module"),
    (lambda: quantize_base(Module(KERNEL), "int8", {"q": "io"}), '{"params": tree}', "Module"),
    (lambda: merge(PACKED, LORA, {"q": spec()}), "params/q/kernel", "int8", "dequantize=True"),
    (lambda: unmerge(BASE, {}, {"q": spec()}), "params/q/kernel", "base", "(2, 2)", "missing"),
)
