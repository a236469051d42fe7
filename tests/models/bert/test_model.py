import dataclasses
import os
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.data.fetch import ASSETS, cache_dir
from loraplus_jax.models.bert import model as bert
from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.bert.model import BertEncoder, BertForSequence, name_table
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.files import open_files

from ... import tiny
from ...marks import slow
from ...refusals import refusals
from ..golden import GOLDEN, write_golden

FETCHED = cache_dir() / ASSETS["minilm"].directory / ASSETS["minilm"].path
MINILM = Path(os.environ.get("LORAPLUS_MINILM", FETCHED))
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TINY = BertConfig.from_hf(tiny.config("bert", vocab_size=50, num_hidden_layers=3, max_position_embeddings=12))
IDS = jnp.array([[5, 6, 7, 8, 9], [10, 11, 0, 0, 0]], jnp.int32)
MASK = (IDS != 0).astype(jnp.int32)
ENCODER = BertEncoder(TINY)


def load_model(directory, pooling="pooler"):
    config = BertConfig.from_hf(open_files(directory).config)
    model = BertForSequence(config, 2, pooling)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS, MASK)["params"]
    return model, load_params(open_files(directory), name_table(config, pooling), shapes, new=("head",))


@partial(jax.jit, static_argnums=0, static_argnames="method")
def run(model, params, *inputs, rngs=None, method=None):
    """Compiled once for each model and shape, over all tests."""
    return model.apply({"params": params}, *inputs, rngs=rngs, method=method)


def encoded(model, params, golden):
    return run(model, params, *(golden[key] for key in INPUTS if key in golden), method="encode")


@pytest.fixture(scope="module")
def tiny():
    """Parameters far from the initial ones, so that no term hides behind a zero bias."""
    shapes = jax.eval_shape(BertForSequence(TINY, 3).init, jax.random.key(0), IDS, MASK)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def outputs(params, ids=IDS, mask=MASK, config=TINY, rngs=None, **fields):
    return run(BertForSequence(config, 3, **fields), params, ids, mask, rngs=rngs)


@pytest.mark.parametrize(("name", "pooling"), [("bert", "pooler"), slow("roberta", "mean")])
def test_tiny_models_equal_transformers(name, pooling, tmp_path):
    golden, (model, params) = write_golden(name, tmp_path), load_model(tmp_path, pooling)
    tokens = golden["attention_mask"] > 0
    hidden = encoded(model, params, golden)
    np.testing.assert_allclose(hidden[tokens], golden["hidden"][tokens], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_pooler_equals_transformers(tmp_path):
    golden, (model, params) = write_golden("bert", tmp_path), load_model(tmp_path)
    head = {"kernel": jnp.eye(TINY.hidden_size * 2), "bias": jnp.zeros(TINY.hidden_size * 2)}
    model = model.clone(num_outputs=TINY.hidden_size * 2)
    pooled = run(model, params | {"head": head}, *(golden[key] for key in INPUTS))
    np.testing.assert_allclose(pooled, golden["pooled"], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not MINILM.is_dir(), reason="no MiniLM: loraplus fetch minilm")
def test_minilm_equals_transformers():
    with np.load(GOLDEN / "minilm.npz") as file:
        golden = dict(file)
    model, params = load_model(MINILM, "mean")
    tokens = golden["attention_mask"] > 0
    hidden = encoded(model, params, golden)
    np.testing.assert_allclose(hidden[tokens], golden["hidden"][tokens], atol=1e-4, rtol=0)


def test_param_tree_is_nested_dicts_with_stacked_layers(tiny):
    kernels = {
        "/".join(k.key for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(tiny)[0]
        if path[-1].key == "kernel"
    }
    assert kernels == {
        "encoder/layers/attention/query/kernel": (3, 16, 16),
        "encoder/layers/attention/key/kernel": (3, 16, 16),
        "encoder/layers/attention/value/kernel": (3, 16, 16),
        "encoder/layers/attention/out/kernel": (3, 16, 16),
        "encoder/layers/mlp/up/kernel": (3, 16, 24),
        "encoder/layers/mlp/down/kernel": (3, 24, 16),
        "head/kernel": (16, 3),
    }


@pytest.mark.slow
def test_unrolled_equals_scanned_on_the_same_tree(tiny):
    def shapes(unroll):
        return jax.eval_shape(BertForSequence(TINY, 3, unroll=unroll).init, jax.random.key(0), IDS, MASK)

    assert shapes(True) == shapes(False)
    np.testing.assert_allclose(outputs(tiny, unroll=True), outputs(tiny, unroll=False), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "unrolled"), [("cpu", 3), ("gpu", 1), ("tpu", 1)])
def test_the_loop_is_unrolled_by_default_on_cpus_only(tiny, platform, unrolled, monkeypatch):
    monkeypatch.setattr(bert, "target_platform", lambda: platform)
    program = jax.make_jaxpr(lambda p: BertForSequence(TINY, 3).apply({"params": p}, IDS, MASK))(tiny)
    (loop,) = (eqn for eqn in program.eqns if eqn.primitive.name == "scan")
    assert loop.params["unroll"] == unrolled


@pytest.mark.slow
def test_padding_does_not_change_the_tokens(tiny):
    alone = outputs(tiny, IDS[1:, :2], MASK[1:, :2])
    np.testing.assert_allclose(outputs(tiny)[1:], alone, atol=1e-5)
    other_padding = outputs(tiny, jnp.where(MASK == 0, 33, IDS))
    np.testing.assert_allclose(other_padding, outputs(tiny), atol=1e-5)
    np.testing.assert_array_equal(outputs(tiny, mask=MASK.astype(bool)), outputs(tiny))


@pytest.mark.slow
def test_roberta_counts_positions_from_the_padding_id():
    roberta = dataclasses.replace(TINY, model_type="roberta", pad_token_id=1)
    ids = jnp.array([[1, 7, 8, 1, 9, 1]])
    positions = bert._positions(roberta, ids, jnp.array([[0, 1, 1, 0, 1, 0]]))
    np.testing.assert_array_equal(positions, [[1, 2, 3, 1, 4, 1]])
    packed = bert._positions(roberta, ids, jnp.array([[1, 1, 2, 2, 3, 0]]))
    np.testing.assert_array_equal(packed, [[1, 2, 2, 1, 2, 1]])
    assert roberta.max_length == 10


@pytest.mark.slow
def test_a_row_of_padding_alone_is_finite_and_so_is_its_gradient(tiny):
    mask = MASK.at[1].set(0)
    rngs = {"dropout": jax.random.key(0)}

    @jax.jit
    def run(params):
        dropped = lambda p: outputs(p, mask=mask, pooling="cls", rngs=rngs).sum()  # noqa: E731
        return jax.value_and_grad(dropped)(params), outputs(params, mask=mask)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(tiny)))


@pytest.mark.slow
def test_bf16_runs_near_float32_with_a_float32_head(tiny):
    model = BertForSequence(TINY, 3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS, MASK)["params"]
    low = jax.tree.map(lambda shape, leaf: leaf.astype(shape.dtype), shapes, tiny)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes["encoder"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes["head"])} == {"float32"}
    assert run(model, low, IDS, MASK, method="encode").dtype == jnp.bfloat16
    result = run(model, low, IDS, MASK)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, outputs(tiny), atol=0.1)


@pytest.mark.parametrize("given", [True, False])
def test_dropout_acts_everywhere_that_bert_has_it(tiny, given):
    seen = set()

    def record(call, args, kwargs, context):
        if isinstance(drop := context.module, nn.Dropout):
            off = kwargs.get("deterministic", drop.deterministic)
            seen.add(("/".join(drop.path), drop.rate, not off))
        return call(*args, **kwargs)

    config = dataclasses.replace(TINY, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    rngs = {"dropout": jax.random.key(0)} if given else {}
    model = BertForSequence(config, 3, head_dropout=0.4)
    with nn.intercept_methods(record):
        jax.eval_shape(lambda p: model.apply({"params": p}, IDS, MASK, rngs=rngs), tiny)
    places = {
        ("encoder/embeddings/Dropout_0", 0.2, given),
        ("encoder/layers/Dropout_0", 0.2, given),
        ("encoder/layers/Dropout_1", 0.2, given),
        ("dropout", 0.4, given),
    }
    assert seen == places | ({("encoder/layers/attention/Dropout_0", 0.3, True)} if given else set())


def starting(*inputs, model=ENCODER):
    return lambda: jax.eval_shape(model.init, jax.random.key(0), *inputs)


test_wrong_inputs_and_options = refusals(
    (starting(jnp.zeros((1, 13), int), jnp.ones((1, 13))), "13 tokens", 12),
    (starting(jnp.zeros(4, int), jnp.ones(4)), "(batch, tokens)", "(4,)"),
    (starting(IDS, MASK[:, :3]), "attention_mask", "(2, 3)", "input_ids", "(2, 5)"),
    (starting(IDS, MASK, IDS[:1]), "token_type_ids", "(1, 5)", "(2, 5)"),
    (starting(IDS, MASK, model=BertForSequence(TINY, 2, "max")), "pooling", "mean", "cls", "pooler", "'max'"),
    (lambda: name_table(TINY, "max"), "pooling", "'max'"),
)
