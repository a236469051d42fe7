"""Rotary positions, by hand."""

import jax.numpy as jnp
import numpy as np

from loraplus_jax.models.rope import Rope, apply_rope, make_rope, parse_rope_scaling

from ..refusals import refusals


def test_rotations_turn_pairs_by_hand():
    """Head size 4, base 100: frequencies 1 and 1/10; the first half is turned against the second."""
    rope = make_rope(jnp.array([[0, 2]]), size=4, theta=100.0, scaling=(), max_positions=16)
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
    positions = jnp.array([[0, 8, 12]])
    options = {"size": 4, "theta": 100.0, "max_positions": 16}
    plain = make_rope(positions / 4, scaling=(), **options)
    linear = make_rope(positions, scaling=parse_rope_scaling({"type": "linear", "factor": 4.0}), **options)
    factors = parse_rope_scaling({"rope_type": "factors", "factors": [4.0, 4.0]})
    for found in (linear, make_rope(positions, scaling=factors, **options)):
        for ours, wanted in zip(found, plain, strict=True):
            np.testing.assert_allclose(ours, wanted, atol=1e-6)


def test_longrope_divides_by_other_factors_beyond_its_context_by_hand():
    scaling = {"type": "su", "short_factor": [1, 2], "long_factor": [4, 5]}
    scaling = parse_rope_scaling(scaling | {"original_max_position_embeddings": 8})
    options = {"size": 4, "theta": 100.0, "scaling": scaling, "max_positions": 64}
    attention = np.sqrt(1 + np.log(8) / np.log(8))  # eight times as long
    for last, length, divisors in ((7, None, [1, 2]), (8, None, [4, 5]), (3, 8, [1, 2]), (3, 9, [4, 5])):
        lengths = None if length is None else jnp.array([length])
        rope = make_rope(jnp.array([[last]]), lengths=lengths, **options)
        angles = last * np.array([1, 0.1]) / divisors
        np.testing.assert_allclose(rope.cos[0, 0], attention * np.cos(angles), rtol=1e-5)
        np.testing.assert_allclose(rope.sin[0, 0], attention * np.sin(angles), rtol=1e-5)
    both = make_rope(jnp.array([[3], [3]]), lengths=jnp.array([8, 9]), **options)
    np.testing.assert_allclose(both.cos[1, 0], rope.cos[0, 0])
    assert not np.allclose(both.cos[0, 0], both.cos[1, 0])
    # Of each row by itself.
    both = make_rope(jnp.array([[3, 7], [3, 8]]), **options)
    np.testing.assert_allclose(both.cos[1, 0], rope.cos[0, 0])
    np.testing.assert_allclose(both.cos[0], make_rope(jnp.array([[3, 7]]), **options).cos[0])


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


test_invalid_scalings = refusals(
    (lambda: parse_rope_scaling({"type": "liner", "factor": 2}), "'liner'", "linear"),
    (lambda: parse_rope_scaling({"type": "linear"}), "linear", "factor"),
    (lambda: parse_rope_scaling({"type": "linear", "factor": 0}), "factor", 0),
    (lambda: parse_rope_scaling({"type": "linear", "factor": "two"}), "factor", "'two'"),
    (lambda: parse_rope_scaling({"type": "linear", "factor": 2, "beta_fast": 3}), "linear", "beta_fast"),
    (lambda: parse_rope_scaling({"rope_type": "llama3", "factor": 8}), "llama3", "low_freq_factor"),
)
