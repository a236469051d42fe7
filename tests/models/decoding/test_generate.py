"""Generation: greedy against whole sequences, sampling against written-out distributions, ends, rows and dtypes."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.adapter import stack_adapters
from loraplus_jax.interop import Adapter
from loraplus_jax.models.decoding import generate as generation
from loraplus_jax.models.decoding.beam_search import make_beam_search
from loraplus_jax.models.decoding.generate import (
    NONFINITE_LOGITS,
    PAD_AFTER_END,
    Sampling,
    check_sampling,
    make_generate,
    pad_left,
)
from loraplus_jax.models.llama.model import Llama

from ...refusals import refusals
from .tiny import CONFIG, PROMPTS

NEW = 6
KEYS = jax.random.split(jax.random.key(0), len(PROMPTS))


@pytest.fixture(scope="module")
def generate(model):
    return make_generate(model, CONFIG, new_tokens=NEW, stop=())


def padded(prompts, multiple=8):
    return pad_left(prompts, multiple=multiple)


def greedy_by_hand(model, variables, prompts, count):
    """Each prompt by itself, the whole sequence anew for every token, padded on the right to one shape."""
    apply, found = jax.jit(model.apply), []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            row = np.zeros((1, 16), np.int32)
            row[0, : len(ids)] = ids
            logits = apply(variables, row, (np.arange(16) < len(ids))[None].astype(np.int32))
            ids.append(int(np.argmax(logits[0, len(ids) - 1])))
        found.append(ids[len(prompt) :])
    return found


def test_greedy_is_the_argmax_over_growing_sequences(model, variables, generate):
    found = generate(variables, *padded(PROMPTS), Sampling(), KEYS)
    expected = greedy_by_hand(model, variables, PROMPTS, NEW)
    assert found.dtype == jnp.int32
    assert np.asarray(found).tolist() == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def test_every_token_is_drawn_with_a_key_of_its_own(variables, generate):
    # Of equal logits a key alone decides; the same key for all steps would draw one token again and again.
    equal = jax.tree.map(jnp.zeros_like, variables)
    rows = np.asarray(generate(equal, *padded(PROMPTS), Sampling(1.0, 1.0), KEYS))
    assert min(len({*row.tolist()}) for row in rows) > 1
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others_and_other_values_compile_nothing(variables, generate):
    hot = Sampling(1.3, 0.9)
    together = np.asarray(generate(variables, *padded(PROMPTS), hot, KEYS))
    others = [PROMPTS[0], [11, 12], [10]]
    changed = np.asarray(generate(variables, *padded(others), hot, KEYS))
    np.testing.assert_array_equal(changed[0], together[0])
    assert not np.array_equal(changed[1], together[1])
    again = generate(variables, *padded(PROMPTS), hot, jax.random.split(jax.random.key(2), 3))
    assert not np.array_equal(again, together)
    moved = generate(variables, *padded(PROMPTS[::-1]), hot, KEYS[::-1])  # a row is its prompt and its key
    np.testing.assert_array_equal(moved, together[::-1])
    generate(variables, *padded(PROMPTS), Sampling(0.5, 0.1), KEYS)
    generate(variables, *padded(PROMPTS), Sampling(0.0, 1.0), KEYS)
    assert generate.__wrapped__._cache_size() == 1
    generate(variables, *padded(PROMPTS[:2]), Sampling(), KEYS[:2])
    assert generate.__wrapped__._cache_size() == 2  # another shape


@pytest.mark.slow
def test_in_64_bit_mode_the_tokens_are_the_same(model, variables):
    def run():
        make = make_generate(model, CONFIG, new_tokens=NEW, stop=[1])
        options = {"new_tokens": NEW, "stop": [1], "no_repeat_ngram": 2}
        searches = [make_beam_search(model, CONFIG, beams=beams, **options) for beams in (1, 3)]
        results = [
            make(variables, *padded(PROMPTS), sampling, KEYS) for sampling in (Sampling(), Sampling(1.3, 0.9))
        ]
        return results + [search(variables, *padded(PROMPTS))[0] for search in searches]

    expected = run()
    with jax.enable_x64(True):
        found = run()
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == jnp.int32
        np.testing.assert_array_equal(x, y)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [3.0, 9.0]}
LONGROPE |= {"original_max_position_embeddings": 10}


@pytest.mark.slow
@pytest.mark.parametrize("beams", [None, 2])
def test_longrope_goes_by_each_row_s_own_length(variables, beams):
    """A prompt of 3 tokens stays within the original context of 10, one of 8 does not."""
    config = dataclasses.replace(CONFIG, rope_scaling=LONGROPE)
    model, prompts = Llama(config), [[5, 6, 7], list(range(1, 9))]
    if beams is None:
        make = make_generate(model, config, new_tokens=NEW, stop=())
        run = lambda prompts: make(variables, *padded(prompts), Sampling(), KEYS[: len(prompts)])  # noqa: E731
    else:
        search = make_beam_search(model, config, beams=beams, new_tokens=NEW, stop=())
        run = lambda prompts: search(variables, *padded(prompts))[0]  # noqa: E731
    together = np.asarray(run(prompts))
    for prompt, row in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(np.asarray(run([prompt, prompt])), [row, row])
    if beams is None:
        assert together[0].tolist() == greedy_by_hand(model, variables, prompts[:1], NEW)[0]


def test_a_stop_token_ends_a_row(model, variables):
    rows = greedy_by_hand(model, variables, PROMPTS, NEW)
    stop = rows[0][2]
    found = make_generate(model, CONFIG, new_tokens=NEW, stop=[stop])(
        variables, *padded(PROMPTS), Sampling(), KEYS
    )
    for ours, whole in zip(np.asarray(found).tolist(), rows, strict=True):
        end = whole.index(stop) + 1 if stop in whole else NEW
        assert ours == whole[:end] + [PAD_AFTER_END] * (NEW - end)
    assert PAD_AFTER_END in np.asarray(found)[0]


@pytest.mark.slow
def test_scores_that_are_not_finite_are_marked_and_end_the_row(variables, generate):
    embedding = variables["params"]["embed_tokens"]["embedding"].at[9].set(jnp.nan)
    broken = {"params": {**variables["params"], "embed_tokens": {"embedding": embedding}}}
    found = np.asarray(generate(broken, *padded([[9], [9], [9]]), Sampling(), KEYS))
    assert found.tolist() == [[NONFINITE_LOGITS] + [PAD_AFTER_END] * (NEW - 1)] * 3


@pytest.mark.slow
def test_a_model_in_bf16_has_its_cache_in_bf16(variables):
    small = make_generate(Llama(CONFIG, jnp.bfloat16), CONFIG, new_tokens=NEW, stop=(), dtype=jnp.bfloat16)
    text = jax.jit(small).lower(variables, *padded(PROMPTS), Sampling(), KEYS).as_text()
    assert "3x2x1x14x4xbf16" in text
    assert "3x2x1x14x4xf32" not in text


def nucleus_by_hand(logits, temperature, top_p):
    logits = np.asarray(logits, np.float64) / temperature
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares)
    count = int(np.searchsorted(np.cumsum(shares[order]), top_p - 1e-9)) + 1
    kept = np.zeros_like(shares)
    kept[order[:count]] = shares[order[:count]]
    return kept / kept.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.3), (1.0, 0.9)]
)
def test_draws_have_the_distribution_of_the_nucleus(temperature, top_p):
    logits, draws = np.array([2.0, 0.5, 1.0, -1.0, 0.0]), 20_000
    expected = nucleus_by_hand(logits, temperature, top_p)
    rows = jnp.asarray(np.broadcast_to(logits, (draws, 5)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.jit(generation._next)(rows, Sampling(temperature, top_p), keys)
    counts = collections.Counter(np.asarray(tokens).tolist())
    found = np.array([counts[i] / draws for i in range(5)])
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(draws))
    assert (found[expected == 0] == 0).all()


@pytest.mark.slow
def test_the_nucleus_is_the_fewest_likeliest_and_never_empty():
    shares = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    logits = jnp.log(jnp.asarray(shares, jnp.float32))
    for top_p, kept in [
        (1e-9, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        (0.49, [[1, 0, 0, 0], [0, 0, 1, 1]]),
        (0.6, [[1, 1, 0, 0], [0, 0, 1, 1]]),
        (0.8, [[1, 1, 1, 1], [0, 1, 1, 1]]),  # of equals all
        (1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ]:
        found = np.isfinite(generation._nucleus(logits, top_p))
        np.testing.assert_array_equal(found, np.array(kept, bool), err_msg=str(top_p))


def test_prompts_are_padded_on_the_left_to_a_multiple():
    ids, segments = pad_left([[1, 2, 3], [4]])
    assert ids.shape == segments.shape == (2, 64)
    assert ids[0, -3:].tolist() == [1, 2, 3]
    assert segments.sum(1).tolist() == [3, 1]
    assert pad_left([[1] * 65])[0].shape == (1, 128)


test_invalid_arguments = refusals(
    (lambda: pad_left([]), "prompts"),
    (lambda: pad_left([[1], []]), "prompts"),
    (lambda: check_sampling(Sampling(-1.0)), "temperature", -1.0),
    (lambda: check_sampling(Sampling(float("nan"))), "temperature", "nan"),
    (lambda: check_sampling(Sampling(1.0, 0.0)), "top_p", 0.0),
    (lambda: check_sampling(Sampling(1.0, 1.5)), "top_p", 1, 1.5),
    (lambda model: make_generate(model, CONFIG, new_tokens=0, stop=()), "new_tokens", 1, 0),
)


@pytest.mark.slow
def test_each_prompt_has_the_tokens_of_its_adapter(model, variables, generate):
    """The gather of the adapters is outside the loop over tokens."""
    adapters = []
    for n, names in enumerate([["q_proj", "down_proj"], ["v_proj"]]):
        config = LoRAPlusConfig(target_modules=names, rank=n + 1, alpha=3.0)
        lora, specs = init_lora(
            apply_lora_plus(model, config), jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
        )
        draw = np.random.default_rng(n).normal
        adapters.append(
            Adapter(jax.tree.map(lambda x, draw=draw: draw(size=x.shape), lora), specs, config, {})
        )
    stack, slots = stack_adapters(adapters, slots=4), np.array([1, 0, 2])

    def run(config, variables, *more):
        make = make_generate(apply_lora_plus(model, config), CONFIG, new_tokens=NEW, stop=())
        return make, (variables, *padded(PROMPTS), Sampling(), KEYS, *more)

    rows, inputs = run(stack.config, variables, (stack, slots))
    found = rows(*inputs)
    alone = [run(a.config, {**variables, "lora": a.lora}) for a in adapters]
    expected = [np.asarray(one(*args)) for one, args in alone]
    assert expected[0].tolist() != expected[1].tolist()
    for row, slot in enumerate(slots[:2]):
        np.testing.assert_array_equal(found[row], expected[slot][row])
    np.testing.assert_array_equal(found[2], generate(variables, *padded(PROMPTS), Sampling(), KEYS)[2])
    (loop,) = [
        eqn
        for eqn in jax.make_jaxpr(rows)(*inputs).eqns[0].params["jaxpr"].eqns
        if eqn.primitive.name == "while"
    ]
    stacked = {value.shape for value in stack.values.values()}
    assert not stacked & {atom.aval.shape for atom in loop.invars}
