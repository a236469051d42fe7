"""Trees of other JAX libraries as ours; tests/others has them made by these libraries themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.interop.other_libraries import import_adapters

from ..messages import mentions


def spec(key, shape=(4, 3), rank=2, scale=1.0, axes="io"):
    return AdapterSpec(
        leaf=f"params/{key}/kernel", kind="dense", axes=axes, shape=shape, rank=rank, scale=scale
    )


A, B = jnp.arange(8.0).reshape(4, 2), jnp.arange(6.0).reshape(2, 3)
FORMS = {
    "ours": {"net": {"fc": {"lora_a": A, "lora_b": B}}},
    "nnx": {"net": {"fc": {"lora_a": {"value": A}, "lora_b": {"value": B}}}},
    "qwix": {"net": {"fc": {"kernel_lora_a": A, "kernel_lora_b": B}}},
    "gemma": {"net": {"fc": {"lora": {"a": A, "b": B}}}},
    "keras": {"net": {"fc": {"lora_kernel_a": A, "lora_kernel_b": B}}},
    "lorax": {"net": {"fc": {"w": jnp.zeros((4, 3)), "b": A, "a": B}}},
}


@pytest.mark.parametrize("form", FORMS)
def test_roles_go_by_side(form):
    found = import_adapters(FORMS[form], {"net/fc": spec("net/fc")}, scale=1.0)
    np.testing.assert_array_equal(found["net"]["fc"]["lora_a"], A)
    np.testing.assert_array_equal(found["net"]["fc"]["lora_b"], B)
    assert jax.tree.structure(found).num_leaves == 2


def test_a_live_nnx_model():
    layer = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
    layer.lora.lora_b[...] = B
    tree = nnx.to_pure_dict(nnx.state(layer, nnx.LoRAParam))
    import flax.linen as nn

    config = LoRAPlusConfig(target_modules=".*", rank=2, alpha=2.0)
    model = apply_lora_plus(nn.Dense(3), config)
    _, specs = init_lora(model, jax.random.key(0), jnp.ones((1, 4)))
    found = import_adapters(tree, specs, scale=1.0)
    x = jax.random.normal(jax.random.key(1), (5, 4))
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    np.testing.assert_allclose(
        model.apply({"params": params, "lora": found}, x), layer(x), rtol=1e-5, atol=1e-6
    )


def test_whatever_does_not_fit_is_listed():
    specs = {"net/fc": spec("net/fc", scale=2.0), "other": spec("other")}
    tree = FORMS["qwix"] | {"strange": {"lora_a": A, "lora_b": B}}
    with pytest.raises(ValueError, match=r"(?s)\+ strange\b.*- other\b.*~ net/fc\b.*\b2\b"):
        import_adapters(tree, specs, scale=1.0)
    turned = {"net": {"fc": {"lora_a": A.T @ jnp.ones((4, 2)), "lora_b": B}}}
    with pytest.raises(ValueError, match=r"~ net/fc\b.*\(2, 2\), \(2, 3\)"):
        import_adapters(turned, {"net/fc": spec("net/fc")}, scale=1.0)
    with pytest.raises(ValueError, match=mentions("fc", "lora_b")):
        import_adapters({"fc": {"lora_a": A}}, {"fc": spec("fc")}, scale=1.0)
    with pytest.raises(ValueError, match=mentions("scale", 0)):
        import_adapters(FORMS["ours"], {"net/fc": spec("net/fc")}, scale=0)
