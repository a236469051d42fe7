"""Models in the forms of other libraries, in our own few lines; tests/others has the libraries themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loraplus_jax import LoRAPlusConfig
from loraplus_jax.nnx import apply_lora_plus, lora_tree, merge

from ..messages import mentions
from .test_adapt import X, assert_close, randomise

IDS = jnp.arange(10).reshape(2, 5)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q_proj, self.v_proj = (nnx.Einsum("btd,dnh->btnh", (8, 2, 3), rngs=rngs) for _ in range(2))
        self.o_proj = nnx.Einsum("btnh,nhd->btd", (2, 3, 8), rngs=rngs)

    def __call__(self, x):
        q, v = self.q_proj(x), self.v_proj(x)
        return self.o_proj(jax.nn.dot_product_attention(q, v, v, is_causal=True))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.attn, self.up = Attention(rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(x)
        return x + nnx.silu(self.up(x))


class Bonsai(nnx.Module):
    """Einsums and Linears in a list of layers, and an embedding that is also the head, as bonsai writes a model."""

    def __init__(self, rngs):
        self.embedder = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])

    def __call__(self, ids):
        x = self.embedder(ids)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.attend(x)


def bonsai(seed):
    model = Bonsai(nnx.Rngs(seed))
    config = LoRAPlusConfig(target_modules=["q_proj", "o_proj", "up", "embedder"], rank=2)
    specs = apply_lora_plus(model, config, rngs=nnx.Rngs(1))
    assert specs["layers/1/attn/o_proj"].axes == "iio"
    return randomise(model, seed)


def test_jax_jit_takes_an_adapted_model_and_traces_once_for_two():
    traces = []

    @jax.jit
    def forward(model, ids):
        traces.append(1)
        return model(ids), model

    @jax.jit
    def forward_of_split(graph, state, ids):
        traces.append(1)
        return nnx.merge(graph, state)(ids)

    models = [bonsai(0), bonsai(3)]
    for model in models:
        y, returned = forward(model, IDS)
        assert_close(y, forward_of_split(*nnx.split(model), IDS))
        jax.tree.map(np.testing.assert_array_equal, lora_tree(returned), lora_tree(model))
        np.testing.assert_array_equal(forward(returned, IDS)[0], y)
    assert len(traces) == 2
    for model in models:
        assert_close(forward(model, IDS)[0], forward(merge(model), IDS)[0])


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
