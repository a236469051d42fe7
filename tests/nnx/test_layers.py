"""Which weight, axes and stack a layer has; tests/linen/test_layer_table.py and tests/zoo have their properties."""

import jax.numpy as jnp
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.nnx import apply_lora_plus, merge

from ..messages import mentions
from ..zoo.nnx_toys import MODELS, Heads, One, Scanned, X
from ..zoo.properties import Toy, modules
from .models import assert_close, build, randomise

pytestmark = pytest.mark.slow

FACTORS = {"query": ("ioo", ((8, 2), (2, 2, 3))), "out": ("iio", ((2, 3, 2), (2, 8)))}


@pytest.mark.parametrize("name", ["in_features_shape of its own", "the same by letters"])
def test_axes_of_a_layer_of_someone_else_s(name):
    toy = MODELS[name]
    specs = apply_lora_plus(Heads(nnx.Rngs(0)), toy.config(), rngs=nnx.Rngs(1))
    found = {path.removesuffix("/kernel"): (s.axes, s.factor_shapes) for path, s in specs.items()}
    assert found == FACTORS


@pytest.mark.parametrize("fields", [{"param_dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16}])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_bfloat16_weights_and_products(fields, variant):
    make = lambda rngs: One(nnx.Linear(8, 6, **fields, rngs=rngs))  # noqa: E731
    model, before = build(Toy(make, "layer", modules("layer")), variant=variant), make(nnx.Rngs(0))(X)
    assert_close(model(X), before, 0 if variant == "lora" else 2e-2)
    y = randomise(model)(X)
    assert y.dtype == before.dtype
    assert_close(y, merge(model)(X), 2e-2)


def test_factors_of_layers_along_the_second_axis():
    specs = apply_lora_plus(
        Scanned(nnx.Rngs(0)), LoRAPlusConfig(target_modules=["out"], rank=2), rngs=nnx.Rngs(1)
    )
    assert specs["layers/out"].shape == (2, 2, 3, 8)
    assert specs["layers/out"].factor_shapes == ((2, 2, 3, 2), (2, 2, 8))


def test_an_axis_of_layers_that_no_shape_tells_apart_is_an_error():
    config = LoRAPlusConfig(target_modules=["out"], rank=2)
    message = mentions("'layers/out'", "(2, 2, 3, 8)", "[0, 1]", "stacked={'layers/out': axes}")
    with pytest.raises(ValueError, match=message):
        apply_lora_plus(Scanned(nnx.Rngs(0), said=False), config, rngs=nnx.Rngs(1))
