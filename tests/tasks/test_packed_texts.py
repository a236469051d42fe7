"""Several texts in a row give what one text in a row gives: loss, gradients, training and predictions."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loraplus_jax.adapter.config import LoRAPlusConfig
from loraplus_jax.adapter.tree import combine, split_trainable
from loraplus_jax.data.batches import eval_batches, first_batches, train_batches
from loraplus_jax.data.packed_rows import ragged
from loraplus_jax.data.text_rows import TextRows, text_lengths
from loraplus_jax.linen.wrap import apply_lora_plus, init_lora
from loraplus_jax.models.families import encoder_of
from loraplus_jax.step.sharding import batch_sharding, make_mesh
from loraplus_jax.step.train_step import init_state, jit_step, make_eval
from loraplus_jax.tasks.encoder import EncoderTask, apply_model
from loraplus_jax.training.evaluation import evaluate, finish_metrics

from .. import tiny

pytestmark = pytest.mark.slow

MAX_LENGTH, PAD = 16, 1


def texts(count, seed=0, longest=MAX_LENGTH):
    """Pairs of texts, the first of a single token, the second of the most."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    lengths[:2] = 1, longest
    return {
        "input_ids": ragged(rng.integers(2, 40, length, np.int32) for length in lengths),
        "token_type_ids": ragged((np.arange(t) >= t // 2).astype(np.int32) for t in lengths),
        "label": rng.integers(0, 3, count).astype(np.int32),
    }


def padded(data):
    """Each text in a row of its own, of MAX_LENGTH tokens."""
    shape = (len(data["label"]), MAX_LENGTH)
    rows = {"input_ids": np.full(shape, PAD, np.int32), "attention_mask": np.zeros(shape, np.int32)}
    rows |= {"token_type_ids": np.zeros(shape, np.int32), "label": data["label"]}
    for n, ids in enumerate(data["input_ids"]):
        rows["input_ids"][n, : len(ids)], rows["attention_mask"][n, : len(ids)] = ids, 1
        rows["token_type_ids"][n, : len(ids)] = data["token_type_ids"][n]
    return rows


class Subject:
    """A small encoder with adapters, its loss and its data."""

    def __init__(self, kind, pooling, count=37, *, fields=MappingProxyType({}), **sizes):
        sizes |= {"max_position_embeddings": MAX_LENGTH + PAD + 1, "pad_token_id": PAD}
        family = encoder_of(kind)
        config = family.config.from_hf(tiny.config(kind, **sizes)).with_dropout(0.0)
        model = family.model(config, 3, pooling, head_dropout=0.0, **fields)
        self.data = texts(count)
        self.padded = padded(self.data)
        inputs = [jnp.asarray(self.padded[name][:1]) for name in list(self.padded)[:3]]
        shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)
        adapters = LoRAPlusConfig(
            target_modules=["query", "value"], rank=2, init="gaussian", modules_to_save=["head"]
        )
        self.model = apply_lora_plus(model, adapters)
        lora, _ = init_lora(self.model, jax.random.key(1), *inputs, base={"params": params})
        self.trainable, self.frozen = split_trainable({"params": params, "lora": lora}, adapters)
        self.task = EncoderTask(kind="classification", names=("a", "b", "c"))
        self.loss = self.task.loss_fn(self.model)
        lengths = text_lengths(self.data)
        batches = first_batches(count, batch_size=8, seeds=[0], count=count // 8)
        self.rows = TextRows.for_batches(lengths, batches, MAX_LENGTH, 1)

    def batch(self, data, **arrange):
        return train_batches(data, batch_size=8, **arrange)(0, 0)


@pytest.fixture(scope="module", params=[("roberta", "cls"), ("modernbert", "pooler")], ids=str)
def subject(request):
    return Subject(*request.param)


def close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected
    )


def test_loss_and_gradients_are_those_of_padded_texts(subject):
    @jax.jit
    def value_and_gradient(trainable, batch):
        (total, weight), metrics = subject.loss(combine(trainable, subject.frozen), batch, None)
        return total, (weight, metrics)

    run = jax.jit(jax.value_and_grad(value_and_gradient, has_aux=True))
    packed = subject.batch(subject.data, arrange=subject.rows.arrange)
    alone = subject.batch(subject.padded)
    assert len(packed["weight"]) < 8
    close(run(subject.trainable, packed), run(subject.trainable, alone))


def test_predictions_and_metrics_are_those_of_padded_texts(subject):
    rows, places = subject.rows.arrange_all(subject.data)
    variables = combine(subject.trainable, subject.frozen)
    run = jax.jit(lambda batch: apply_model(subject.model, variables, batch))
    # Their last batch is short.
    outputs = [np.concatenate([run(batch) for batch in eval_batches(x, 8)]) for x in (rows, subject.padded)]
    close(outputs[0][places[:, 0], places[:, 1]], outputs[1][: len(places)])
    fn = make_eval(subject.task.loss_fn(subject.model, keep_rows=True))
    found = [
        finish_metrics(subject.task, evaluate(fn, subject.trainable, subject.frozen, x, 8, make_mesh(1)))
        for x in (rows, subject.padded)
    ]
    close(*found)
    assert found[0]["accuracy"] > 0


def test_eight_devices_train_as_one_does():
    it, tx, mesh = Subject("roberta", "mean", 70), optax.sgd(0.1), make_mesh(8)
    batches, lengths = first_batches(70, batch_size=32, seeds=[0], count=2), text_lengths(it.data)

    def arranged(parts):
        return TextRows.for_batches(lengths, batches, MAX_LENGTH, parts).arrange(it.data, batches[0])

    def state():
        return init_state(it.trainable, tx, jax.random.key(0))

    one, batch = jit_step(it.loss, tx)(state(), it.frozen, arranged(1)), arranged(16)
    step = jit_step(it.loss, tx, mesh=mesh, accumulate=2)
    many = step(state(), it.frozen, jax.device_put(batch, batch_sharding(mesh)))
    close((many[0].trainable, many[1]), (one[0].trainable, one[1]))


def test_flops_follow_the_tokens_of_text():
    # XLA counts the body of a loop once, so there is none.
    it = Subject("bert", "mean", fields={"unroll": True}, hidden_size=64, intermediate_size=256)
    devices, mesh, tx = 8, make_mesh(8), optax.sgd(0.1)
    step, state = jit_step(it.loss, tx, mesh=mesh), init_state(it.trainable, tx, jax.random.key(0))

    def flops_per_token(longest):
        data = texts(2048, longest=longest)
        lengths = text_lengths(data)
        batches = first_batches(2048, batch_size=512, seeds=[0], count=4, lengths=lengths)
        rows = TextRows.for_batches(lengths, batches, MAX_LENGTH, devices)
        batch = jax.device_put(rows.arrange(data, batches[0]), batch_sharding(mesh))
        work = step.lower(state, it.frozen, batch).compile().cost_analysis()["flops"]
        return devices * work / lengths[batches].sum() * len(batches)

    per_token = [flops_per_token(longest) for longest in (8, 16)]
    assert max(per_token) < 1.1 * min(per_token)
