"""Letters of factors by hand; tests/linen/test_properties.py has the products of any equation."""

from loraplus_jax.adapter.einsum_letters import layer_axis, split_equation, with_stacked

from ..refusals import refusals

test_what_has_no_factors = refusals(
    (lambda: split_equation("bii,io->bo"), "a letter twice"),
    (lambda: split_equation("bi,jo->bijo"), "a contracted axis"),
    (lambda: split_equation("bi,i->b"), "an output axis"),
)


def test_letters_of_stacked_axes():
    assert with_stacked("ar", (0, -1)) == "AarB"
    assert layer_axis("AarB", (0, -1)) == 3
