"""Letters of factors by hand, and an equation's two products against the one with A B."""

import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.adapter.einsum_letters import layer_axis, split_equation, with_stacked

from ..refusals import refusals


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("BTD,NDH->BTNH", (2, 3, 4), (5, 4, 6)),
        ("BTNH,NHD->BTD", (2, 3, 5, 6), (5, 6, 4)),
        ("ebi,eio->ebo", (3, 2, 4), (3, 4, 5)),
    ],
)
def test_the_two_products_are_that_with_a_times_b(equation, x, w):
    roles, (first, second) = split_equation(equation)
    rng, sizes = (
        np.random.default_rng(0),
        dict(zip(equation.split("->")[0].replace(",", ""), x + w, strict=True)),
    )
    (_, a), (_, b) = (side.split("->")[0].split(",") for side in (first, second))
    rank = next(c for c in a if c not in sizes)
    sizes[rank] = 2
    x, a_, b_ = (rng.standard_normal([sizes[c] for c in s]) for s in (equation.split(",")[0], a, b))
    weight = equation.split("->")[0].split(",")[1]
    product = np.einsum(f"{a},{b}->{weight}", a_, b_)
    assert [sizes[c] for c, role in zip(weight, roles, strict=True) if role == "o"] == list(
        b_.shape[b.index(rank) + 1 :]
    )
    np.testing.assert_allclose(
        jnp.einsum(second, jnp.einsum(first, x, a_), b_), np.einsum(equation, x, product), rtol=1e-4
    )


test_what_has_no_factors = refusals(
    (lambda: split_equation("bii,io->bo"), "a letter twice"),
    (lambda: split_equation("bi,jo->bijo"), "a contracted axis"),
    (lambda: split_equation("bi,i->b"), "an output axis"),
)


def test_letters_of_stacked_axes():
    assert with_stacked("ar", (0, -1)) == "AarB"
    assert layer_axis("AarB", (0, -1)) == 3
