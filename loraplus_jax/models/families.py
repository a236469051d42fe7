"""The families of causal language models, by the `model_type` in `config.json`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..step.sharding import Rules
from .checkpoints.name_table import NameTable
from .config import Kind
from .decoder import CausalLM, Config
from .gpt2 import model as gpt2
from .gpt2.config import GPT2Config
from .llama import model as llama
from .llama.config import LlamaConfig


class Family(NamedTuple):
    """What belongs to a family.

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
