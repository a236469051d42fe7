"""The transformers class of a model, and the names of its modules there, from the model's name table."""

import re
from typing import Any, NamedTuple

from ...interop.path_map import PathMap
from ..decoder import Config
from ..encoder import Pooling
from ..families import KINDS, encoder_of, family_of
from .name_table import NameTable

_HEADS = ("lm_head", "classifier", "head")


class TransformersClass(NamedTuple):
    """The transformers class that loads a model.

    Attributes:
      architecture: name of the class; empty if transformers has none.
      prefix: prefix of all module names except the heads'.
      heads: (our path, its name) of modules that the name table lacks or names differently.
      task_type: PEFT's task type.
      tied: our modules whose embedding is also the output head.
    """

    architecture: str
    prefix: str
    heads: tuple[tuple[str, str], ...]
    task_type: str | None
    tied: tuple[str, ...] = ()


def causal_lm_class(config: Config) -> TransformersClass:
    """The class of a language model."""
    tied = ("embed_tokens",) if config.tie_word_embeddings else ()
    family = family_of(config.model_type)
    return TransformersClass(KINDS[config.model_type].architecture, family.prefix, (), "CAUSAL_LM", tied)


def encoder_class(config: Any, pooling: Pooling) -> TransformersClass:
    """The class of an encoder with a head: for sequences if transformers has the same head, else the bare encoder.

    transformers has no class with mean pooling alone or the bare first token.
    """
    name, prefix, heads = encoder_of(config.model_type).classes[config.model_type]
    if pooling != "pooler":
        return TransformersClass(f"{name}Model", "", (), "FEATURE_EXTRACTION")
    return TransformersClass(f"{name}ForSequenceClassification", prefix, heads, "SEQ_CLS")


def path_map(table: NameTable, form: TransformersClass, *, prefix: str | None = None) -> PathMap:
    """Maps a model's modules to those of its transformers class.

    Args:
      table: the model's name table.
      form: the class.
      prefix: replaces the class's prefix, for adapters of the model without its head.
    """
    rules: dict[tuple[str, str], tuple[str, str] | tuple[str, str, str]] = {
        (ours, theirs): (ours, theirs) for ours, theirs in form.heads
    }
    head_modules = {ours for ours, _ in form.heads}
    prefix = form.prefix if prefix is None else prefix
    conv1d = {rule.path.rpartition("/")[0] for rule in table.rules if rule.is_conv1d}
    for rule in table.rules:
        (ours, _, leaf), name = rule.path.rpartition("/"), rule.name.rpartition(".")[0]
        theirs = name if name.split(".")[0] in _HEADS else prefix + name
        if rule.parameter is not None:
            theirs = prefix + rule.parameter
            rules[ours, theirs] = (ours, theirs, "Parameter")
        elif leaf == "embedding":
            rules[ours, theirs] = (ours, theirs, "TiedEmbedding" if ours in form.tied else "Embedding")
        elif ours not in head_modules:
            if rule.part is not None:
                theirs += "[{}:{} of {}]".format(*rule.part)
            rules[ours, theirs] = (ours, theirs, "Conv1D") if ours in conv1d else (ours, theirs)
    rules |= {(ours, "lm_head"): (ours, "lm_head", "TiedHead") for ours in form.tied}
    return tuple(rules.values())


def parameter_rules(table: NameTable) -> dict[str, str]:
    """The kernels of experts, which no layer owns, as `target_parameters`."""
    return {re.escape(r.path): "le"[: r.stacked] + "io" for r in table.rules if r.stacked > 1}
