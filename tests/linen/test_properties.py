"""Properties over shapes, ranks, equations and axes: the adapter's term is always that of the merged weight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, merge
from loraplus_jax.adapter.einsum_letters import split_equation
from loraplus_jax.adapter.spec import AdapterSpec

from .models import KEY, drawn

FEW = settings(max_examples=6, deadline=None)


def assert_merged_is_unmerged(layer, x, rank):
    """One layer as a whole model, of random weights and factors, in float32."""
    model = apply_lora_plus(layer, LoRAPlusConfig(target_modules=".*", rank=rank, alpha=1.5 * rank))
    lora, specs = init_lora(model, KEY, x)
    (spec,) = specs.values()
    base = {"params": drawn(jax.eval_shape(layer.init, KEY, x)["params"])}
    lora = drawn(lora, 1)
    assert (lora["lora_a"].shape, lora["lora_b"].shape) == spec.factor_shapes
    expected = layer.apply(merge(base, lora, specs), x)
    found = model.apply({**base, "lora": lora}, x)
    scale = 1 + float(jnp.abs(expected).max())
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)
    return spec


@st.composite
def equations(draw):
    """An einsum of an input and a weight with at least one contracted and one output axis, in any order."""
    letters = list(draw(st.permutations("abcdefgh")))
    sizes = {c: draw(st.integers(1, 4)) for c in letters}
    counts = [draw(st.integers(low, 2)) for low in (0, 0, 1, 1)]
    groups = [[letters.pop() for _ in range(count)] for count in counts]
    batch, free, contracted, outputs = groups
    x = draw(st.permutations([*batch, *free, *contracted]))
    w = draw(st.permutations([*batch, *contracted, *outputs]))
    result = draw(st.permutations([*batch, *free, *outputs]))
    roles = ["o" if c in outputs else "i" if c in contracted else "e" for c in w]
    return "".join(x), "".join(w), "".join(result), sizes, "".join(roles)


def sides(w, roles, sizes):
    return [
        int(np.prod([sizes[c] for c, role in zip(w, roles, strict=True) if role == side])) for side in "io"
    ]


@pytest.mark.slow
@FEW
@given(equations(), st.data())
def test_einsum_of_any_equation(parts, data):
    x, w, result, sizes, roles = parts
    rank = data.draw(st.integers(1, min(sides(w, roles, sizes))))
    layer = nn.Einsum([sizes[c] for c in w], f"{x},{w}->{result}", use_bias=False)
    inputs = drawn(jax.ShapeDtypeStruct([sizes[c] for c in x], jnp.float32), 2)
    spec = assert_merged_is_unmerged(layer, inputs, rank)
    assert ["e" if role not in "io" else role for role in spec.axes] == list(roles)
    assert len(set(spec.axes) - {"i", "o"}) == roles.count("e")


@FEW
@given(equations())
def test_the_two_einsums_are_the_one(parts):
    """x (A B) = (x A) B as einsums, in float64 numpy."""
    x, w, result, sizes, _ = parts
    equation = f"{x},{w}->{result}"
    axes, (first, second) = split_equation(equation)
    spec = AdapterSpec(leaf="w", kind="einsum", axes=axes, shape=[sizes[c] for c in w], rank=2, scale=1.0)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape) for shape in spec.factor_shapes)
    inputs = rng.normal(size=[sizes[c] for c in x])
    left, right = spec.factor_letters
    whole = np.einsum(equation, inputs, np.einsum(f"{left},{right}->{spec.base_letters}", a, b))
    np.testing.assert_allclose(np.einsum(second, np.einsum(first, inputs, a), b), whole, rtol=1e-9, atol=1e-9)
