"""A learning rate to start a sweep from, by how it must scale with width and rank."""

import math

from .._utils.validation import check_choice, check_int, check_number


def suggest_learning_rate(init: str, alpha: float, rank: int, width: int) -> float:
    """Suggests one rate of A and B (λ = 1) with Adam, as the middle of the rates that a sweep tries.

    It scales so that a step's change of a layer's output neither vanishes nor explodes as width and rank grow: the
    criterion of Maximal-Update Adaptation (arXiv 2602.06204). The exponents follow from Adam's first steps, in
    which each entry of a factor moves by about the rate η with the sign of its gradient. With inputs of order 1:

    - init lora: B's steps change the output by the order of alpha·η, A's, through B, by alpha·η²·width. So η is
      of order (alpha·width)^(-1/2), and 1 / alpha where alpha is near the width.
    - init he_uniform: A is √6 times as large, and so is the change by B's steps; that by A's is the same.
    - init lora_b: A's steps change the output by (alpha / rank)·η·width, B's, through A, by alpha·η²·width. So η
      is of order rank / (alpha·width), and (alpha·width)^(-1/2) at high ranks.

    Args:
      init: `"lora"`, `"he_uniform"` or `"lora_b"`, as in `LoRAPlusConfig`.
      alpha: scaling numerator; with rsLoRA, pass alpha · rank^(1/2).
      rank: rank of the adapters.
      width: inputs of the adapted layers, such as the model's hidden size.

    Returns:
      η_A = η_B. It knows neither data nor length of training, so sweep a factor of 4 or more to both sides.

    Raises:
      TypeError, ValueError: an argument has the wrong type or is out of range.

    >>> round(suggest_learning_rate("lora", alpha=16, rank=8, width=576), 5)
    0.00156
    """
    check_choice("init", init, ("lora", "he_uniform", "lora_b"))
    check_number("alpha", alpha, above=0.0)
    check_int("rank", rank, at_least=1)
    check_int("width", width, at_least=1)
    # The numbers give the best rates of short runs of MiniLM and SmolLM2-135M from he_uniform and lora_b. Those of
    # init lora follow: a run at alpha and η is one of he_uniform at alpha / 6 and √6·η (docs/choosing_lambda.md).
    # The best rates in docs/results.md, on every task that LoRA learns, are within a factor of 4; with batches of 8
    # rows, of 5.4.
    root = math.sqrt(alpha * width)
    if init == "lora_b":
        return min(0.75 * rank / (alpha * width), 0.5 / root)
    return min(0.06 * (1 if init == "he_uniform" else math.sqrt(6)) / alpha, 0.15 / root)
