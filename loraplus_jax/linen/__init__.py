"""Adapters on Flax Linen models, without changing their code, and layers with a built-in adapter."""

# Eager: some functions have their module's name, and a later import of the module would take it from them.
from ..adapter.quantize_base import quantize_base
from .from_qwix import from_qwix
from .layers import (
    LoRAPlusConv,
    LoRAPlusDense,
    LoRAPlusDenseGeneral,
    LoRAPlusEinsum,
    LoRAPlusEmbed,
    LoRAPlusMultiHeadDotProductAttention,
)
from .wrap import LoRAPlusModel, apply_lora_plus, init_lora

__all__ = [
    "LoRAPlusConv",
    "LoRAPlusDense",
    "LoRAPlusDenseGeneral",
    "LoRAPlusEinsum",
    "LoRAPlusEmbed",
    "LoRAPlusModel",
    "LoRAPlusMultiHeadDotProductAttention",
    "apply_lora_plus",
    "from_qwix",
    "init_lora",
    "quantize_base",
]
