"""Beam search against transformers on random models of three families: tokens and scores."""

import itertools

import numpy as np
import pytest

from loraplus_jax.models.decoding.beam_search import make_beam_search
from loraplus_jax.models.decoding.generate import PAD_AFTER_END, pad_left

from ..marks import diagonal, long
from . import families

pytestmark = pytest.mark.slow

maker = families.golden_maker("make_beams")
FAMILIES = ("llama2", "gpt2", "qwen3")
STOPS = {"common": maker.STOP, "rare": (7, 11), "none": ()}
# Beams, length penalty, no-repeat size, early stopping, tokens that end a sequence.
CASES = [
    (2, 0.0, 2, "never", "common"),
    (3, 0.9, 0, "heuristic", "common"),
    (6, 2.0, 3, "complete", "common"),
    (3, -1.0, 1, "never", "common"),
    (2, 2.0, 2, "never", "rare"),
    (1, 0.9, 2, "heuristic", "common"),
]
GRID = itertools.product((1, 2, 3, 6), (0.0, 0.9, 2.0, -1.0), (0, 1, 2, 3), maker.EARLY, STOPS)
MORE = list(zip(itertools.cycle(FAMILIES), list(GRID)[::11]))


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    return families.Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    ("pair", "case"),
    [*diagonal(FAMILIES, CASES), *(long(*values) for values in MORE)],
    indirect=["pair"],
    ids=str,
)
def test_tokens_and_scores_are_those_of_transformers(pair, case):
    beams, penalty, ngram, early, ends = case
    search = make_beam_search(
        pair.model,
        pair.model.config,
        new_tokens=maker.NEW,
        stop=STOPS[ends],
        beams=beams,
        length_penalty=penalty,
        no_repeat_ngram=ngram,
        early_stopping=early,
    )
    tokens, scores = search({"params": pair.params}, *pad_left(maker.PROMPTS, multiple=4))
    for row, score, prompt in zip(np.asarray(tokens), scores, maker.PROMPTS, strict=True):
        wanted, wanted_score = maker.search(
            pair.reference(), prompt, STOPS[ends], maker.NEW, beams, penalty, ngram, early
        )
        assert row[row != PAD_AFTER_END].tolist() == wanted
        if wanted_score is not None:
            np.testing.assert_allclose(score, wanted_score, rtol=2e-5)
