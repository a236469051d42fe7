"""Log-likelihoods of continuations under a language model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..data.batches import Batch, eval_batches
from ..step.sharding import batch_parts, local_rows, shard_batch, with_mesh

MIN_TOKENS, MIN_SCORED = 64, 8
"""The smallest shape of a program, in tokens of a row and in scored tokens of it."""


class Continuation(NamedTuple):
    """A sequence of tokens `(t,)`, 2 <= t, and the index of the first token to score, at least 1."""

    ids: Sequence[int] | np.ndarray
    first: int


class Score(NamedTuple):
    """The sum of a continuation's log-probabilities, in nats, and whether each token is the most likely one."""

    log_likelihood: float
    is_greedy: bool


class Scorer:
    """Scores continuations in batches of few static shapes; compiles one program per shape.

    Args:
      model: a `CausalLM`, with or without adapters.
      variables: its variables, on the devices of the mesh.
      mesh: the device mesh.
      batch_size: rows per batch; rounded up to a multiple of the mesh's data-parallel parts.
      max_length: the model's context, in tokens; a sequence has at most one more, which is only predicted.
    """

    def __init__(
        self, model: nn.Module, variables: Any, *, mesh: Mesh, batch_size: int, max_length: int
    ) -> None:
        def score(variables: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
            inputs = (batch["input_ids"], batch["segment_ids"], batch["positions"])
            logits: Any = model.apply(variables, *inputs, method="logits_at")
            label_logits = jnp.take_along_axis(logits, batch["labels"], axis=-1)
            log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            return label_logits - log_z, jnp.argmax(logits, axis=-1)

        # Of a split array a process could read only its own part.
        replicated = NamedSharding(mesh, PartitionSpec())
        self._score = jax.jit(with_mesh(score, mesh), out_shardings=replicated)
        self._variables, self._mesh = variables, mesh
        self._batch_size = -(-batch_size // batch_parts(mesh)) * batch_parts(mesh)
        self._max_length = max_length

    def __call__(self, continuations: Sequence[Continuation]) -> list[Score]:
        """Scores each continuation; raises ValueError if one is too long or its log-likelihood is not finite."""
        # Sequences that differ in their last token, such as the letters of a multiple-choice question, share a row.
        rows: dict[tuple[bytes, int], list[int]] = {}
        for n, (ids, first) in enumerate(continuations):
            rows.setdefault((np.asarray(ids[:-1], np.int32).tobytes(), first), []).append(n)
        shapes: dict[tuple[int, int, int], list[_Row]] = {}
        for (data, first), members in rows.items():
            prefix = np.frombuffer(data, np.int32)
            if len(prefix) > self._max_length:
                raise ValueError(
                    f"a sequence has {len(prefix) + 1} tokens, above the model's context of {self._max_length}"
                )
            # Logits only where a token is scored: those of a whole row would take most of the memory.
            length = min(_round_up(len(prefix), MIN_TOKENS), self._max_length)
            scored = min(_round_up(len(prefix) + 1 - first, MIN_SCORED), length)
            last = [int(continuations[n].ids[-1]) for n in members]
            shape = (length, scored, _round_up(len(members), 1))
            shapes.setdefault(shape, []).append(_Row(prefix, first, members, last))
        scores: dict[int, Score] = {}
        for shape in sorted(shapes, reverse=True):  # if memory runs out, then at the start
            scores |= self._score_rows(shapes[shape], *shape)
        if not np.isfinite([score.log_likelihood for score in scores.values()]).all():
            raise ValueError("the model's logits are not finite: check the weights and the dtype")
        return [scores[n] for n in range(len(continuations))]

    def _score_rows(
        self, rows: "Sequence[_Row]", length: int, scored: int, variants: int
    ) -> dict[int, Score]:
        columns: Batch = {
            "input_ids": np.zeros((len(rows), length), np.int32),
            "segment_ids": np.zeros((len(rows), length), np.int32),
            "positions": np.zeros((len(rows), scored), np.int32),
            "labels": np.zeros((len(rows), scored, variants), np.int32),
        }
        for n, row in enumerate(rows):
            stop, scored = len(row.prefix), len(row.prefix) + 1 - row.first
            columns["input_ids"][n, :stop] = row.prefix
            columns["segment_ids"][n, :stop] = 1
            columns["positions"][n, :scored] = np.arange(row.first - 1, stop)
            columns["labels"][n, : scored - 1] = row.prefix[row.first :, None]
            columns["labels"][n, scored - 1, : len(row.last)] = row.last
        results = []
        for batch in eval_batches(columns, self._batch_size, local_rows(self._mesh, self._batch_size)):
            # The rows that pad a batch come last, and their scores are not read.
            del batch["weight"]
            results.append(jax.device_get(self._score(self._variables, shard_batch(batch, self._mesh))))
        log_probs, best = (np.concatenate(parts) for parts in zip(*results, strict=True))
        scores = {}
        for n, row in enumerate(rows):
            scored = len(row.prefix) + 1 - row.first
            # The model computes in float32; a sum of thousands of tokens would lose digits there.
            sums = log_probs[n, :scored].astype(np.float64).sum(axis=0)
            greedy = np.all(best[n, :scored, None] == columns["labels"][n, :scored], axis=0)
            for k, member in enumerate(row.members):
                scores[member] = Score(float(sums[k]), bool(greedy[k]))
        return scores


class _Row(NamedTuple):
    """Sequences that differ only in their last token: the tokens before it, and the last token of each member."""

    prefix: np.ndarray
    first: int
    members: list[int]
    last: list[int]


def _round_up(size: int, least: int) -> int:
    """The least power of two times `least` that holds `size`."""
    return least << max(0, (-(-size // least) - 1).bit_length())
