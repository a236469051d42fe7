"""Tasks of language models and their losses: instruction tuning, multiple choice and data-to-text."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ..models.decoder import head_kernel
from ..step.losses import chunked_cross_entropy
from ..step.sharding import gather_over_fsdp
from ..step.train_step import LossFn

Kind = Literal["instruction", "multiple_choice", "generation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTask:
    """A task of a causal language model; the loss is the mean cross-entropy of the answer tokens.

    Attributes:
      kind: `"instruction"`, `"multiple_choice"` or `"generation"`. Multiple choice trains only on the correct
        choices, and is evaluated by which choice the model finds most likely. Generation is data-to-text: its
        texts are also scored against references, see `text_scores`.
      template: text of the chat template file that the user chose, saved with the adapter; None if they chose none.
    """

    kind: Kind
    template: str | None = None

    @property
    def metric(self) -> str:
        """The metric that selects the best evaluation."""
        return "accuracy" if self.kind == "multiple_choice" else "perplexity"

    @property
    def mode(self) -> Literal["min", "max"]:
        """`"min"` for perplexity, `"max"` for accuracy."""
        return "max" if self.kind == "multiple_choice" else "min"

    def derived(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Computes the perplexity `exp(loss)`; infinite if it would overflow."""
        loss = values["loss"]
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan}

    def notes(self) -> dict[str, Any]:
        """Returns the task as JSON values."""
        return dataclasses.asdict(self)

    def loss_fn(self, model: nn.Module, *, chunk: int | None, label_smoothing: float = 0.0) -> LossFn:
        """Returns the loss on batches of `input_ids`, `segment_ids` and `loss_mask` (B, T), and `weight` (B,).

        Args:
          model: a `CausalLM`, with or without adapters.
          chunk: tokens per chunk of the cross-entropy, for a frozen head; None to compute all logits at once.
          label_smoothing: share of each target that is spread evenly over the vocabulary.
        """
        token_losses = functools.partial(_token_losses, model, chunk, label_smoothing)

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            mask = _shift_mask(batch["loss_mask"]) * batch["weight"][:, None]
            losses = token_losses(variables, batch["input_ids"], batch["segment_ids"], rng)
            return (jnp.sum(losses * mask), jnp.sum(mask)), {}

        return loss_fn

    def choice_fn(self, model: nn.Module, *, chunk: int | None) -> LossFn:
        """Returns the loss and metrics on batches from `encode_choices`, with `weight` (B,).

        The loss is that of the correct choices' tokens. `accuracy` is the share of questions whose correct choice
        has the largest log-likelihood; `accuracy_per_byte` compares the log-likelihood per byte of text.
        """
        token_losses = functools.partial(_token_losses, model, chunk, 0.0)

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            ids = batch["input_ids"]
            rows, choices, length = ids.shape
            ids, segments = (x.reshape(rows * choices, length) for x in (ids, batch["segment_ids"]))
            mask = _shift_mask(batch["loss_mask"])
            losses = token_losses(variables, ids, segments, rng).reshape(mask.shape) * mask
            weight, answer = batch["weight"], batch["answer"]
            total = -jnp.sum(losses, axis=-1)
            padded = jnp.arange(choices)[None] >= batch["n_choices"][:, None]

            def accuracy(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
                best = jnp.argmax(jnp.where(padded, -jnp.inf, scores), axis=-1)
                return jnp.sum((best == answer) * weight), jnp.sum(weight)

            def sum_of_correct(values: jax.Array) -> jax.Array:
                picked = jnp.take_along_axis(values, answer[:, None], axis=1)[:, 0]
                return jnp.sum(picked * weight)

            loss = (sum_of_correct(-total), sum_of_correct(jnp.sum(mask, axis=-1)))
            return loss, {
                "accuracy": accuracy(total),
                "accuracy_per_byte": accuracy(total / batch["byte_lengths"]),
            }

        return loss_fn


def _shift_mask(mask: jax.Array) -> jax.Array:
    """Shifts the mask to the predicting token: `mask[..., t]` says whether token t + 1 counts."""
    return jnp.pad(mask[..., 1:], [(0, 0)] * (mask.ndim - 1) + [(0, 1)])


def _token_losses(
    model: nn.Module,
    chunk: int | None,
    label_smoothing: float,
    variables: Any,
    input_ids: jax.Array,
    segment_ids: jax.Array,
    rng: Any,
) -> jax.Array:
    """Returns the cross-entropy of the next token at each position, float32 (B, T); the last is meaningless."""
    rngs = None if rng is None else {"dropout": rng}
    labels = jnp.roll(input_ids, -1, axis=1)
    if chunk is None:
        logits: Any = model.apply(variables, input_ids, segment_ids, rngs=rngs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if not label_smoothing:
            return losses
        uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        return (1 - label_smoothing) * losses + label_smoothing * uniform
    hidden: Any = model.apply(variables, input_ids, segment_ids, rngs=rngs, method="hidden")
    kernel, transposed = head_kernel(variables["params"])
    axes = ("tensor", "fsdp") if transposed else ("fsdp", "tensor")
    kernel = gather_over_fsdp(kernel.astype(hidden.dtype), axes)
    net: Any = model
    options = {
        "chunk": chunk,
        "soft_cap": net.config.final_logit_softcapping,
        "label_smoothing": label_smoothing,
    }
    return chunked_cross_entropy(hidden, kernel, labels, transposed=transposed, **options)
