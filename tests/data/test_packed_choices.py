"""Choices in packed rows, scored by a language model, have the log-likelihoods of each alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.data.batches import eval_batches
from loraplus_jax.data.multiple_choice import Question, encode_choices, pack_choices, tokenize_choices
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama
from loraplus_jax.tasks.causal_lm import LanguageTask
from loraplus_jax.training.evaluation import join_rows

from .. import tiny
from .chats import template

CHOICE = LanguageTask(kind="multiple_choice")


@pytest.mark.slow
def test_packed_choices_have_the_log_likelihoods_of_each_alone(tokenizer):
    """Of a language model, with all logits and with those of scored positions; two parts of rows."""
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 1}
    model, rng = Llama(LlamaConfig.from_hf(tiny.config(**sizes))), np.random.default_rng(1)
    prompts = ["x" * 60, *(str(10**n) for n in range(8))]
    choices = ("the answer is a", "the answer is b", "no")
    questions = [Question(prompt, choices, n % 3) for n, prompt in enumerate(prompts)]
    sequences = encode_choices(questions, tokenizer, template(), 128)
    assert len(sequences.choices) < 2 * len(questions) + 1  # two of three share their tokens
    (columns,) = pack_choices([sequences], 128)
    assert len(columns["end"]) < len(sequences.choices) / 2
    (batch,) = eval_batches(columns, 2 * (1 + len(columns["end"]) // 2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["input_ids"][:1])
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    alone = []
    logits = jax.jit(lambda ids: jax.nn.log_softmax(model.apply(variables, ids)))
    for tokens in tokenize_choices(questions, tokenizer, template()):
        for ids, first in tokens:
            found = logits(jnp.array(ids[None]))[0, np.arange(first - 1, len(ids) - 1), ids[first:]]
            alone.append(float(found.sum()))
    for chunk, scored in ((8, None), (8, 40), (None, None)):
        loss, rows = jax.jit(CHOICE.choice_fn(model, chunk=chunk, scored=scored, parts=2))(
            variables, batch, None
        )
        values = join_rows([rows])
        order = np.lexsort((values["choice"], values["question"]))
        np.testing.assert_allclose(values["log_likelihood"][order], alone, rtol=1e-5)
        right = np.reshape(alone, (9, 3))[np.arange(9), np.arange(9) % 3]
        assert float(loss[0]) == pytest.approx(-right.sum(), rel=1e-5)
