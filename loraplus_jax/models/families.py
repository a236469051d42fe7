"""The families of models, by the `model_type` in `config.json`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._utils.validation import check_choice
from ..step.sharding import Rules
from .bert import model as bert
from .bert.config import BertConfig
from .checkpoints.name_table import NameTable
from .config import Kind
from .decoder import CausalLM, Config
from .encoder import ForSequence
from .gpt2 import model as gpt2
from .gpt2.config import GPT2Config
from .llama import model as llama
from .llama.config import LlamaConfig
from .modernbert import model as modernbert
from .modernbert.config import ModernBertConfig


class Family(NamedTuple):
    """What belongs to a family of causal language models.

    Attributes:
      config: class of its configs, with `from_hf`.
      model: class of its models.
      name_table: makes the name table for a config.
      sharding: sharding rules of the parameters.
      prefix: prefix of all module names in a checkpoint except the head's.
    """

    config: type[Config]
    model: type[CausalLM]
    name_table: Callable[[Any], NameTable]
    sharding: Rules
    prefix: str


FAMILIES = (
    Family(LlamaConfig, llama.Llama, llama.name_table, llama.SHARDING, "model."),
    Family(GPT2Config, gpt2.GPT2, gpt2.name_table, gpt2.SHARDING, "transformer."),
)
KINDS: Mapping[str, Kind] = {name: kind for family in FAMILIES for name, kind in family.config.KINDS.items()}
"""What is the same in all models of a type."""
MODEL_TYPES = tuple(KINDS)
FUSED_TYPES = tuple(name for name, kind in KINDS.items() if kind.fused)
"""The model types with fused projections, which `split_fused` splits."""


def family_of(model_type: str) -> Family:
    """The family of a model type, which must be one of `MODEL_TYPES`."""
    return next(family for family in FAMILIES if model_type in family.config.KINDS)


class EncoderClass(NamedTuple):
    """The classes of an encoder's type in transformers.

    Attributes:
      name: how the names of the classes begin.
      prefix: what precedes the names of the encoder's modules in the class with a head for sequences.
      heads: our path, and the name in that class, of modules that a checkpoint lacks.
    """

    name: str
    prefix: str
    heads: tuple[tuple[str, str], ...] = (("head", "classifier"),)


class EncoderFamily(NamedTuple):
    """What belongs to a family of encoders.

    Attributes:
      config: class of its configs, with `from_hf`.
      model: class of its models with a head.
      name_table: makes the name table for a config and a pooling.
      sharding: sharding rules of the parameters.
      classes: the classes of each model type in transformers.
    """

    config: type[BertConfig] | type[ModernBertConfig]
    model: type[ForSequence]
    name_table: Callable[..., NameTable]
    sharding: Rules
    classes: Mapping[str, EncoderClass]


# In transformers, BERT's head follows the pooler and RoBERTa's contains a layer like a pooler.
_ROBERTA_HEADS = (("pooler", "classifier.dense"), ("head", "classifier.out_proj"))
_BERTS = {
    "bert": EncoderClass("Bert", "bert."),
    "roberta": EncoderClass("Roberta", "roberta.", _ROBERTA_HEADS),
    "xlm-roberta": EncoderClass("XLMRoberta", "roberta.", _ROBERTA_HEADS),
}
_MODERNBERTS = {"modernbert": EncoderClass("ModernBert", "model.")}
ENCODERS = (
    EncoderFamily(BertConfig, bert.BertForSequence, bert.name_table, bert.SHARDING, _BERTS),
    EncoderFamily(
        ModernBertConfig,
        modernbert.ModernBertForSequence,
        modernbert.name_table,
        modernbert.SHARDING,
        _MODERNBERTS,
    ),
)
PREFIXES = tuple(
    dict.fromkeys(
        [*(family.prefix for family in FAMILIES), *(c.prefix for f in ENCODERS for c in f.classes.values())]
    )
)
"""What transformers puts before the names of modules in models with a head, and not in those without."""
ENCODER_TYPES = tuple(name for family in ENCODERS for name in family.classes)


def encoder_of(model_type: Any) -> EncoderFamily:
    """The family of an encoder's model type.

    Raises:
      ValueError: it is of no encoder.
    """
    try:
        check_choice("model_type", model_type, ENCODER_TYPES)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.json: {error}") from None
    return next(family for family in ENCODERS if model_type in family.classes)
