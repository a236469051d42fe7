"""What the configs of all families read and reject, by the example of BERT's."""

import dataclasses
import json

import numpy as np
import pytest

from loraplus_jax.models.bert.config import BertConfig

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
