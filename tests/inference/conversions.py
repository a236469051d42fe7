"""What the tests of conversions share: a tiny base, adapters of other libraries for it, and PEFT's own."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from ..integration.language_world import write_model
from ..interop.library_trees import LIBRARIES, openpi_base

BIG = 0.05
"""What an adapter changes outputs by, at least, relative to the largest: else a check would prove nothing."""


def write_base(directory, **changes):
    """A tiny Llama, or with `changes` another model; tunix computes with no other rope_theta."""
    directory.mkdir(parents=True)
    write_model(directory, **{"rope_theta": 1e6} | changes)
    return directory


def write_openpi_base(directory):
    directory.mkdir(parents=True)
    save_file(openpi_base(np.random.default_rng(7)), directory / "model.safetensors")
    (directory / "config.json").write_text(
        json.dumps({"paligemma_variant": "gemma_2b_lora", "dtype": "float32"})
    )
    return directory


def write_library(name, path):
    """A library's factors as a safetensors file; returns the changes by module, and the flags for `convert`."""
    tree, changes = LIBRARIES[name].make(np.random.default_rng(1))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: np.ascontiguousarray(value) for key, value in tree.items()}, path)
    return changes, LIBRARIES[name].options


def write_peft(directory, modules, base, *, rank=2, alpha=3.0, dora=False, prefix="", **options):
    """A directory as PEFT writes it, with random factors for modules {name: (out, in)}."""
    rng, tensors = np.random.default_rng(5), {}
    for name, (outer, inner) in modules.items():
        r = options.get("rank_pattern", {}).get(name.rpartition(".")[2], rank)
        start = f"base_model.model.{prefix}{name}"
        tensors[f"{start}.lora_A.weight"] = 0.3 * rng.normal(size=(r, inner))
        tensors[f"{start}.lora_B.weight"] = 0.3 * rng.normal(size=(outer, r))
        if dora:
            tensors[f"{start}.lora_magnitude_vector"] = 1 + 0.2 * rng.random(outer)
    directory.mkdir(parents=True)
    save_file(
        {key: x.astype(np.float32) for key, x in tensors.items()}, directory / "adapter_model.safetensors"
    )
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "use_dora": dora,
        **options,
    }
    (directory / "adapter_config.json").write_text(json.dumps(values))
    return directory


def modules_of(base, *ends):
    """The modules of a base whose names end so, with the shapes of their weights."""
    tensors = load_file(base / "model.safetensors")
    return {
        name.removesuffix(".weight"): x.shape
        for name, x in tensors.items()
        if name.removesuffix(".weight").endswith(ends)
    }


def expected_weights(base, changes):
    """The base's tensors with the changes added, by name."""
    tensors = load_file(base / "model.safetensors")
    return tensors | {
        f"{name}.weight": tensors[f"{name}.weight"] + change for name, change in changes.items()
    }
