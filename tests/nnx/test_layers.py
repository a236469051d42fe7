"""Which weight, axes and stack a layer has; tests/linen/test_layer_table.py and tests/zoo have their properties."""

import jax.numpy as jnp
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.nnx import apply_lora_plus, merge

from ..messages import mentions
from ..zoo.nnx_toys import One, Scanned, X
from ..zoo.properties import Toy, modules
from .models import assert_close, build, randomise

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "fields"), [("lora", {"param_dtype": jnp.bfloat16}), ("dora", {"dtype": jnp.bfloat16})]
)
def test_bfloat16_weights_and_products(fields, variant):
    make = lambda rngs: One(nnx.Linear(8, 6, **fields, rngs=rngs))  # noqa: E731
    model, before = build(Toy(make, "layer", modules("layer")), variant=variant), make(nnx.Rngs(0))(X)
    assert_close(model(X), before, 0 if variant == "lora" else 2e-2)
    y = randomise(model)(X)
    assert y.dtype == before.dtype
    assert_close(y, merge(model)(X), 2e-2)


def test_axes_of_layers_of_someone_else_s_along_the_second_axis():
    model = nnx.eval_shape(lambda: Scanned(nnx.Rngs(0)))
    config = LoRAPlusConfig(target_modules=["out", "query"], rank=2)
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    out, query = specs["layers/out"], specs["layers/query"]
    assert (out.axes, query.axes, out.shape) == ("iio", "ioo", (2, 2, 3, 8))
    assert out.factor_shapes == ((2, 2, 3, 2), (2, 2, 8))


def test_an_axis_of_layers_that_no_shape_tells_apart_is_an_error():
    config = LoRAPlusConfig(target_modules=["out"], rank=2)
    message = mentions("'layers/out'", "(2, 2, 3, 8)", "[0, 1]", "stacked={'layers/out': axes}")
    with pytest.raises(ValueError, match=message):
        apply_lora_plus(Scanned(nnx.Rngs(0), said=False), config, rngs=nnx.Rngs(1))
