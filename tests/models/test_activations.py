import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.models.activations import exact_gelu

X = jnp.linspace(-8, 8, 321)


@pytest.mark.slow
def test_gelu_and_its_gradient_equal_jax():
    np.testing.assert_allclose(exact_gelu(X), jax.nn.gelu(X, approximate=False), atol=1e-6)
    ours, jaxs = (
        jax.jit(jax.vmap(jax.grad(f))) for f in (exact_gelu, lambda x: jax.nn.gelu(x, approximate=False))
    )
    np.testing.assert_allclose(ours(X), jaxs(X), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gelu_rounds_only_its_result(dtype):
    x = X.astype(dtype)
    y, pull = jax.vjp(exact_gelu, x)
    (slope,) = pull(jnp.ones_like(x))
    wide, pull = jax.vjp(exact_gelu, x.astype(jnp.float32))
    assert y.dtype == slope.dtype == dtype
    np.testing.assert_array_equal(y, wide.astype(dtype))
    np.testing.assert_array_equal(slope, pull(jnp.ones_like(wide))[0].astype(dtype))
