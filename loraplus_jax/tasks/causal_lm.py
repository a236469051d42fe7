"""Tasks of a causal language model: instruction tuning, multiple choice and data-to-text."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from ..adapter.tree import leaves_by_path
from ..data.batches import Batch, digest, first_batches, round_up, train_batches
from ..data.chat_template import BUILT_IN, ChatTemplate, load_template
from ..data.chat_tokens import end_of_turn, leading_ids, tokenize_chats
from ..data.conversations import Chat, Turn, describe_dropped, read_chats
from ..data.data_to_text import group_references, read_descriptions, select_inputs
from ..data.duplicates import handle_duplicates
from ..data.fetch import resolve
from ..data.multiple_choice import Question, encode_choices, pack_choices, read_questions
from ..data.packed_rows import fill, lengths_of, plan_packing
from ..data.splits import limit_splits, split_files
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.quantized import choose_formats
from ..models.decoder import Config, head_kernel
from ..models.families import FUSED_TYPES, MODEL_TYPES, family_of
from ..step.losses import chunked_cross_entropy
from ..step.sharding import batch_parts, constrain_rows, gather_over_fsdp
from ..step.train_step import LossFn, Rows
from .interface import (
    ANY_POSITION,
    AdaptedModel,
    BaseModel,
    BatchPlan,
    Losses,
    Scored,
    Split,
    Task,
    TaskData,
    batch_shapes,
    check_max_length,
    eval_shapes,
    full_batches,
    held_out_split,
)
from .options import TaskOptions

HEADS = {True: "embed_tokens", False: "lm_head"}
"""Name of the output head, by whether it is tied to the embedding."""
TEMPLATES = ("model", *BUILT_IN)
"""Values of `data.template` that are not files."""
SIMULATED_BATCHES = 10_000
"""The most batches that `plan_batches` draws beforehand; of more it takes the largest that could occur."""
MAX_SCORED_SHARE = 0.95
"""The head computes all positions if more than this share of them may have a loss."""
READERS = {"instruction": read_chats, "multiple_choice": read_questions, "generation": read_descriptions}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTask(Task):
    """A task of a causal language model; the loss is the mean cross-entropy of the answer tokens.

    Attributes:
      kind: `"instruction"`, `"multiple_choice"` or `"generation"`. Multiple choice trains only on the correct
        choices, and is evaluated by which choice the model finds most likely. Generation is data-to-text: its
        texts are also scored against references, see `text_scores`.
      template: text of the chat template file that the user chose, saved with the adapter; None if they chose none.
    """

    template: str | None = None

    @property
    def metric(self) -> str:
        return "accuracy" if self.kind == "multiple_choice" else "perplexity"

    def derived(self, values: Mapping[str, Any]) -> dict[str, float]:
        """The perplexity, and with choices the shares of questions whose right choice is the likeliest.

        `accuracy` compares log-likelihoods, of which longer choices have lower ones; `accuracy_per_byte` those per
        UTF-8 byte, which do not depend on the tokenizer. Of equally likely choices the first counts.
        """
        # math.exp raises for what overflows.
        loss = values["loss"]
        found = {"perplexity": math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan}
        if "log_likelihood" in values:
            likelihood = np.asarray(values["log_likelihood"], np.float64)
            scores = {"accuracy": likelihood, "accuracy_per_byte": likelihood / values["byte_lengths"]}
            for name, score in scores.items():
                order = np.lexsort((values["choice"], -score, values["question"]))
                _, best = np.unique(values["question"][order], return_index=True)
                # A member of a sweep that stopped has no rows.
                found[name] = float(values["right"][order][best].mean()) if len(best) else math.nan
        return found

    def loss_fn(
        self,
        model: nn.Module,
        *,
        chunk: int | None,
        label_smoothing: float = 0.0,
        scored: int | None = None,
        parts: int = 1,
    ) -> LossFn:
        """Returns the loss on batches of `input_ids`, `segment_ids` and `loss_mask` (B, T), and `weight` (B,).

        Args:
          model: a `CausalLM`, with or without adapters.
          chunk: tokens per chunk of the cross-entropy, for a frozen head; None to compute all logits at once.
          label_smoothing: share of each target that is spread evenly over the vocabulary.
          scored: the head computes so many positions of each part of the rows, those with a loss; the loss is NaN
            if there are more. None: it computes all positions.
          parts: number of parts of the rows, by the devices of a mesh that hold them.
        """
        token_losses = functools.partial(_scored_losses, model, chunk, label_smoothing, scored, parts)

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            ids, mask = batch["input_ids"], _shift_mask(batch["loss_mask"]) * batch["weight"][:, None]
            hidden = _hidden(model, variables, ids, batch["segment_ids"], rng)
            losses = token_losses(variables, hidden, ids, mask, rng)
            return (jnp.sum(losses * mask), jnp.sum(mask)), {}

        return loss_fn

    def choice_fn(
        self, model: nn.Module, *, chunk: int | None, scored: int | None = None, parts: int = 1
    ) -> LossFn:
        """Returns the loss and `Rows` on batches from `pack_choices`, with `weight` (R,); see `loss_fn`.

        The loss is that of the right choices' tokens. The rows are each choice's log-likelihood and what `derived`
        needs beside it.
        """
        scored_losses = functools.partial(_scored_losses, model, chunk, 0.0, scored, parts)

        def loss_fn(variables: Any, batch: Any, rng: Any) -> Any:
            ids, segments, end = batch["input_ids"], batch["segment_ids"], batch["end"]
            # Without the rows that fill up a batch, whose weight is 0: of these there may be any number.
            mask = _shift_mask(batch["loss_mask"]) * (batch["weight"] > 0)[:, None]
            hidden = _hidden(model, variables, ids, segments, rng)
            losses = scored_losses(variables, hidden, ids, mask, rng) * mask
            of_sequence = jax.nn.one_hot(segments - 1, end.shape[1], dtype=losses.dtype)
            # A sum, as a product of float32 is less precise on accelerators.
            before = jnp.sum(losses[..., None] * of_sequence, axis=1)[..., None]
            last = constrain_rows(jnp.take_along_axis(hidden, end[..., None], axis=1))
            at_last = functools.partial(_head_losses, model, chunk, 0.0, variables, None, last)
            # The logits are of no label, so vmap computes them once for all choices of a sequence.
            total = before + jax.vmap(at_last, in_axes=-1, out_axes=-1)(batch["last"])
            weight = batch["weight"][:, None, None] * (batch["tokens"] > 0)
            right = batch["right"] * weight
            loss = (jnp.sum(total * right), jnp.sum(batch["tokens"] * right))
            kept = {name: batch[name] for name in ("question", "choice", "right", "byte_lengths")}
            return loss, {name: Rows(x, weight) for name, x in ({"log_likelihood": -total} | kept).items()}

        return loss_fn

    @classmethod
    def from_options(cls, options: TaskOptions, files: ModelFiles) -> "LanguageTask":
        _, template = tokenizer_and_template(options, files, None)
        custom_template = None if options.data.template in TEMPLATES else template.source
        return cls(kind=options.kind, template=custom_template)

    @classmethod
    def load(cls, options: TaskOptions, files: ModelFiles) -> TaskData:
        task = cls.from_options(options, files)
        tools = tokenizer_and_template(options, files, task)
        rows, duplicates = _load_splits(options)
        splits, truncated, choices, length = {}, {}, {}, options.data.max_length
        for name, examples in rows.items():
            if task.kind == "multiple_choice" and name != "train":
                choices[name], truncated[name] = encode_choices(examples, *tools, length), 0
            else:
                splits[name], truncated[name] = _encode(options, files, tools, examples)
        splits |= zip(choices, pack_choices([*choices.values()], length), strict=True)
        sizes = {name: len(examples) for name, examples in rows.items()}
        digests = {name: _digest(examples) for name, examples in rows.items()}
        dropped = describe_dropped(x for examples in rows.values() for x in examples if isinstance(x, Chat))
        inputs = group_references(rows[held_out_split(rows)]) if task.kind == "generation" else ()
        constant = (
            constant_choice(rows["train"], rows[held_out_split(rows)])
            if task.kind == "multiple_choice"
            else {}
        )
        has_template = any(not isinstance(x, Chat) or x.turns[0].role != "text" for x in rows["train"])
        summary = (*dropped, *duplicates, *(_untrained_end(*tools) if has_template else ()))
        return TaskData(task, splits, sizes, truncated, digests, summary, tuple(inputs), constant)

    @classmethod
    def without_data(cls, options: TaskOptions) -> "LanguageTask":
        return cls(kind=options.kind)

    def full_batches(self, options: TaskOptions) -> BatchPlan:
        ids = np.zeros((1, options.data.max_length), np.int32)
        columns = {"input_ids": ids, "segment_ids": ids, "loss_mask": ids.astype(np.float32)}
        return full_batches(columns, options.batch_size, options.eval_batch_size)

    def load_split(
        self, options: TaskOptions, files: ModelFiles, split: str | None, data: str | None
    ) -> Split:
        if data is None:
            splits = _load_splits(options)[0]
            train, examples = splits["train"], splits[split or "test"]
        else:
            train = examples = _read(options, data)
        tools = tokenizer_and_template(options, files, self)
        if self.kind == "multiple_choice":
            length, truncated = options.data.max_length, 0
            (columns,) = pack_choices([encode_choices(examples, *tools, length)], length)
            constant = constant_choice(train, examples)
        else:
            (columns, truncated), constant = _encode(options, files, tools, examples), {}
        inputs = group_references(examples) if self.kind == "generation" else ()
        return Split(columns, len(examples), _digest(examples), tuple(inputs), truncated, constant)

    def make_base(self, options: TaskOptions, files: ModelFiles) -> BaseModel:
        model_options = options.model
        config = model_config(files, split_fused=model_options.split_fused)
        family = family_of(config.model_type)
        model = family.model(
            config,
            dtype=jnp.dtype(model_options.dtype),
            param_dtype=jnp.dtype(model_options.param_dtype),
            unroll=bool(model_options.unroll),
            remat=model_options.remat,
            attention=model_options.attention,
        )
        inputs = 2 * (jax.ShapeDtypeStruct((1, options.data.max_length), jnp.int32),)
        table = family.name_table(config)
        formats = choose_formats(table, model_options.quantize, model_options.quantize_exclude, files)
        hints = []  # what decides the names of layers
        if config.fused or config.split_fused:
            names = " and ".join(
                f"{fused} as {', '.join(parts)}" for fused, parts in config.projections.items()
            )
            hints.append(f"model.split_fused loads {names}; it is {str(config.split_fused).lower()}")
        if config.tie_word_embeddings:
            hints.append(f"the model's head is tied to {HEADS[True]}, there is no {HEADS[False]}")
        sizes, hint = config.tensor_sizes, "; ".join(hints)
        return BaseModel(model, table, (), inputs, family.sharding, sizes, formats, hint)

    def plan_batches(
        self, options: TaskOptions, data: TaskData, steps: int, seeds: Sequence[int], mesh: Mesh
    ) -> BatchPlan:
        columns, parts = data.splits["train"], batch_parts(mesh)
        counts, size = _scored_positions(columns), options.batch_size
        length = columns["input_ids"].shape[1]
        per_part = size // options.accumulate // parts
        if steps * len(seeds) <= SIMULATED_BATCHES:
            batches = first_batches(len(counts), batch_size=size, seeds=seeds, count=steps)
            # Row i goes to micro-batch i mod `accumulate`, and to the part that holds it.
            most = counts[batches].reshape(-1, parts, per_part, options.accumulate).sum(axis=2).max()
        else:
            most = np.sort(counts)[-per_part:].sum()
        evaluate = eval_shapes(data.splits, options.eval_batch_size, parts)
        evaluated = [x for name, x in data.splits.items() if name != "train"]
        scored = Scored(
            _worth_choosing(int(most), per_part * length),
            most_scored(evaluated, evaluate["weight"].shape[0] // parts),
        )
        packed = "packed into " if len(counts) != data.examples["train"] else ""
        tokens = np.count_nonzero(columns["segment_ids"])
        full, share = 100 * tokens / columns["segment_ids"].size, 100 * counts.sum() / tokens
        rows_line = f"{packed}{len(counts):,} training rows of {length} tokens, {full:.0f} % full"
        summary = (f"{rows_line}; the loss is of {share:.0f} % of the tokens",)
        batch = train_batches(columns, batch_size=size)
        return BatchPlan(batch_shapes(columns, size), evaluate, batch, scored=scored, summary=summary)

    def make_losses(
        self,
        options: TaskOptions,
        parts: AdaptedModel,
        mesh: Mesh | None = None,
        scored: Scored = ANY_POSITION,
    ) -> Losses:
        # With a frozen head they never store the full logits.
        count = 1 if mesh is None else batch_parts(mesh)
        # A chunk is split over the mesh as the batch is, so this leaves each part `model.loss_chunk` tokens.
        chunk = options.model.loss_chunk * count if head_is_frozen(parts) else None
        shared: Any = {"chunk": chunk, "parts": count}
        smoothing = options.label_smoothing
        train = self.loss_fn(parts.model, label_smoothing=smoothing, scored=scored.train, **shared)
        evaluate = self.choice_fn if self.kind == "multiple_choice" else self.loss_fn
        return Losses(train, evaluate(parts.model, scored=scored.evaluate, **shared))


def _shift_mask(mask: jax.Array) -> jax.Array:
    # To the predicting token: `mask[:, t]` then says whether token t + 1 counts.
    return jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))


def _hidden(model: nn.Module, variables: Any, ids: jax.Array, segments: jax.Array, rng: Any) -> jax.Array:
    """The inputs of the head (B, T, D)."""
    rngs = None if rng is None else {"dropout": rng}
    hidden: Any = model.apply(variables, ids, segments, rngs=rngs, method="hidden")
    return hidden


def _scored_losses(
    model: nn.Module,
    chunk: int | None,
    label_smoothing: float,
    scored: int | None,
    parts: int,
    variables: Any,
    hidden: jax.Array,
    input_ids: jax.Array,
    mask: jax.Array,
    rng: Any,
) -> jax.Array:
    """The cross-entropy of the next token at each position, float32 (B, T); meaningless where the mask is 0."""
    rngs = None if rng is None else {"dropout": rng}
    # The last position gets the first token as its label, but the shifted mask is 0 there.
    labels = jnp.roll(input_ids, -1, axis=1)
    head_losses = functools.partial(_head_losses, model, chunk, label_smoothing, variables, rngs)
    if scored is None:
        return head_losses(hidden, labels)
    # Each part apart, so that no position leaves its device.
    hidden, labels, mask = (x.reshape(parts, -1, *x.shape[2:]) for x in (hidden, labels, mask))
    index = jnp.argsort(mask == 0, axis=1, stable=True)[:, :scored]
    take = jax.vmap(lambda values, at: values[at])
    losses = head_losses(constrain_rows(take(hidden, index)), take(labels, index))
    losses = jax.vmap(lambda at, values: jnp.zeros(mask.shape[1]).at[at].set(values))(index, losses)
    left_out = jnp.count_nonzero(mask, axis=1, keepdims=True) > index.shape[1]
    return jnp.where(left_out, jnp.nan, losses).reshape(input_ids.shape)


def _head_losses(
    model: nn.Module,
    chunk: int | None,
    label_smoothing: float,
    variables: Any,
    rngs: Any,
    hidden: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    """The cross-entropy (B, T) of labels (B, T), for inputs of the head (B, T, D)."""
    if chunk is None:
        logits: Any = model.apply(variables, hidden, rngs=rngs, method="logits")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if not label_smoothing:
            return losses
        uniform = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
        return (1 - label_smoothing) * losses + label_smoothing * uniform
    kernel, transposed = head_kernel(variables["params"])
    axes = ("tensor", "fsdp") if transposed else ("fsdp", "tensor")
    # Gathered here, once. In the loop over chunks, GSPMD would gather the kernel for each of them.
    kernel = gather_over_fsdp(kernel.astype(hidden.dtype), axes)
    net: Any = model
    options = {
        "chunk": chunk,
        "soft_cap": net.config.final_logit_softcapping,
        "label_smoothing": label_smoothing,
    }
    return chunked_cross_entropy(hidden, kernel, labels, transposed=transposed, **options)


def _untrained_end(tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[str]:
    """Yields a line if `{% generation %}` blocks leave out the token that ends an answer."""
    end = end_of_turn(tokenizer, template)
    if end is not None and not end[1]:
        yield (
            f"the {{% generation %}} blocks of the chat template of {template.origin} leave out "
            f"{tokenizer.id_to_token(end[0])} after an answer: training does not teach the model to stop there"
        )


def constant_choice(train: Sequence[Any], questions: Sequence[Any]) -> dict[str, float]:
    """The accuracy on questions of the position that is most often right in the train split."""
    position = np.bincount([question.answer for question in train]).argmax()
    return {"accuracy": float(np.mean([question.answer == position for question in questions]))}


def most_scored(splits: Sequence[Batch], rows: int) -> int | None:
    """The most positions with a loss in so many consecutive rows of any split; None if any may have one."""
    sums = [
        np.add.reduceat(counts, np.arange(0, len(counts), rows)).max()
        for counts in map(_scored_positions, splits)
    ]
    return _worth_choosing(int(max(sums)), rows * splits[0]["input_ids"].shape[1])


def _scored_positions(columns: Batch) -> np.ndarray:
    """The number of tokens with a loss, in each row of the columns."""
    return np.count_nonzero(columns["loss_mask"][:, 1:], axis=1)


def _worth_choosing(scored: int, positions: int) -> int | None:
    """The number of positions that the head computes; None if nearly all are scored, so all are."""
    scored = round_up(max(scored, 1), 8)
    return scored if scored < MAX_SCORED_SHARE * positions else None


def _digest(examples: Sequence[Chat | Question]) -> str:
    return digest(map(_plain, examples))


def _plain(value: Any) -> Any:
    """Returns an example as JSON values; fields at their default are left out, so a new one changes no digest."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = [field for field in dataclasses.fields(value) if field.name != "dropped"]
    values = [("" if x.name == "place" else getattr(value, x.name), x) for x in fields]
    return [_plain(part) for part, x in values if x.name == "place" or part != x.default]


def load_text(options: TaskOptions, files: ModelFiles, value: str) -> Split:
    """Loads a file of texts or conversations, whatever the task, as packed rows of `data.max_length` tokens."""
    chats, length = read_chats(resolve(value, "data")), options.data.max_length
    tools = tokenizer_and_template(options, files, None)
    columns, truncated = tokenize_chats(chats, *tools, length, start=leading_ids(files.tokenizer))
    rows = plan_packing(lengths_of(columns["input_ids"]), length)
    columns = fill(columns, rows, len(rows), length)[0]
    return Split(columns, len(chats), _digest(chats), truncated=truncated)


def tokenizer_and_template(
    options: TaskOptions, files: ModelFiles, task: LanguageTask | None
) -> tuple[Tokenizer, ChatTemplate]:
    """The model's plain tokenizer, and the chat template saved in the task, if any, or set in the options."""
    check_max_length(options, model_config(files).max_length)
    choice = options.data.template
    if task is not None and task.template is None and choice not in TEMPLATES:
        # The settings come with an adapter, and with it the text of a template that its training read from a file.
        raise ValueError(
            f"data.template {choice!r:.80} is a file, which is not opened for an adapter, and its text is not in "
            "task.template of the adapter's JSON: put it there, or set data.template there to one of "
            f"{', '.join(TEMPLATES)}"
        )
    return files.plain_tokenizer, load_template(choice, files, None if task is None else task.template)


def model_config(files: ModelFiles, *, split_fused: bool = False) -> Config:
    """The config of a language model.

    Raises:
      ValueError: it is not a language model, or with `split_fused` it has no fused projections.
    """
    config = files.config
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        raise ValueError(
            f"{files} is of model_type {kind!r:.80}, not a language model ({', '.join(MODEL_TYPES)}); "
            "an encoder takes task classification or regression, and loraplus predict"
        )
    if split_fused and kind not in FUSED_TYPES:
        raise ValueError(
            f"model.split_fused: a model of model_type {kind!r} has no fused projections to split, unlike "
            f"{' and '.join(FUSED_TYPES)}; set it to false"
        )
    config = family_of(kind).config.from_hf(config)
    return dataclasses.replace(config, split_fused=True) if split_fused else config


def head_is_frozen(parts: AdaptedModel) -> bool:
    """Whether the head is frozen: neither its weights nor an adapter on it is trained."""
    model: Any = parts.base.model
    head = HEADS[model.config.tie_word_embeddings]
    return not any(head in path.split("/") for path in leaves_by_path(parts.trainable))


def _load_splits(options: TaskOptions) -> tuple[dict[str, list[Any]], list[str]]:
    splits = split_files(options.data, functools.partial(_read, options))
    splits, lines = handle_duplicates(splits, options.data)
    splits, limited = limit_splits(splits, options.data)
    if options.generation.inputs is not None:
        name = held_out_split(splits)
        splits[name] = select_inputs(splits[name], options.generation.inputs)
    return splits, [*limited, *lines]


def _read(options: TaskOptions, value: str) -> list[Any]:
    return READERS[options.kind](resolve(value, "data"), options.data.column_names)


def _encode(
    options: TaskOptions,
    files: ModelFiles,
    tools: tuple[Tokenizer, ChatTemplate],
    examples: Sequence[Chat | Question],
) -> tuple[Batch, int]:
    """Encodes examples in rows of `max_length` tokens; also returns how many were truncated."""
    chats = []
    for example in examples:
        if isinstance(example, Question):
            answer = Turn("assistant", example.choices[example.answer])
            chats.append(Chat((Turn("user", example.prompt), answer), example.place))
        else:
            chats.append(example)
    length = options.data.max_length
    start = leading_ids(files.tokenizer)
    columns, truncated = tokenize_chats(chats, *tools, length, answers=options.data.answers, start=start)
    rows = (
        plan_packing(lengths_of(columns["input_ids"]), length)
        if options.data.packing
        else [[index] for index in range(len(chats))]
    )
    return fill(columns, rows, len(rows), length)[0], truncated
