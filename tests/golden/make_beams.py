"""Writes beams.json: transformers' beam search on the model of gpt2_tied.npz.

    pip install torch transformers safetensors numpy
    python tests/golden/make_beams.py

Made with torch 2.13.0 and transformers 5.24.0.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import make_gpt2

PROMPTS = [[5, 6, 7, 5, 6, 9], [40, 41], [12, 60, 33, 12, 60, 33, 12, 60]]
STOP, NEW = list(range(30, 44)), 8
# Beams, length penalty, no-repeat size, early stopping.
CASES = [[4, 0.9, 2, "heuristic"], [3, 2.0, 0, "never"], [5, -1.0, 1, "complete"], [1, 1.0, 3, "heuristic"]]
EARLY = {"complete": True, "heuristic": False, "never": "never"}


def main() -> None:
    model = make_gpt2.make(make_gpt2.CASES["tied"])
    results = [[search(model, prompt, STOP, NEW, *case) for prompt in PROMPTS] for case in CASES]
    content = {"prompts": PROMPTS, "stop": STOP, "new_tokens": NEW, "cases": CASES, "results": results}
    (Path(__file__).parent / "beams.json").write_text(json.dumps(content) + "\n")


def search(model, prompt, stop, new_tokens, beams, penalty, ngram, early):
    """The best sequence's new tokens, and its score, which greedy decoding has not."""
    import torch

    ids = torch.tensor([prompt])
    options = {"length_penalty": penalty, "early_stopping": EARLY[early]} if beams > 1 else {}
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=beams,
            no_repeat_ngram_size=ngram,
            eos_token_id=list(stop) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    score = float(out.sequences_scores[0]) if beams > 1 else None
    return out.sequences[0, len(prompt) :].tolist(), score


if __name__ == "__main__":
    main()
