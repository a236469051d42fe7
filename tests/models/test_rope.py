"""Rotary positions, by hand."""

import jax.numpy as jnp
import numpy as np

from loraplus_jax.models.rope import Angles, Factors, Linear, LongRope, Rope, apply_rope, make_rope


def angles(positions, lengths=None, max_positions=16):
    """Of a head of size 4 with base 100: frequencies 1 and 1/10."""
    return Angles(jnp.array(positions), lengths, 4, 100.0, max_positions)


def test_rotations_turn_pairs_by_hand():
    """The first half is turned against the second."""
    rope = make_rope(angles([[0, 2]]))
    x = jnp.array([1.0, 2.0, 3.0, 4.0])
    found = np.asarray(apply_rope(jnp.broadcast_to(x, (1, 2, 1, 4)), rope))[0, :, 0]
    a, b = 2.0, 0.2
    turned = [
        np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        3 * np.cos(a) + np.sin(a),
        4 * np.cos(b) + 2 * np.sin(b),
    ]
    np.testing.assert_allclose(found, [x, turned], rtol=1e-6)


def test_linear_scaling_and_factors_divide_the_angles():
    plain = make_rope(angles([[0, 2, 3]]))
    for scaling in (Linear(factor=4.0), Factors(factors=(4.0, 4.0))):
        for ours, wanted in zip(make_rope(angles([[0, 8, 12]]), scaling), plain, strict=True):
            np.testing.assert_allclose(ours, wanted, atol=1e-6)


def test_longrope_divides_by_other_factors_beyond_its_context_by_hand():
    scaling = LongRope(short_factor=(1, 2), long_factor=(4, 5), original_max_position_embeddings=8)

    def rope_of(positions, lengths=None):
        return make_rope(angles(positions, lengths, 64), scaling)

    attention = np.sqrt(1 + np.log(8) / np.log(8))  # eight times as long
    for last, length, divisors in ((7, None, [1, 2]), (8, None, [4, 5]), (3, 8, [1, 2]), (3, 9, [4, 5])):
        lengths = None if length is None else jnp.array([length])
        rope = rope_of([[last]], lengths)
        turned = last * np.array([1, 0.1]) / divisors
        np.testing.assert_allclose(rope.cos[0, 0], attention * np.cos(turned), rtol=1e-5)
        np.testing.assert_allclose(rope.sin[0, 0], attention * np.sin(turned), rtol=1e-5)
    both = rope_of([[3], [3]], jnp.array([8, 9]))
    np.testing.assert_allclose(both.cos[1, 0], rope.cos[0, 0])
    assert not np.allclose(both.cos[0, 0], both.cos[1, 0])
    # Of each row by itself.
    both = rope_of([[3, 7], [3, 8]])
    np.testing.assert_allclose(both.cos[1, 0], rope.cos[0, 0])
    np.testing.assert_allclose(both.cos[0], rope_of([[3, 7]]).cos[0])


def test_the_rest_of_a_head_stays_as_it_is():
    rope = Rope(jnp.full((1, 1, 1), 0.6), jnp.full((1, 1, 1), 0.8))
    found = apply_rope(jnp.array([1.0, 2, 3, 4]).reshape(1, 1, 1, 4), rope)[0, 0, 0]
    np.testing.assert_allclose(found, [0.6 - 1.6, 1.2 + 0.8, 3, 4], rtol=1e-6)


def test_bf16_is_rotated_in_float32():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    rope = Rope(jnp.full((1, 1, 2), 0.6), jnp.full((1, 1, 2), 0.8))
    found = apply_rope(x, rope)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0, 0, 0], jnp.array([-0.2, -0.2, 1.4, 1.4], jnp.bfloat16))
