"""LoRA+ for existing Flax NNX models, imported by name: `from loraplus_jax.nnx import apply_lora_plus`."""

from .adapt import apply_lora_plus
from .adapted_module import remove_adapters
from .check_reads import check_reads
from .foreign_adapters import specs_of
from .quantize import from_qwix, quantize_base
from .variables import base_variables, disabled, functional, lora_tree, merge, set_lora, unmerge

__all__ = [
    "apply_lora_plus",
    "base_variables",
    "check_reads",
    "disabled",
    "from_qwix",
    "functional",
    "lora_tree",
    "merge",
    "quantize_base",
    "remove_adapters",
    "set_lora",
    "specs_of",
    "unmerge",
]
