"""What a run is, as JSON: the metadata of a checkpoint or adapter, and how two of them differ."""

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import jax

from ..adapter.config import LoRAPlusConfig
from ..adapter.spec import Specs, specs_to_json

FORMAT = 1
PACKAGES = ("loraplus_jax", "jax", "flax", "optax", "orbax-checkpoint")
NUMERICS = (
    *("jax_enable_x64", "jax_default_matmul_precision"),
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
)
"""The options of JAX that change the bits of a step; a resumed run needs the same."""


def describe_run(
    specs: Specs, config: LoRAPlusConfig | None, *, base: str | None = None, **more: Any
) -> dict[str, Any]:
    """Makes the metadata of a checkpoint or adapter, as plain JSON values.

    Args:
      specs, config: those of the adapters; the config is None if the whole model is trained.
      base: `fingerprint` of the frozen variables.
      **more: your own JSON-serializable fields; restoring a checkpoint compares them like the others.

    Returns:
      A dict: `format`, int; `config`, dict or None; `specs`, a dict by path; `base`, str or None; `jax_config`, the
      value of each option in `NUMERICS`; `versions`, str by package; and the fields of `more`.
    """
    return {
        "format": FORMAT,
        "config": None if config is None else config.to_json(),
        "specs": specs_to_json(specs),
        "base": base,
        "jax_config": numeric_options(),
        "versions": package_versions(),
        **more,
    }


def package_versions() -> dict[str, str]:
    """The versions of this package and of those that compute, by name."""
    return {name: version_of(name) for name in PACKAGES}


def version_of(package: str) -> str:
    """The version of an installed package; "unknown" of a source tree on the path, or a vendored copy."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def numeric_options() -> dict[str, Any]:
    """The values of the options of JAX that change the bits of a step, by name."""
    return {name: getattr(jax.config, name) for name in NUMERICS}


def field_differences(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    labels: tuple[str, str] = ("in the checkpoint", "here"),
    prefix: str = "",
) -> list[str]:
    """Lists the fields that differ, also in nested mappings; ignores package versions.

    Returns:
      One text per field, with its dotted name and both values, `"absent"` for a missing one; empty if none differs.

    >>> field_differences({"config": {"rank": 8}}, {"config": {"rank": 4}})
    ['config.rank is 8 in the checkpoint and 4 here']
    """
    lines = []
    for name in dict.fromkeys((*saved, *current)):
        if not prefix and name == "versions":
            continue
        old, new = saved.get(name, "absent"), current.get(name, "absent")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += field_differences(old, new, labels, f"{prefix}{name}.")
        elif old != new and json.dumps(old) != json.dumps(new):  # 2 is 2.0, and a list of JSON a tuple
            values = (f"{json.dumps(value)} {label}" for value, label in zip((old, new), labels, strict=True))
            lines.append(f"{prefix}{name} is {' and '.join(values)}")
    return lines
