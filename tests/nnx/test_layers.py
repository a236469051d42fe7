"""Every layer that can be adapted: of Flax, and of others in our own few lines (tests/others has the libraries)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.interpreter.low_rank import LowRankWeight
from loraplus_jax.nnx import apply_lora_plus, lora_tree, merge

from ..marks import slow
from ..messages import mentions
from .models import ATTENTION, IDS, LINEAR, PARAMETERS, One, Row, X, assert_close, build, linear, randomise


class Attends(One):
    def __call__(self, x):
        return self.layer.attend(self.layer(x))


class Letters(nnx.Module):
    """A layer of someone else's, whose equation stands in a field."""

    def __init__(self, rngs):
        self.einsum_str = "BTD,DNH->BTNH"
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 2, 3)))

    @property
    def shape(self):
        return self.w.shape

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Sides(nnx.Module):
    """A layer of someone else's, whose two shapes stand in fields."""

    def __init__(self, rngs):
        self.in_features_shape, self.out_features_shape = (8,), (2, 3)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (8, 2, 3)))

    def __call__(self, x):
        return jax.lax.dot_general(x, self.kernel[...], (((2,), (0,)), ((), ())))


class Super(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


ROWS = {
    "linear": LINEAR,
    "linear, bfloat16 weights": Row(linear(param_dtype=jnp.bfloat16)),
    "linear, bfloat16 products": Row(linear(dtype=jnp.bfloat16)),
    "linear, no bias": Row(linear(use_bias=False, precision="highest")),
    "linear general": Row(lambda r: nnx.LinearGeneral((5, 8), (2, 3), axis=(1, 2), rngs=r)),
    "linear general, batch": Row(lambda r: nnx.LinearGeneral(8, (3,), batch_axis={0: 2}, rngs=r)),
    "einsum": Row(lambda r: nnx.Einsum("btd,dnh->btnh", (8, 2, 3), rngs=r)),
    "einsum, batch": Row(lambda r: nnx.Einsum("btd,bdo->bto", (2, 8, 3), rngs=r)),
    "einsum, ellipsis": Row(lambda r: nnx.Einsum("...d,df->...f", (8, 3), rngs=r)),
    "conv": Row(lambda r: nnx.Conv(8, 6, (3,), strides=2, rngs=r)),
    "conv, groups": Row(lambda r: nnx.Conv(8, 6, (3,), feature_group_count=2, rngs=r)),
    "conv, mask": Row(
        lambda r: nnx.Conv(8, 6, (3,), mask=jnp.ones((3, 8, 6)).at[0].set(0), rngs=r), by_rank=False
    ),
    "conv transpose": Row(lambda r: nnx.ConvTranspose(8, 6, (3,), strides=2, rngs=r)),
    "embed": Row(lambda r: nnx.Embed(11, 8, rngs=r), IDS),
    "embed and attend": Row(lambda r: nnx.Embed(11, 8, rngs=r), IDS, wrap=Attends),
    "attention": ATTENTION,
    "einsum_str of its own": Row(Letters),
    "in_features_shape of its own": Row(Sides),
    "subclass": Row(lambda r: Super(8, 6, rngs=r)),
    "parameters": PARAMETERS,
}


@pytest.mark.parametrize("variant", ["lora", slow("dora")])
@pytest.mark.parametrize("name", ROWS)
def test_a_layer_starts_as_the_plain_one_and_then_equals_the_merged_one(name, variant, monkeypatch):
    row, sums = ROWS[name], []
    plain = row.wrap(row.make(nnx.Rngs(0)))
    model, specs = build(row, {"variant": variant})
    before = plain(row.x)
    half = any("bfloat16" in str(v.dtype) for v in jax.tree.leaves((before, nnx.state(plain))))
    assert_close(model(row.x), before, 0 if variant == "lora" else 2e-2 if half else 1e-6)
    assert isinstance(model.layer, type(plain.layer))
    np.testing.assert_array_equal(model(row.x), before)
    assert {v.shape for v in jax.tree.leaves(lora_tree(model))} == {
        shape for spec in specs.values() for shape in spec.factor_shapes
    }
    randomise(model)
    original = LowRankWeight.sum
    monkeypatch.setattr(LowRankWeight, "sum", lambda self: (sums.append(1), original(self))[1])
    y = model(row.x)
    assert not sums if row.by_rank else sums
    assert y.dtype == before.dtype
    assert_close(y, merge(model)(row.x), 2e-2 if half else 1e-5)
    assert float(jnp.abs(y - before).max()) > 0.1


class DenseGeneral(nnx.Module):
    """A product over some axes with a weight that is cast to the dtype of the layer, as maxtext has it."""

    def __init__(self, inputs, outputs, axis, rngs, dtype=jnp.float32):
        self.in_features_shape, self.out_features_shape = inputs, outputs
        self.axis, self.dtype = axis, dtype
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (*inputs, *outputs)) / 4)

    def __call__(self, x):
        axes = tuple(n % x.ndim for n in self.axis)
        x, kernel = (jnp.asarray(v, self.dtype) for v in (x, self.kernel[...]))
        return jax.lax.dot_general(x, kernel, ((axes, tuple(range(len(axes)))), ((), ())))


class Heads(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.query = DenseGeneral((8,), (2, 3), (-1,), rngs, dtype)
        self.out = DenseGeneral((2, 3), (8,), (-2, -1), rngs, dtype)

    def __call__(self, x):
        return x + self.out(jnp.tanh(self.query(x)))


FACTORS = {"query": ("ioo", ((8, 2), (2, 2, 3))), "out": ("iio", ((2, 3, 2), (2, 8)))}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "rules",
    [
        {"target_modules": ["query", "out"]},
        {"target_parameters": {"query/kernel": "ioo", "out/kernel": "iio"}},
    ],
    ids=["by fields", "by letters"],
)
def test_dense_general(rules, dtype):
    model = Heads(nnx.Rngs(0), dtype)
    specs = apply_lora_plus(model, LoRAPlusConfig(**rules, rank=2), rngs=nnx.Rngs(1))
    found = {path.removesuffix("/kernel"): (s.axes, s.factor_shapes) for path, s in specs.items()}
    assert found == FACTORS
    np.testing.assert_array_equal(model(X), Heads(nnx.Rngs(0), dtype)(X))
    randomise(model)
    assert_close(model(X), merge(model)(X), 1e-5 if dtype == jnp.float32 else 5e-2)


class Scanned(nnx.Module):
    """Two blocks along the second axis of their weights, as the metadata says in maxtext, run by `jax.lax.scan`."""

    def __init__(self, rngs, said=True):
        make = nnx.split_rngs(splits=2)(nnx.vmap(Heads, in_axes=(0,), out_axes=1))
        self.layers = make(rngs)
        if said:
            for _, variable in nnx.iter_graph(self.layers):
                if isinstance(variable, nnx.Param):
                    variable.set_metadata(param_scan_axis=1)

    def __call__(self, x):
        graph, params = nnx.split(self.layers)
        params = jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), params)
        return jax.lax.scan(lambda x, params: (nnx.merge(graph, params)(x), None), x, params)[0]


# As many layers as heads and as the rank: no shape tells the axes apart.
@pytest.mark.parametrize("options", [{}, {"stacked": {"query": (1,), "out": (1,)}}], ids=["metadata", "told"])
def test_layers_along_the_second_axis(options):
    model = Scanned(nnx.Rngs(0), said=not options)
    config = LoRAPlusConfig(target_modules=["query", "out"], rank=2)
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1), **options)
    assert {path: (spec.shape, spec.stacked) for path, spec in specs.items()} == {
        "layers/query": ((8, 2, 2, 3), (1,)),
        "layers/out": ((2, 2, 3, 8), (1,)),
    }
    assert specs["layers/out"].factor_shapes == ((2, 2, 3, 2), (2, 2, 8))
    np.testing.assert_array_equal(model(X), Scanned(nnx.Rngs(0))(X))
    randomise(model)
    assert_close(model(X), merge(model)(X))


def test_an_axis_of_layers_that_no_shape_tells_apart_is_an_error():
    config = LoRAPlusConfig(target_modules=["out"], rank=2)
    message = mentions("'layers/out'", "(2, 2, 3, 8)", "[0, 1]", "stacked={'layers/out': axes}")
    with pytest.raises(ValueError, match=message):
        apply_lora_plus(Scanned(nnx.Rngs(0), said=False), config, rngs=nnx.Rngs(1))
