"""Beam search against transformers on random models of three families: tokens and scores."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from loraplus_jax.models.beam_search import make_beam_search
from loraplus_jax.models.generate import PAD_AFTER_END, pad_left

from ..marks import every
from . import families

pytestmark = pytest.mark.slow

NEW, STOP = 8, (7, 11)
PROMPTS = [[5, 6, 7, 5, 6, 9], [40, 41], [12, 60, 33, 12, 60, 33, 12, 60]]
THEIRS = {"complete": True, "heuristic": False, "never": "never"}
CASES = list(itertools.product((1, 2, 3, 6), (0.0, 0.9, 2.0, -1.0), (0, 1, 2, 3), THEIRS))


@pytest.fixture(scope="module", params=["llama2", "gpt2", "qwen3"])
def pair(request, tmp_path_factory):
    return families.Pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def reference(pair):
    """The models are so random that ends are rare: two more stops make them common."""
    model = pair.reference()
    model.generation_config.update(bos_token_id=None, pad_token_id=0)
    return model


def theirs(reference, prompt, stop, beams, penalty, ngram, early):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            num_beams=beams,
            no_repeat_ngram_size=ngram,
            eos_token_id=list(stop),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **({"length_penalty": penalty, "early_stopping": THEIRS[early]} if beams > 1 else {}),
        )
    score = float(out.sequences_scores[0]) if beams > 1 else None
    return out.sequences[0, len(prompt) :].tolist(), score


@pytest.mark.parametrize("case", every(5, CASES), ids=str)
def test_tokens_and_scores_are_those_of_transformers(pair, reference, case):
    beams, penalty, ngram, early = case
    for stop in (STOP, tuple(range(30, 50))):
        options = {"length_penalty": penalty, "no_repeat_ngram": ngram, "early_stopping": early}
        search = make_beam_search(
            pair.model,
            pair.model.config,
            new_tokens=NEW,
            stop=stop,
            beams=beams,
            dtype=jnp.float32,
            **options,
        )
        tokens, scores = search({"params": pair.params}, *pad_left(PROMPTS, multiple=4))
        for row, score, prompt in zip(np.asarray(tokens), scores, PROMPTS, strict=True):
            wanted, wanted_score = theirs(reference, prompt, stop, *case)
            assert row[row != PAD_AFTER_END].tolist() == wanted
            if wanted_score is not None:
                np.testing.assert_allclose(score, wanted_score, rtol=2e-5)
