"""Scores of texts against values worked out by hand, and a missing package."""

import math
import sys

import pytest

from loraplus_jax.tasks.text_scores import score_texts

from ..messages import mentions


def test_the_scores_of_two_texts_by_hand():
    texts, references = ["a b c d e", "a b c d x"], [["a b c d e"], ["a b c d f", "z"]]
    scores = score_texts(texts, references)
    # n-grams that match: 9 of 10, 7 of 8, 5 of 6, 3 of 4; no text is too short.
    bleu = math.exp(sum(map(math.log, (9 / 10, 7 / 8, 5 / 6, 3 / 4))) / 4)
    assert scores["bleu"] == pytest.approx(100 * bleu, rel=1e-6)
    # Both of length 5; the first matches in full, the second in 4 words.
    assert scores["rouge_l"] == pytest.approx(100 * (1 + 4 / 5) / 2, rel=1e-6)


def test_nist_by_hand():
    # Information of a word: log2(4 / count); of the pairs, log2(count of the first word / 1).
    scores = score_texts(["a b"], [["a b", "a c"]])
    words, pairs = (math.log2(4 / 2) + math.log2(4 / 1)) / 2, math.log2(2 / 1)
    assert scores["nist"] == pytest.approx(words + pairs, rel=1e-6)


@pytest.mark.parametrize("texts", [["", ""], ["", "a b c d e"]])
def test_empty_texts_have_scores(texts):
    scores = score_texts(texts, [["a b c d e"], ["a b c d e", "z"]])
    assert all(0 <= score < 100 and math.isfinite(score) for score in scores.values())


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=mentions("sacrebleu", "loraplus_jax[generation]")):
        score_texts(["a"], [["a"]])
