"""Losses and metrics of language models by hand, digests of their data, and what is left out of it."""

import dataclasses
import json
import math
import shutil
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.data.batches import digest
from loraplus_jax.data.conversations import Chat, Turn
from loraplus_jax.data.data_to_text import Description
from loraplus_jax.data.multiple_choice import Question
from loraplus_jax.models.files import open_files
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.step.sharding import batch_sharding, make_mesh
from loraplus_jax.step.train_step import make_eval
from loraplus_jax.tasks.causal_lm import LanguageTask, _digest, constant_choice
from loraplus_jax.tasks.interface import TaskData
from loraplus_jax.training.evaluation import finish_metrics, join_rows

from .. import tiny
from ..integration.language_world import STOP

TALK, CHOICE = LanguageTask(kind="instruction"), LanguageTask(kind="multiple_choice")
WORDS = 4


class Counter(nn.Module):
    """Says that the next id is one more, three times as likely as each other one of four."""

    def hidden(self, input_ids, segment_ids):
        return jnp.log(3.0) * jax.nn.one_hot((input_ids + 1) % WORDS, WORDS)

    def logits(self, x):
        return x


RIGHT, WRONG = math.log(2), math.log(6)  # 3 of 6, and 1 of 6


def talk(ids, mask, weight, segments=None):
    ids = jnp.array(ids)
    return {
        "input_ids": ids,
        "segment_ids": jnp.ones_like(ids) if segments is None else jnp.array(segments),
        "loss_mask": jnp.array(mask, jnp.float32),
        "weight": jnp.array(weight, jnp.float32),
    }


# As programs: operation by operation each would be compiled.
trained = jax.jit(lambda batch: TALK.loss_fn(Counter(), chunk=None)({}, batch, None))
chosen = jax.jit(lambda batch: CHOICE.choice_fn(Counter(), chunk=None)({}, batch, None))


def both(pair):
    return float(pair[0]), float(pair[1])


@pytest.mark.parametrize(
    ("mask", "total", "tokens"),
    [
        ([[0, 1, 0, 0]], RIGHT, 1),  # 1 from 0
        ([[0, 0, 1, 0]], WRONG, 1),  # 3 from 1
        ([[0, 0, 0, 1]], RIGHT, 1),  # 0 from 3
        ([[0, 1, 1, 1]], 2 * RIGHT + WRONG, 3),
        ([[0, 0, 0, 0]], 0, 0),
        ([[1, 0, 0, 0]], 0, 0),  # nothing stands before the first
    ],
)
def test_a_token_is_predicted_from_the_one_before(mask, total, tokens):
    found, metrics = trained(talk([[0, 1, 3, 0]], mask, [1]))
    assert both(found) == pytest.approx((total, tokens), rel=1e-6)
    assert metrics == {}


def test_label_smoothing_moves_a_share_of_the_target_to_every_token():
    found, _ = jax.jit(TALK.loss_fn(Counter(), chunk=None, label_smoothing=0.2))(
        {}, talk([[0, 1]], [[0, 1]], [1]), None
    )
    # Counter finds 1 likely after 0, and the other three tokens equally unlikely.
    assert both(found) == pytest.approx((0.85 * RIGHT + 0.15 * WRONG, 1), rel=1e-6)


def test_the_mean_is_over_tokens_and_rows_without_weight_are_left_out():
    batch = talk([[0, 1, 2], [0, 0, 0], [3, 3, 3]], [[0, 1, 1], [0, 0, 1], [0, 1, 1]], [1, 1, 0])
    found, _ = trained(batch)
    assert both(found) == pytest.approx((2 * RIGHT + WRONG, 3), rel=1e-6)


def choices():
    """Two questions, of three choices and of two; the first choice of the second has the longer text.

    The first question's are 0, 1, 2 and 0, 1, 1, which share all but the last token, and 0, 0, 0; the second's are
    1, 2, 3 and 1, 3, 0, of which only the 0 is scored.
    """
    row = {
        "input_ids": [[0, 1, 0, 0, 0], [1, 2, 1, 3, 0]],
        "segment_ids": [[1, 1, 2, 2, 0], [1, 1, 2, 2, 0]],
        "loss_mask": [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]],
        "end": [[1, 3], [1, 3]],
        "question": [[[0, 0], [0, 0]], [[1, 0], [1, 0]]],
        "choice": [[[0, 1], [2, 0]], [[0, 0], [1, 0]]],
        "right": [[[1, 0], [0, 0]], [[0, 0], [1, 0]]],
        "byte_lengths": [[[2, 2], [2, 0]], [[9, 0], [1, 0]]],
        "tokens": [[[2, 2], [2, 0]], [[2, 0], [1, 0]]],
        "last": [[[2, 1], [0, 0]], [[3, 0], [0, 0]]],
        "weight": [1, 1],
    }
    floats = ("loss_mask", "right", "weight")
    return {name: jnp.array(x, jnp.float32 if name in floats else jnp.int32) for name, x in row.items()}


def scores(batch):
    """The loss with its tokens, the log-likelihoods, and what follows from them."""
    found, rows = chosen(batch)
    values = join_rows([rows]) | {"loss": float(found[0] / found[1])}
    return both(found), values["log_likelihood"].tolist(), finish_metrics(CHOICE, values)


# Log-likelihoods: of the first question's choices -2R, -R-W and -2W, of the second's -2R and -R.
def test_the_likeliest_choice_and_the_likeliest_by_byte():
    found, likelihoods, metrics = scores(choices())
    assert likelihoods == pytest.approx(
        [-2 * RIGHT, -RIGHT - WRONG, -2 * WRONG, -2 * RIGHT, -RIGHT], rel=1e-6
    )
    assert found == pytest.approx((2 * RIGHT + RIGHT, 3), rel=1e-6)
    assert (metrics["accuracy"], metrics["accuracy_per_byte"]) == (1, 0.5)  # -2R / 9 is more than -R / 1
    assert metrics["perplexity"] == pytest.approx(2, rel=1e-6)


def test_rows_without_weight_and_absent_choices_never_count():
    # An absent choice would have the log-likelihood 0, above all others.
    wrong = choices() | {"right": jnp.array([[[0.0, 1], [0, 0]], [[1, 0], [0, 0]]])}
    assert [scores(wrong)[2][name] for name in ("accuracy", "accuracy_per_byte")] == [0, 0.5]
    found, likelihoods, metrics = scores(wrong | {"weight": jnp.array([0.0, 1.0])})
    assert found == pytest.approx((2 * RIGHT, 2), rel=1e-6)
    assert len(likelihoods) == 2
    assert (metrics["accuracy"], metrics["accuracy_per_byte"]) == (0, 1)


def test_of_equally_likely_choices_the_first_counts_wherever_it_is():
    values = {"loss": 1.0, "log_likelihood": np.array([-2.0, -3.0, -2.0]), "byte_lengths": np.ones(3)}
    values |= {
        "question": np.zeros(3, int),
        "choice": np.array([2, 0, 1]),
        "right": np.array([0.0, 0.0, 1.0]),
    }
    assert CHOICE.derived(values)["accuracy"] == 1
    empty = {name: value[:0] for name, value in values.items() if name != "loss"} | {"loss": math.nan}
    assert math.isnan(CHOICE.derived(empty)["accuracy_per_byte"])


def test_training_on_choices_takes_rows_like_any_conversation():
    found, _ = jax.jit(CHOICE.loss_fn(Counter(), chunk=None))({}, talk([[0, 1, 3]], [[0, 1, 1]], [1]), None)
    assert both(found) == pytest.approx((RIGHT + WRONG, 2), rel=1e-6)


def test_perplexity():
    known = {0.0: 1.0, math.log(7): 7.0, 699.0: math.exp(699.0), 700.0: math.inf, math.nan: math.nan}
    for loss, perplexity in known.items():
        assert TALK.derived({"loss": loss})["perplexity"] == pytest.approx(perplexity, nan_ok=True)


SIZES = LlamaConfig.from_hf(tiny.config(vocab_size=11, num_hidden_layers=1))


TURNS = (Turn("user", "a"), Turn("assistant", "b"))
PLAIN = [["user", "a"], ["assistant", "b"]]


def test_digests_do_not_change_with_fields_that_an_example_does_not_use():
    examples = [Chat(TURNS, "f:1"), Question("a", ("b", "c"), 0, "f:2"), Description(TURNS, "f:3", mr="m")]
    assert _digest(examples) == digest([[PLAIN, ""], ["a", ["b", "c"], 0, ""], [PLAIN, "", "m"]])


def test_digests_see_weights_calls_and_tools_and_not_what_is_left_out():
    plain = _digest([Chat(TURNS)])
    others = [
        (TURNS[0], Turn("assistant", "b", trained=False)),
        (TURNS[0], Turn("assistant", "b", extra="{}")),
    ]
    assert (
        len({plain, *(_digest([Chat(turns)]) for turns in others), _digest([Chat(TURNS, tools="[]")])}) == 4
    )
    assert _digest([Chat(TURNS, "f:9", dropped=TURNS)]) == plain


def scored_batch(rows=8, length=12):
    """Rows of 5 to 8 tokens with a loss, after prompts of other lengths."""
    rng = np.random.default_rng(0)
    mask = np.zeros((rows, length), np.float32)
    for n, start in enumerate(rng.integers(2, 5, rows)):
        mask[n, start : start + rng.integers(5, 8)] = 1
    return talk(rng.integers(0, 11, (rows, length)), mask, [1] * (rows - 1) + [0])


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "parts", "frozen"), [(4, 8, True), (None, 1, False)])
def test_chunks_and_the_head_at_scored_positions_give_the_loss_and_gradients_of_all(chunk, parts, frozen):
    model, batch = Llama(dataclasses.replace(SIZES, tie_word_embeddings=not frozen)), scored_batch()
    params = jax.jit(model.init)(jax.random.key(0), batch["input_ids"])["params"]
    counted = batch["loss_mask"] * batch["weight"][:, None]
    most = int(counted.reshape(parts, -1).sum(axis=1).max())

    def run(scored, chunk=chunk):
        loss_fn = TALK.loss_fn(model, chunk=chunk, label_smoothing=0.1, scored=scored, parts=parts)

        def mean(trained):
            (total, weight), _ = loss_fn({"params": params | trained}, batch, None)
            return total / weight

        trained = {name: x for name, x in params.items() if not frozen or name == "layers"}
        return jax.jit(jax.value_and_grad(mean))(trained)

    expected = run(None, None)  # with all logits at once
    for other in (run(most), run(None)) if chunk else (run(most + 3),):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), other, expected)
    if chunk:
        assert np.isnan(run(most - 1)[0])


@pytest.mark.slow
def test_flops_of_the_head_follow_the_scored_positions():
    devices, sizes = 8, dataclasses.replace(SIZES, vocab_size=4096)
    model, batch, mesh = Llama(sizes, unroll=True), scored_batch(16, 16), make_mesh(devices)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["input_ids"])

    def flops(scored):
        loss_fn = TALK.loss_fn(model, chunk=10**9, scored=scored and scored // devices, parts=devices)
        run = make_eval(loss_fn, mesh=mesh)
        compiled = run.lower({}, shapes, jax.device_put(batch, batch_sharding(mesh))).compile()
        # The head's product is local: nothing of the vocabulary or the hidden states moves.
        assert "all-gather" not in compiled.as_text()
        return devices * compiled.cost_analysis()["flops"]

    positions = 16 * 16
    head = flops(positions) - flops(8)
    per_position = 2 * sizes.hidden_size * sizes.vocab_size
    assert head == pytest.approx((positions - 8) * per_position, rel=0.35)
    assert (flops(128) - flops(64)) / 64 == pytest.approx(head / (positions - 8), rel=0.1)


@pytest.mark.parametrize("steps", [30, 10_001])
def test_no_batch_scores_more_positions_than_the_head_computes(steps):
    """Up to 10,000 batches by drawing them; beyond, by the rows that have most."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 12, 40)
    mask = np.zeros((40, 60), np.float32)
    for row, count in enumerate(counts):
        mask[row, 1 : count + 1] = 1
    ones = np.ones((40, 60), np.int32)
    columns = {"input_ids": ones, "segment_ids": ones, "loss_mask": mask}
    options: Any = types.SimpleNamespace(batch_size=8, accumulate=2, eval_batch_size=4)
    splits = {"train": columns, "validation": columns}
    data = TaskData(TALK, splits, dict.fromkeys(splits, 40), {}, {})
    plan = TALK.plan_batches(options, data, steps, (0,), make_mesh(2))
    drawn = [plan.batch(0, step)["loss_mask"].reshape(2, 2, 2, 60) for step in range(40)]
    most = int(max(batch.sum(axis=(1, 3)).max() for batch in drawn))
    assert most <= plan.scored.train
    assert plan.scored.train <= (most + 8 if steps == 30 else 24)


def test_the_constant_choice_is_the_position_that_is_most_often_right():
    train, test = (
        [Question("?", ("a", "b", "c"), n, "") for n in answers] for answers in ((0, 2, 2), (2, 0, 2, 1))
    )
    assert constant_choice(train, test) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        ("{% generation %}{{ m.content }}" + STOP + "{% endgeneration %}", 0),
        ("{% generation %}{{ m.content }}{% endgeneration %}" + STOP, 1),
    ],
)
def test_a_template_file_for_a_model_that_names_no_end_token(first_talk, tmp_path, answer, lines):
    model, template = shutil.copytree(first_talk.model, tmp_path / "model"), tmp_path / "own.jinja"
    names = json.loads((model / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    ask = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}" + STOP
    template.write_text(ask + "{% else %}" + answer + "{% endif %}{% endfor %}")
    settings = parse_settings(
        first_talk.config, ["--data.template", str(template), "--model.path", str(model)]
    )
    data = LanguageTask.load(settings.task_options, open_files(model))
    again = data.task.load_split(
        settings.task_options, open_files(model), "test", None
    )  # with the template that the task keeps
    np.testing.assert_array_equal(again.columns["loss_mask"], data.splits["test"]["loss_mask"])
    assert sum("does not teach the model to stop" in line for line in data.summary) == lines
