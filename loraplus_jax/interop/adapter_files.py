"""Adapters as directories: safetensors beside a JSON file that says what they are, for use without a run.

`adapter.safetensors` holds the factors as `lora/PATH/lora_a` and extras under their own paths;
`adapter.json` is what `checkpoint.describe_run` makes: format, config, specs, base fingerprint, versions.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..atomic import replacing, to_json
from ..checkpoint import FORMAT, describe_run
from ..config import LoRAPlusConfig
from ..json_files import read_json
from ..roles import lr_ratio_of
from ..spec import AdapterSpec, Specs, specs_from_json
from ..tree import flatten, unflatten, with_collection

TENSORS_FILE, DESCRIPTION_FILE = "adapter.safetensors", "adapter.json"


class Adapter(NamedTuple):
    """Result of `load_adapter`.

    Attributes:
      lora: the tree of factors.
      specs: the table of what is adapted.
      config: what was applied; None for a model trained in full, whose weights are all extras.
      extras: variables trained in full, `{"params": ...}`, empty if there are none.
    """

    lora: dict[str, Any]
    specs: dict[str, AdapterSpec]
    config: LoRAPlusConfig | None
    extras: dict[str, Any]


def save_adapter(
    directory: str | Path,
    lora: Mapping[str, Any],
    specs: Specs,
    config: LoRAPlusConfig | None,
    *,
    opt_state: Any = None,
    base: str | None = None,
    **more: Any,
) -> None:
    """Writes an adapter directory; an older adapter there is replaced only when the new one is complete.

    Nothing but an adapter is ever replaced.

    Args:
      directory: made if absent.
      lora: the tree of factors, or the trainable variables `{"lora": factors, "params": extras}`.
      specs: the table from `init_lora`.
      config: what was applied.
      opt_state: the optimizer's state, whose lambda is recorded in place of the config's.
      base: `checkpoint.fingerprint` of the frozen variables.
      **more: the caller's own JSON-able fields.

    Raises:
      ValueError: something else than an adapter is there; or factors, specs and config do not fit each other.
    """
    directory = Path(directory).resolve()
    check_config_matches_specs(specs, config)
    if config is not None and (ratio := lr_ratio_of(opt_state)) is not None:
        config = dataclasses.replace(config, lr_ratio=ratio)
    trainable = with_collection(lora, specs)
    check_factors(f"{directory}", trainable.get("lora", {}), specs)
    if directory.is_dir():
        others = sorted(
            path.name for path in directory.iterdir() if path.name not in (TENSORS_FILE, DESCRIPTION_FILE)
        )
        if others:
            raise ValueError(
                f"{directory} holds more than an adapter ({', '.join(others[:3])}); choose another"
            )
    elif directory.exists():
        raise ValueError(f"{directory} is a file; an adapter is a directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing(directory) as partial:
        partial.mkdir()
        (partial / TENSORS_FILE).write_bytes(tensor_bytes(flatten(trainable)))
        notes = to_json(describe_run(specs, config, base=base, **more), indent=1)
        (partial / DESCRIPTION_FILE).write_text(notes + "\n", encoding="utf-8")


def load_adapter(directory: str | Path) -> Adapter:
    """Reads an adapter directory.

    Raises:
      FileNotFoundError: it holds no adapter.
      ValueError: a file is damaged, of a later format, or tensors and table differ; the message names it.
    """
    notes, directory = read_adapter_json(directory), Path(directory)
    try:
        config = None if notes["config"] is None else LoRAPlusConfig.from_json(notes["config"])
        specs = specs_from_json(notes["specs"])
        check_config_matches_specs(specs, config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / DESCRIPTION_FILE}: {error}") from None
    variables = unflatten(read_tensors(directory / TENSORS_FILE))
    lora = variables.pop("lora", {})
    check_factors(f"{directory}: {TENSORS_FILE} and the table in {DESCRIPTION_FILE}", lora, specs)
    return Adapter(lora, specs, config, variables)


def read_adapter_json(directory: str | Path) -> dict[str, Any]:
    """An adapter's complete JSON: base fingerprint, versions and the caller's own fields included.

    Raises:
      FileNotFoundError, ValueError: as `load_adapter`.
    """
    for name in (TENSORS_FILE, DESCRIPTION_FILE):
        if not (Path(directory) / name).is_file():
            raise FileNotFoundError(f"{directory} is no adapter directory: it lacks {name}")
    path = Path(directory) / DESCRIPTION_FILE
    notes = read_json(path)
    if not {"format", "config", "specs"} <= notes.keys():
        raise ValueError(f"{path} is no adapter description: it needs format, config and specs")
    if notes["format"] != FORMAT:
        raise ValueError(f"{path} has format {notes['format']!r}, this version reads {FORMAT}")
    return notes


def read_tensors(path: Path) -> dict[str, Any]:
    """A safetensors file's tensors as JAX arrays, of their stored dtypes; a ValueError if it is damaged."""
    flax = _safetensors("flax")
    try:
        return flax.load_file(path)
    except Exception as error:  # the reader's own error class is not part of its interface
        raise ValueError(f"{path} is damaged: {error}") from None


def check_config_matches_specs(specs: Specs, config: LoRAPlusConfig | None) -> None:
    """Raises ValueError unless config and specs say the same: `apply` goes by the one and `merge` by the other."""
    if config is None:
        return
    for path, spec in specs.items():
        rank, scale = config.rank_of(path), config.scale_of(path)
        if (spec.rank, spec.scale) != (rank, scale):
            raise ValueError(
                f"config has rank {rank} and scale {scale:g} for {path or 'the model'}, the specs "
                f"have rank {spec.rank} and scale {spec.scale:g}"
            )


def check_factors(where: str, lora: Mapping[str, Any], specs: Specs) -> None:
    """Raises ValueError unless the factors are those of the specs, in number and shape."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(lora).items()}
    expected = {
        name: shape
        for module, spec in specs.items()
        for name, shape in zip(spec.factor_paths(module), spec.factor_shapes, strict=True)
    }
    differing = [
        path for path in sorted(shapes.keys() | expected.keys()) if shapes.get(path) != expected.get(path)
    ]
    if differing:
        first = differing[0]
        raise ValueError(
            f"{where}: factors and specs differ at {', '.join(differing[:5])}: the factor {first} is "
            f"{shapes.get(first, 'absent')}, the specs say {expected.get(first, 'absent')}"
        )


def tensor_bytes(tensors: Mapping[str, Any]) -> bytes:
    """A safetensors file: its bytes, not a file, since `save_file` makes files that only their owner can read."""
    return _safetensors("numpy").save({name: host_array(leaf) for name, leaf in tensors.items()})


def host_array(leaf: Any) -> Any:
    """A leaf as a contiguous numpy array."""
    return np.ascontiguousarray(jax.device_get(leaf))


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(f"safetensors.{module}")
    except ImportError:
        raise ImportError(
            "adapter files need safetensors: pip install 'loraplus_jax[train]' or pip install safetensors"
        ) from None
