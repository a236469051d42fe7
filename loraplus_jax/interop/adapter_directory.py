"""Adapter directories: a safetensors file and a JSON file with its metadata, usable without the run.

`adapter.safetensors` contains the factors as `lora/PATH/lora_a`, fully trained parameters under their own paths,
and with init loftq the factors before the first step under `start`. `adapter.json` contains the metadata of
`step.describe_run`: format, config, specs, base fingerprint, versions.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from .._utils.atomic import atomic_write
from .._utils.json_files import Links, check_file
from .._utils.records import check_files, read_record, record_text
from ..adapter.config import LoRAPlusConfig
from ..adapter.spec import AdapterSpec, Specs, specs_from_json
from ..adapter.target_rules import try_rules
from ..adapter.tree import factors_by_module, flatten, unflatten, with_collection
from ..optim.roles import lr_ratio_of
from ..step.run_metadata import FORMAT, describe_run

TENSORS_FILE, DESCRIPTION_FILE = "adapter.safetensors", "adapter.json"


class Adapter(NamedTuple):
    """Result of `load_adapter`.

    Attributes:
      lora: the tree of factors.
      specs: the table of adapted weights.
      config: config of the adapter; None for a fully trained model, whose weights are all extras.
      extras: fully trained variables, `{"params": ...}`, empty if there are none.
      start: the tree of factors whose s A B made a quantized base resemble the original, empty if there are none.
        On the original, the adapter is the difference to it: `inits.as_difference`.
    """

    lora: dict[str, Any]
    specs: dict[str, AdapterSpec]
    config: LoRAPlusConfig | None
    extras: dict[str, Any]
    start: Mapping[str, Any] = MappingProxyType({})


def save_adapter(
    directory: str | Path,
    lora: Mapping[str, Any],
    specs: Specs,
    config: LoRAPlusConfig | None,
    *,
    opt_state: Any = None,
    base: str | None = None,
    start: Mapping[str, Any] | None = None,
    **more: Any,
) -> None:
    """Writes an adapter directory. Replaces an older adapter once the new one is complete, and never other files.

    Args:
      directory: directory to write; created if missing.
      lora: the tree of factors, or the trainable variables `{"lora": factors, "params": extras}`.
      specs: the table from `init_lora`.
      config: config of the adapter.
      opt_state: optimizer state; its lambda is saved instead of the config's.
      base: `step.fingerprint` of the frozen variables.
      start: the factors from `loftq`, see `Adapter`.
      **more: your own JSON-serializable fields.

    Raises:
      ValueError: the directory contains other files, or factors, specs and config do not match.
    """
    directory = Path(directory).resolve()
    check_config_matches_specs(specs, config)
    if config is not None and (ratio := lr_ratio_of(opt_state)) is not None:
        config = dataclasses.replace(config, lr_ratio=ratio)
    trainable = with_collection(lora, specs)
    factors_by_module(f"{directory}", {"lora": trainable.get("lora", {})}, specs)
    if start is not None:
        factors_by_module(f"{directory}: start", start, specs)
        trainable = {**trainable, "start": start}
    if directory.is_dir():
        others = sorted(
            path.name for path in directory.iterdir() if path.name not in (TENSORS_FILE, DESCRIPTION_FILE)
        )
        if others:
            raise ValueError(
                f"{directory} contains other files ({', '.join(others[:3])}); choose another directory"
            )
    elif directory.exists():
        raise ValueError(f"{directory} must be a directory, got a file")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # The reader needs both files to fit together, so the directory is replaced whole.
    with atomic_write(directory) as partial:
        partial.mkdir()
        (partial / TENSORS_FILE).write_bytes(tensor_bytes(flatten(trainable)))
        notes = record_text(describe_run(specs, config, base=base, **more), partial, [TENSORS_FILE])
        (partial / DESCRIPTION_FILE).write_text(notes, encoding="utf-8")


def load_adapter(directory: str | Path) -> Adapter:
    """Reads an adapter directory.

    Returns:
      An `Adapter`, with arrays in their stored dtypes.

    Raises:
      FileNotFoundError: the directory contains no adapter.
      ValueError: a file is damaged or has another format version, or tensors and specs differ; the message names
        it.
    """
    notes, directory = read_adapter_json(directory), Path(directory)
    try:
        config = None if notes["config"] is None else LoRAPlusConfig.from_json(notes["config"])
        specs = specs_from_json(notes["specs"])
        check_config_matches_specs(specs, config)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / DESCRIPTION_FILE}: {error}") from None
    tensors = read_tensors(directory / TENSORS_FILE)
    if config is not None:
        check_ranks(f"{directory / DESCRIPTION_FILE}", config, tensors)
    variables = unflatten(tensors)
    lora, start = variables.pop("lora", {}), variables.pop("start", {})
    where = f"{directory}: {TENSORS_FILE} does not match {DESCRIPTION_FILE}"
    for factors in (lora, start) if start else (lora,):
        factors_by_module(where, {"lora": factors}, specs)
    check_files(directory / DESCRIPTION_FILE, notes)  # last, since the other messages say more
    return Adapter(lora, specs, config, variables, start)


def read_adapter_json(directory: str | Path) -> dict[str, Any]:
    """Reads the complete `adapter.json` of an adapter.

    Returns:
      A dict of JSON values, with the keys of `step.describe_run` (`"format"`, `"config"`, `"specs"`, `"base"`,
      `"jax_config"`, `"versions"`), your own fields, and the digests of the files. `"config"` is None for a fully
      trained model, and `"base"` if no fingerprint was saved.

    Raises:
      FileNotFoundError, ValueError: as in `load_adapter`.
    """
    for name in (TENSORS_FILE, DESCRIPTION_FILE):
        if not (Path(directory) / name).is_file():
            raise FileNotFoundError(f"{directory} is not an adapter directory: {name} is missing")
    return read_description(Path(directory) / DESCRIPTION_FILE)


def read_description(path: Path) -> dict[str, Any]:
    """Reads a description that `step.describe_run` made, `adapter.json` or `loraplus.json`.

    Returns:
      A dict of JSON values, as from `read_adapter_json`.

    Raises:
      ValueError: the file is damaged, has another format version, or a regular expression that is invalid or takes
        too long.
    """

    def check(notes: dict[str, Any]) -> None:
        if notes.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format must be {FORMAT}, got {notes.get('format')!r:.80}; use the version that wrote it"
            )
        if missing := {"config", "specs"} - notes.keys():
            raise ValueError(f"{path}: {' and '.join(sorted(missing))} missing")
        specs, settings = notes["specs"], notes.get("settings")
        for config in (notes["config"], settings.get("lora") if isinstance(settings, Mapping) else None):
            try_rules(str(path), config, specs if isinstance(specs, Mapping) else ())

    return read_record(path, check)


def read_tensors(
    path: Path, form: Literal["flax", "numpy"] = "flax", *, links: Links = "inside"
) -> dict[str, Any]:
    """Reads a safetensors file; `links` is for `check_file`.

    Returns:
      A dict from names to JAX arrays in their stored dtypes; with `form` numpy, to numpy arrays.

    Raises:
      ValueError: the file is damaged.
    """
    library = _safetensors(form)
    check_file(path, links=links)
    try:
        return library.load_file(path)
    except Exception as error:  # the error class of safetensors is not public
        raise ValueError(f"{path} is damaged: {error}") from None


def check_config_matches_specs(specs: Specs, config: LoRAPlusConfig | None) -> None:
    """Raises ValueError unless config and specs agree, since `apply` uses the config and `merge` the specs."""
    if config is None:
        return
    for path, spec in specs.items():
        rank, scale = config.rank_of(path), config.scale_of(path)
        if (spec.rank, spec.scale) != (rank, scale):
            raise ValueError(
                f"config and specs differ for {path or 'the model'}: the config has rank {rank} and scale "
                f"{scale:g}, the specs have rank {spec.rank} and scale {spec.scale:g}"
            )
        if spec.magnitude != (config.variant == "dora"):
            raise ValueError(
                f"config and specs differ for {path or 'the model'}: the config has variant {config.variant}, the "
                f"specs are of variant {'dora' if spec.magnitude else 'lora'}"
            )


def check_ranks(where: str, config: Any, tensors: Mapping[str, Any]) -> None:
    """Raises ValueError if no tensor is as wide as a rank: a model is built with it before they are compared."""
    widest = max((axis for tensor in tensors.values() for axis in tensor.shape), default=0)
    if (rank := max(config.rank, *config.rank_pattern.values(), 0)) > widest:
        raise ValueError(f"{where}: rank {rank} is above {widest}, the widest axis of the adapter's tensors")


def check_finite(where: Any, lora: Mapping[str, Any]) -> None:
    """Raises ValueError if a factor has a value that is not finite."""
    for path, factor in flatten(lora).items():
        if not np.isfinite(np.asarray(factor, np.float32)).all():
            raise ValueError(f"{where}: {path} has values that are not finite")


def tensor_bytes(tensors: Mapping[str, Any]) -> bytes:
    """The content of a safetensors file with these arrays, for `read_tensors`."""
    # Not save_file, which writes files that only their owner can read.
    return _safetensors("numpy").save({name: host_array(leaf) for name, leaf in tensors.items()})


def host_array(leaf: Any) -> Any:
    """A leaf as a contiguous numpy array."""
    # safetensors writes the buffer as it is stored, so a transposed array would come back with its values mixed up.
    # ascontiguousarray would give a scalar an axis.
    return np.asarray(jax.device_get(leaf), order="C")


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(f"safetensors.{module}")
    except ModuleNotFoundError:
        raise ImportError(
            "adapter files require safetensors: pip install 'loraplus_jax[train]' or pip install safetensors"
        ) from None
