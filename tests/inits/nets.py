"""A table, a layer with two output axes, a convolution if asked for, and three layers in a loop."""

import flax.linen as nn
import jax.numpy as jnp


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(x.shape[-1], name="fc")(x)), None


class Net(nn.Module):
    rows: int
    inputs: int
    width: int
    convolution: bool = False

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.rows, self.inputs, name="table")(ids)
        x = nn.DenseGeneral((4, self.width // 4), name="heads")(x).reshape(*ids.shape, self.width)
        if self.convolution:
            x = nn.Conv(self.width, (3,), name="conv")(x)
        layer = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layer(name="layers")(x, None)[0]
