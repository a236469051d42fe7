"""Beam search: golden sequences of transformers, a search of all sequences, batches, ends and non-finite logits."""

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.adapter.tree import flatten, unflatten
from loraplus_jax.interpreter.unstack import unstack
from loraplus_jax.models.decoding.beam_search import make_beam_search
from loraplus_jax.models.decoding.generate import NONFINITE_LOGITS, PAD_AFTER_END, pad_left
from loraplus_jax.models.llama.model import SHARDING, Llama
from loraplus_jax.step.sharding import base_shardings, distribute, make_mesh

from ...marks import slow
from ...refusals import refusals
from ..golden import GOLDEN as FILES
from .tiny import CONFIG, PROMPTS, WORDS

GOLDEN = json.loads((FILES / "beams.json").read_text())


@pytest.mark.parametrize("n", [slow(0), 1, slow(2), slow(3)])
def test_sequences_and_scores_equal_transformers(models, n):
    _, gpt2, params = models("gpt2_tied")
    beams, penalty, ngram, early = GOLDEN["cases"][n]
    search = make_beam_search(
        gpt2,
        gpt2.config,
        new_tokens=GOLDEN["new_tokens"],
        stop=GOLDEN["stop"],
        beams=beams,
        length_penalty=penalty,
        no_repeat_ngram=ngram,
        early_stopping=early,
    )
    ids, segments = pad_left(GOLDEN["prompts"], multiple=4)
    tokens, scores = search({"params": params}, ids, segments)
    for row, score, (wanted, wanted_score) in zip(
        np.asarray(tokens), scores, GOLDEN["results"][n], strict=True
    ):
        assert row.tolist() == wanted + [PAD_AFTER_END] * (len(row) - len(wanted))
        assert wanted_score is None or float(score) == pytest.approx(wanted_score, rel=2e-5)
    search({"params": params}, ids[::-1].copy(), segments[::-1].copy())
    assert search.__wrapped__._cache_size() == 1


def log_probs_of_all(model, variables, prompt, count):
    """Every sequence of new tokens and its log-probability."""
    sequences = np.array(list(itertools.product(range(WORDS), repeat=count)), np.int32)
    rows = np.concatenate([np.tile(np.array([prompt], np.int32), (len(sequences), 1)), sequences], axis=1)
    logits = jax.nn.log_softmax(jax.jit(model.apply)(variables, rows))
    at = [logits[np.arange(len(rows)), len(prompt) - 1 + i, sequences[:, i]] for i in range(count)]
    return sequences, np.asarray(sum(at))


@pytest.mark.slow
@pytest.mark.parametrize("no_repeat_in", ["new", "all"])
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all_pairs(model, variables, no_repeat_in):
    search = make_beam_search(
        model, CONFIG, new_tokens=2, stop=(), beams=WORDS, no_repeat_ngram=1, no_repeat_in=no_repeat_in
    )
    tokens, scores = search(variables, *pad_left(PROMPTS, multiple=8))
    for row, score, prompt in zip(np.asarray(tokens), scores, PROMPTS, strict=True):
        pairs, sums = log_probs_of_all(model, variables, prompt, 2)
        banned = pairs[:, 0] == pairs[:, 1]
        if no_repeat_in == "all":
            banned |= np.isin(pairs, prompt).any(axis=1)
        best = np.argmax(np.where(banned, -np.inf, sums))
        assert row.tolist() == pairs[best].tolist()
        assert float(score) == pytest.approx(sums[best] / 2, rel=1e-5)


@pytest.mark.slow
def test_beams_on_a_mesh_stay_on_their_device_and_are_those_of_one_device():
    """Of the cache of 8 prompts a device of the mesh holds 2 with their 3 beams, and one of 2 heads."""
    config = dataclasses.replace(CONFIG, num_key_value_heads=2)
    model, mesh = Llama(config), make_mesh(2, 2, 2)
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
    shardings = base_shardings(mesh, variables, SHARDING)
    placed = distribute(variables, unflatten({path: shardings[path] for path in flatten(variables)}))
    inputs = pad_left([[n % WORDS, *prompt] for n in range(3) for prompt in PROMPTS][:8], multiple=8)
    options = {"new_tokens": 6, "stop": (3,), "beams": 3, "length_penalty": 0.5, "no_repeat_ngram": 2}
    search = make_beam_search(model, config, **options, mesh=mesh)
    tokens, scores = search(placed, *inputs)
    expected, expected_scores = make_beam_search(model, config, **options)(variables, *inputs)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    program = search.__wrapped__.lower(placed, unstack(placed, 2), *inputs).compile().as_text()
    assert set(re.findall(r"f32\[(\d+,2,\d+,14,4)\]", program)) == {"2,2,1,14,4", "6,2,1,14,4"}


@pytest.mark.slow
def test_logits_that_are_not_finite_are_marked(model, variables):
    embedding = variables["params"]["embed_tokens"]["embedding"].at[9].set(jnp.nan)
    broken = {"params": {**variables["params"], "embed_tokens": {"embedding": embedding}}}
    search = make_beam_search(model, CONFIG, new_tokens=2, stop=(), beams=2)
    tokens, _ = search(broken, *pad_left([[9]], multiple=8))
    assert np.asarray(tokens).tolist() == [[NONFINITE_LOGITS, PAD_AFTER_END]]


def searching(**changes):
    options = {"new_tokens": 2, "stop": (), "beams": 2} | changes
    return lambda model: make_beam_search(model, CONFIG, **options)


test_invalid_arguments = refusals(
    (searching(beams=0), "beams", 0),
    (searching(beams=WORDS + 1), "beams", WORDS, WORDS + 1),
    (searching(new_tokens=0), "new_tokens", 0),
    (searching(no_repeat_ngram=-1), "no_repeat_ngram", "-1"),
    (searching(length_penalty=float("nan")), "length_penalty", "nan"),
    (searching(length_penalty=-6.0), "length_penalty", "-5", 5, "-6"),
    (searching(early_stopping="soon"), "early_stopping", "soon", "never"),
    (searching(no_repeat_in="old"), "no_repeat_in", "old", "new"),
)
