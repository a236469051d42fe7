"""ModernBERT's windows and pooler; `tests/reference` compares it with transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax.models.encoder import masked_mean
from loraplus_jax.models.modernbert.config import ModernBertConfig
from loraplus_jax.models.modernbert.model import ModernBertForSequence

from .. import tiny

# Of its two layers the second has a window of two tokens on either side.
CONFIG = ModernBertConfig.from_hf(tiny.config("modernbert"))
IDS, MASK = jnp.arange(3, 15)[None], jnp.ones((1, 12), jnp.int32)


def run(config, ids=IDS, pooling="mean", method=None):
    model = ModernBertForSequence(config, 3, pooling)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, MASK)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)
    return jax.jit(model.apply, static_argnames="method")(variables, ids, MASK, method=method)


def test_only_full_attention_sees_beyond_the_window():
    changed = IDS.at[0, 11].set(30)
    for kind, differs in (("sliding_attention", False), ("full_attention", True)):
        config = ModernBertConfig.from_hf(tiny.config("modernbert", layer_types=[kind] * 2))
        first, second = (run(config, ids, method="encode")[0] for ids in (IDS, changed))
        # Two layers with a window reach four tokens.
        assert (np.abs(first - second).max(axis=-1)[:7] > 0).all() == differs
        assert (np.abs(first - second).max(axis=-1)[7:] > 0).all()


@pytest.mark.slow
def test_the_pooler_takes_what_the_config_says():
    mean = ModernBertConfig.from_hf(tiny.config("modernbert", classifier_pooling="mean"))
    assert np.abs(run(CONFIG, pooling="pooler") - run(mean, pooling="pooler")).max() > 1e-3
    assert masked_mean(jnp.ones((1, 2, 3)), jnp.array([[1, 0]])).tolist() == [[1.0, 1.0, 1.0]]
