"""Log-likelihoods of continuations against the model's full logits."""

import jax
import numpy as np
import pytest

from loraplus_jax.adapter.tree import flatten, unflatten
from loraplus_jax.inference.scoring import Continuation, Scorer
from loraplus_jax.models.families import family_of
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama
from loraplus_jax.step.sharding import base_shardings, distribute, make_mesh

from ..messages import mentions

pytestmark = pytest.mark.slow

LONGEST = 72
SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
CONFIG = LlamaConfig.from_hf(
    {**SIZES, "model_type": "llama", "num_attention_heads": 2, "max_position_embeddings": LONGEST}
)


@pytest.fixture(scope="module")
def model():
    model = Llama(CONFIG)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    return model, jax.tree.map(lambda x: 3 * x, variables)


def random_continuations():
    """Of several lengths, up to the longest; with duplicates, and groups that differ in their last token."""
    rng = np.random.default_rng(0)
    result = []
    for length in (2, 9, 66, LONGEST + 1):
        ids = rng.integers(0, CONFIG.vocab_size, length)
        result += [Continuation(ids, 1), Continuation(ids.tolist(), 1)]
        result += [Continuation([*ids[:-1], last], length - 1) for last in range(CONFIG.vocab_size)]
        result += [Continuation([*ids[:-1], last], max(1, length // 2)) for last in range(2)]
    return [result[n] for n in rng.permutation(len(result))]


def test_scores_are_those_of_full_logits(model):
    module, variables = model
    mesh = make_mesh(2, 2, 2)
    by_path = flatten(variables)
    shardings = base_shardings(mesh, variables, family_of("llama").sharding)
    placed = distribute(variables, unflatten({path: shardings[path] for path in by_path}))
    scorer = Scorer(module, placed, mesh=mesh, batch_size=3, max_length=LONGEST)
    continuations = random_continuations()
    scores = scorer(continuations)
    # The model is causal: the zeros after a sequence do not change what is before.
    padded = np.array([np.pad(ids, (0, LONGEST + 1 - len(ids)))[:-1] for ids, _ in continuations])
    all_logits = np.asarray(jax.jit(module.apply)(variables, padded)).astype(np.float64)
    for (ids, first), score, logits in zip(continuations, scores, all_logits, strict=True):
        ids = np.asarray(ids)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        scored = np.arange(first, len(ids))
        expected = log_probs[scored - 1, ids[scored]].sum()
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert score.is_greedy == bool(np.all(log_probs[scored - 1].argmax(-1) == ids[scored]))
    assert {score.is_greedy for score in scores} == {True, False}


def test_few_programs_and_shared_rows(model):
    """Four continuations with one prefix are one row, and lengths from 2 to 65 share a program."""
    module, variables = model
    scorer = Scorer(module, variables, mesh=make_mesh(1), batch_size=4, max_length=LONGEST)
    batches = []
    score = scorer._score

    def record(variables, batch):
        batches.append(batch["input_ids"].shape)
        return score(variables, batch)

    scorer._score = record
    scorer([Continuation([*range(n), last], n) for n in range(1, 9) for last in range(4)])
    assert batches == [(4, 64), (4, 64)]
    scorer([Continuation([1] * n, n - 2) for n in range(3, 66)])
    assert len(set(batches)) == 1
    assert score._cache_size() == 2  # one and four last tokens


def test_what_is_rejected(model):
    module, variables = model
    scorer = Scorer(module, variables, mesh=make_mesh(1), batch_size=4, max_length=LONGEST)
    with pytest.raises(ValueError, match=mentions(LONGEST + 2, LONGEST)):
        scorer([Continuation([1] * (LONGEST + 2), 3)])
    broken = jax.tree.map(lambda x: x * np.nan, variables)
    scorer = Scorer(module, broken, mesh=make_mesh(1), batch_size=4, max_length=LONGEST)
    with pytest.raises(ValueError, match="finite"):
        scorer([Continuation([1, 2, 3], 1)])
