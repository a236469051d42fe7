"""What the configs of all families read and reject, by the example of BERT's."""

import dataclasses
import json

import numpy as np
import pytest

from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.modernbert.config import ModernBertConfig

from .. import tiny
from ..messages import mentions
from ..refusals import refusals
from .golden import GOLDEN


def hf_config(**changes):
    config = json.loads(str(np.load(GOLDEN / "bert.npz")["config"]))
    return {key: value for key, value in (config | changes).items() if value != "absent"}


def test_config_reads_what_transformers_writes():
    config = BertConfig.from_hf(hf_config(position_embedding_type="absolute", layer_norm_eps=1e-5))
    assert (config.hidden_size, config.num_hidden_layers, config.layer_norm_eps) == (32, 3, 1e-5)
    with pytest.raises(ValueError, match=mentions("model_type", "'bert'", "'gpt2'")):
        dataclasses.replace(config, model_type="gpt2")


def bert(**changes):
    return lambda: BertConfig.from_hf(hf_config(**changes))


def modernbert(**changes):
    return lambda: ModernBertConfig.from_hf(tiny.config("modernbert", **changes))


LINEAR = {"full_attention": {"rope_type": "linear", "factor": 2.0}}
test_unsupported_modernberts = refusals(
    (modernbert(model_type="bert"), "model_type", "'bert'", "modernbert"),
    (
        modernbert(rope_parameters=LINEAR, norm_bias=1, quantization_config={"bits": 4}),
        *("rope_parameters", "full_attention", "linear", "norm_bias", "quantization_config"),
    ),
    (modernbert(layer_types=["full_attention"]), "layer_types", 2, 1),
    (modernbert(num_attention_heads=16), "num_attention_heads", "even", 16),
    (modernbert(classifier_pooling="max"), "classifier_pooling", "'cls'", "'mean'", "'max'"),
)


def test_a_modernbert_of_transformers_4_and_of_5_are_the_same():
    older = {"global_attn_every_n_layers": 3, "global_rope_theta": 16e4, "local_rope_theta": 1e4}
    newer = {"layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {}}
    for kind, theta in (("full_attention", 16e4), ("sliding_attention", 1e4)):
        newer["rope_parameters"][kind] = {"rope_type": "default", "rope_theta": theta}
    configs = [modernbert(**changes)() for changes in (older, newer, {})]
    assert configs[0] == configs[1] == configs[2]
    other = modernbert(**newer | {"rope_parameters": {"full_attention": {"rope_theta": 8e4}}})()
    assert other.rope_thetas == (8e4, 1e4)


test_unsupported_configs = refusals(
    (bert(model_type="gpt2"), "model_type", "'gpt2'", "bert", "roberta", "xlm-roberta"),
    (bert(model_type="absent"), "model_type", None),
    (bert(position_embedding_type="relative_key"), "position_embedding_type", "'relative_key'", "'absolute'"),
    (bert(is_decoder=True), "is_decoder", True),
    (bert(quantization_config={"bits": 4}), "quantization_config", "bits"),
    (bert(hidden_act="mish"), "hidden_act", "gelu", "gelu_new", "'mish'"),
    (bert(hidden_size="absent", vocab_size=None), "vocab_size", "hidden_size", "missing"),
    (bert(num_attention_heads=5), "num_attention_heads", "hidden_size", 5, 32),
    (bert(num_hidden_layers=0), "num_hidden_layers", 1, 0),
    (bert(hidden_size="32"), "hidden_size", "integer", "'32'"),
    (bert(hidden_dropout_prob=1.0), "hidden_dropout_prob", "less than 1", 1.0),
)
