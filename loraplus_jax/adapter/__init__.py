"""What an adapter is: its config, the table of adapted weights, trees of variables, the low-rank term, merging."""

# Eager: some functions have their module's name, and a later import of the module would take it from them.
from .adapter_stack import (
    AdapterStack,
    RowAdapters,
    apply_rows,
    put_adapter,
    select_adapters,
    stack_adapters,
)
from .config import LoRAPlusConfig
from .dora import set_magnitudes
from .lora import disabled, scale_variables, weight_delta
from .merge import merge, unmerge
from .spec import AdapterSpec, Specs, specs_from_json, specs_to_json
from .tree import combine, count, flatten, split_trainable, unflatten

__all__ = [
    "AdapterSpec",
    "AdapterStack",
    "LoRAPlusConfig",
    "RowAdapters",
    "Specs",
    "apply_rows",
    "combine",
    "count",
    "disabled",
    "flatten",
    "merge",
    "put_adapter",
    "scale_variables",
    "select_adapters",
    "set_magnitudes",
    "specs_from_json",
    "specs_to_json",
    "split_trainable",
    "stack_adapters",
    "unflatten",
    "unmerge",
    "weight_delta",
]
