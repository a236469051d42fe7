"""Scores of generated texts against several references each: BLEU, chrF, ROUGE-L and NIST."""

from collections.abc import Sequence
from types import ModuleType

NIST_ORDER = 5
"""Longest n-grams of NIST, as in its reference implementation."""


def load_scorers() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Imports sacrebleu, rouge-score and nltk's NIST; raises ValueError if one is missing."""
    try:
        import sacrebleu
        from nltk.translate import nist_score
        from rouge_score import rouge_scorer
    except ModuleNotFoundError as error:
        raise ValueError(
            f"task generation requires {error.name} for its scores; run pip install 'loraplus_jax[generation]'"
        ) from None
    return sacrebleu, rouge_scorer, nist_score


def score_texts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores N texts, each against at least one reference.

    Returns:
      `bleu` and `chrf`, sacrebleu's corpus scores with its defaults (case counts; arXiv 1804.08771); `rouge_l`, the
      mean of rouge-score's F1 with the closest reference, times 100; and `nist`, nltk's corpus score over n-grams
      of at most 5 tokens of sacrebleu's tokenizer 13a. All but NIST range from 0 to 100.
    """
    sacrebleu, rouge_scorer, nist_score = load_scorers()
    # The k-th list has every text's k-th reference, None for those with fewer.
    most = max(map(len, references))
    streams = [[r[k] if k < len(r) else None for r in references] for k in range(most)]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    rouge_l = [
        scorer.score_multi(r, text)["rougeL"].fmeasure for text, r in zip(texts, references, strict=True)
    ]
    tokenize = sacrebleu.BLEU(tokenize="13a").tokenizer
    tokens = [tokenize(text).split() for text in texts]
    # nltk divides by the number of the texts' n-grams.
    orders = min(NIST_ORDER, max(map(len, tokens)))
    reference_tokens = [[tokenize(x).split() for x in r] for r in references]
    return {
        "bleu": sacrebleu.corpus_bleu(texts, streams).score,
        "chrf": sacrebleu.corpus_chrf(texts, streams).score,
        "rouge_l": 100 * sum(rouge_l) / len(rouge_l),
        "nist": nist_score.corpus_nist(reference_tokens, tokens, orders) if orders else 0.0,
    }
