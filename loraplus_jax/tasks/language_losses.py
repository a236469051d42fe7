"""What a language model learns: the answers in conversations, or which of several answers is right."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ..losses import chunked_cross_entropy
from ..models.llama import head_kernel
from ..sharding import gather_over_fsdp
from ..train_step import LossFn

Kind = Literal["instruction", "multiple_choice"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTask:
    """A task of a causal language model; the loss is always the mean cross-entropy of the answers' tokens.

    Attributes:
      kind: which of the two. Multiple choice learns the right answers as if they were the only ones, and is
        evaluated by which answer the model holds for the likeliest.
      template: the text of a chat template that the user named as a file, so that the adapter keeps it.
    """

    kind: Kind
    template: str | None = None

    @property
    def metric(self) -> str:
        """The metric that selects the best evaluation."""
        return "perplexity" if self.kind == "instruction" else "accuracy"

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether the metric is better when smaller or larger."""
        return "min" if self.kind == "instruction" else "max"

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """The perplexity `exp(loss)`, infinite where that is more than a float holds."""
        loss = means["loss"]
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan}

    def notes(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    def loss_fn(self, model: nn.Module, *, chunk: int | None) -> LossFn:
        """The loss of a batch with `input_ids`, `segment_ids` and `loss_mask` (B, T), and `weight` (B,).

        Args:
          model: a `Llama`, with adapters or without.
          chunk: tokens whose logits exist at once, for a head that is frozen; None for one that is trained.
        """
        token_losses = functools.partial(_token_losses, model, chunk)

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            mask = _shift_mask(batch["loss_mask"]) * batch["weight"][:, None]
            losses = token_losses(variables, batch["input_ids"], batch["segment_ids"], rng)
            return (jnp.sum(losses * mask), jnp.sum(mask)), {}

        return loss_fn

    def choice_fn(self, model: nn.Module, *, chunk: int | None) -> LossFn:
        """Loss and metrics of a batch as `encode_choices` makes it, with `weight` (B,).

        The loss is that of the right choices' tokens. A question counts as right in `accuracy` where the right
        choice has the largest log-likelihood, in `accuracy_per_byte` where it has the largest one a byte of text.
        """
        token_losses = functools.partial(_token_losses, model, chunk)

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            ids = batch["input_ids"]
            rows, choices, length = ids.shape
            ids, segments = (x.reshape(rows * choices, length) for x in (ids, batch["segment_ids"]))
            mask = _shift_mask(batch["loss_mask"])
            losses = token_losses(variables, ids, segments, rng).reshape(mask.shape) * mask
            weight, answer = batch["weight"], batch["answer"]
            total = -jnp.sum(losses, axis=-1)
            absent = jnp.arange(choices)[None] >= batch["n_choices"][:, None]

            def accuracy(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
                best = jnp.argmax(jnp.where(absent, -jnp.inf, scores), axis=-1)
                return jnp.sum((best == answer) * weight), jnp.sum(weight)

            def of_answer(values: jax.Array) -> jax.Array:
                picked = jnp.take_along_axis(values, answer[:, None], axis=1)[:, 0]
                return jnp.sum(picked * weight)

            loss = (of_answer(-total), of_answer(jnp.sum(mask, axis=-1)))
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
    variables: Any,
    input_ids: jax.Array,
    segment_ids: jax.Array,
    rng: Any,
) -> jax.Array:
    """The cross-entropy of each token's successor, float32 (B, T); at the last token it means nothing."""
    rngs = None if rng is None else {"dropout": rng}
    labels = jnp.roll(input_ids, -1, axis=1)
    if chunk is None:
        logits: Any = model.apply(variables, input_ids, segment_ids, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hidden: Any = model.apply(variables, input_ids, segment_ids, rngs=rngs, method="hidden")
    kernel, transposed = head_kernel(variables["params"])
    axes = ("tensor", "fsdp") if transposed else ("fsdp", "tensor")
    kernel = gather_over_fsdp(kernel.astype(hidden.dtype), axes)
    return chunked_cross_entropy(hidden, kernel, labels, transposed=transposed, chunk=chunk)
