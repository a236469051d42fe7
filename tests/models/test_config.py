"""What the configs of all families read and reject, by the example of BERT's."""

import json

import numpy as np
import pytest

from loraplus_jax.models.bert.config import BertConfig

from ..messages import mentions
from .golden import GOLDEN


def hf_config(**changes):
    config = json.loads(str(np.load(GOLDEN / "bert.npz")["config"]))
    return {key: value for key, value in (config | changes).items() if value != "absent"}


def test_config_reads_what_transformers_writes():
    config = BertConfig.from_hf(hf_config(position_embedding_type="absolute", layer_norm_eps=1e-5))
    assert (config.hidden_size, config.num_hidden_layers, config.layer_norm_eps) == (32, 3, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, mentions("model_type", "'gpt2'", "bert", "roberta", "xlm-roberta")),
        ({"model_type": "absent"}, mentions("model_type", None)),
        (
            {"position_embedding_type": "relative_key"},
            mentions("position_embedding_type", "'relative_key'", "'absolute'"),
        ),
        ({"is_decoder": True}, mentions("is_decoder", True)),
        ({"quantization_config": {"bits": 4}}, mentions("quantization_config", "bits")),
        ({"hidden_act": "mish"}, mentions("hidden_act", "gelu", "gelu_new", "'mish'")),
        ({"hidden_size": "absent", "vocab_size": None}, mentions("vocab_size", "hidden_size", "missing")),
        ({"num_attention_heads": 5}, mentions("num_attention_heads", "hidden_size", 5, 32)),
        ({"num_hidden_layers": 0}, mentions("num_hidden_layers", 1, 0)),
        ({"hidden_size": "32"}, mentions("hidden_size", 1, "'32'")),
        ({"hidden_dropout_prob": 1.0}, mentions("hidden_dropout_prob", 0, 1, 1.0)),
    ],
)
def test_unsupported_configs_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        BertConfig.from_hf(hf_config(**changes))
