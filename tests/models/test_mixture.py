"""A mixture of experts against the sum over all of them in float64: alone, on a mesh, and with rows' own adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, merge
from loraplus_jax.adapter import apply_rows, select_adapters, stack_adapters
from loraplus_jax.interop import Adapter
from loraplus_jax.models.families import family_of
from loraplus_jax.models.mixture import mix
from loraplus_jax.step.sharding import make_mesh, replicate, with_mesh

from .. import tiny

SIZES = {"x": (4, 6, 16), "shares": (4, 6, 2), "gate_up": (4, 16, 20), "down": (4, 10, 16)}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    values = {name: 0.5 * rng.normal(size=size).astype(np.float32) for name, size in SIZES.items()}
    # Nobody chooses the last expert.
    chosen = np.array([rng.choice(3, 2, replace=False) for _ in range(24)]).reshape(4, 6, 2).astype(np.int32)
    return values, chosen


def outputs(values, chosen, form=mix):
    """The sum, and a loss's gradients by every other input."""

    def loss(values):
        y = form(
            values["x"], values["shares"], chosen, values["gate_up"], values["down"], activation=jax.nn.silu
        )
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(values)
    return {"y": y, **gradients}


def every(x, shares, chosen, gate_up, down, *, activation):
    """Each expert on every token."""
    gate, up = jnp.split(jnp.einsum("btd,edi->btei", x, gate_up), 2, axis=-1)
    y = jnp.einsum("btei,eid->bted", activation(gate) * up, down)
    share = jnp.einsum("btk,btke->bte", shares, jax.nn.one_hot(chosen, len(down), dtype=x.dtype))
    return jnp.einsum("bted,bte->btd", y, share)


@pytest.fixture(scope="module")
def expected(inputs):
    with jax.enable_x64(True):
        values = jax.tree.map(lambda x: x.astype(np.float64), inputs[0])
        return jax.tree.map(np.asarray, outputs(values, inputs[1], every))


def check(found, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6 * np.abs(value).max(), err_msg=name)


def test_every_token_gets_the_sum_of_its_experts(inputs, expected):
    check(jax.jit(outputs)(*inputs), expected)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 4), (8, 1, 1), (1, 1, 8)])
def test_devices_share_rows_and_experts(sizes, inputs, expected):
    """Also where the rows or the experts do not divide."""
    mesh = make_mesh(*sizes)
    check(jax.jit(with_mesh(outputs, mesh))(*replicate(mesh, inputs)), expected)
