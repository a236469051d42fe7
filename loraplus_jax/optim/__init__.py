"""Optimizers: LoRA+ as an optax transform, schedules, diagnostics; one file a further method."""

# Eager: some functions have their module's name, and a later import of the module would take it from them.
from .adalora import adalora
from .diagnostics import describe, probe
from .find_pairs import factor_pairs
from .keep_float32 import keep_float32
from .lora_muon import lora_muon, scale_by_lora_muon
from .lora_plus import lora_plus, lora_plus_adamw
from .lora_rite import lora_rite, scale_by_lora_rite
from .riemannian import scale_by_riemannian
from .roles import label_params
from .schedules import make_schedule
from .trained_ranks import final_ranks, prune

__all__ = [
    "adalora",
    "describe",
    "factor_pairs",
    "final_ranks",
    "keep_float32",
    "label_params",
    "lora_muon",
    "lora_plus",
    "lora_plus_adamw",
    "lora_rite",
    "make_schedule",
    "probe",
    "prune",
    "scale_by_lora_muon",
    "scale_by_lora_rite",
    "scale_by_riemannian",
]
