"""Adapters of either format for a model of the application, and training that starts from one."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..config import LoRAPlusConfig
from ..interop import adapter_files, peft_files
from ..interop.adapter_files import Adapter, load_adapter, read_adapter_json
from ..interop.path_map import PathMap
from ..interop.peft_files import load_peft, peft_config, peft_names, peft_notes
from ..models import export
from ..models.name_table import NameTable, linear_rules
from ..multihost import gather_to_host
from ..settings.schema import Settings
from ..spec import specs_from_json
from ..tasks.interface import AdaptedModel
from ..tree import combine, flatten, unflatten
from .run_directory import ADAPTER

PREFIXES = ("model.", "bert.", "roberta.")
"""What transformers puts before the modules of a model that has a head, by family."""
_RATES = ("policy", "decay", "weight_decay")


def find_adapter(path: Path) -> Path | None:
    """The adapter directory that a path means: a run's, or itself if it is one of either format; else None."""
    own = path / ADAPTER
    names = (adapter_files.DESCRIPTION_FILE, peft_files.OPTIONS)
    return next((place for place in (own, path) for name in names if (place / name).is_file()), None)


def is_peft(directory: Path) -> bool:
    """Whether an adapter directory is of PEFT's format."""
    return not (directory / adapter_files.DESCRIPTION_FILE).is_file()


def read_notes(directory: Path) -> dict[str, Any]:
    """What the adapter says of itself beside its tensors; empty for one that PEFT made."""
    return peft_notes(directory) or {} if is_peft(directory) else read_adapter_json(directory)


def notes_path(directory: Path) -> Path:
    """The file that holds them."""
    return directory / (peft_files.NOTES_FILE if is_peft(directory) else adapter_files.DESCRIPTION_FILE)


def saved_config(directory: Path) -> LoRAPlusConfig | None:
    """The config in the notes of an adapter; None for a model trained in full.

    Raises:
      ValueError: it is damaged.
    """
    found = read_notes(directory)["config"]
    try:
        return None if found is None else LoRAPlusConfig.from_json(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{notes_path(directory)}: {error}") from None


def transformers_class_of(parts: AdaptedModel) -> export.TransformersClass:
    """The class of transformers that a model is one of."""
    model: Any = parts.base.model
    return (
        export.encoder_class(model.config, model.pooling)
        if parts.base.new
        else export.causal_lm_class(model.config)
    )


def path_map_of(directory: Path, parts: AdaptedModel) -> PathMap:
    """The path map for an adapter in PEFT's files, which may be for the model with its head or without."""
    names = peft_names(directory)
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")
    return export.path_map(parts.base.table, transformers_class_of(parts), prefix=prefix)


def adapter_config(directory: Path, parts: AdaptedModel) -> LoRAPlusConfig:
    """What an adapter in PEFT's files says, in our terms."""
    model: Any = parts.base.model
    return peft_config(directory, path_map_of(directory, parts), layers=model.config.num_hidden_layers)


def merged_table(parts: AdaptedModel) -> NameTable:
    """Where the tensors of a merged model go, its head among them."""
    form = transformers_class_of(parts)
    rules = [r for r in parts.base.table.rules if r.path.rpartition("/")[0] not in dict(form.heads)]
    rules += [rule for ours, theirs in form.heads for rule in linear_rules(theirs, ours)]
    return dataclasses.replace(parts.base.table, rules=tuple(rules))


def read_adapter(directory: Path, parts: AdaptedModel, params: Mapping[str, Any]) -> Adapter:
    """An adapter of either format for a model, checked against it.

    Args:
      directory: of the adapter.
      parts: the model; shapes may stand for its variables.
      params: all its parameters without adapters, or their shapes.

    Raises:
      ValueError, OSError: it does not fit, or cannot be read; the message says what differs.
    """
    if is_peft(directory):
        adapter = load_peft(directory, parts.specs, path_map_of(directory, parts), params=params)
    else:
        adapter = load_adapter(directory)
        if adapter.specs != dict(parts.specs):
            odd = [p for p in {**adapter.specs, **parts.specs} if adapter.specs.get(p) != parts.specs.get(p)]
            raise ValueError(f"{directory}: the adapter and the model differ at {', '.join(sorted(odd)[:5])}")
    return adapter._replace(extras=_trained(directory, adapter.extras, parts, {"params": params}))


def _trained(
    directory: Path, extras: dict[str, Any], parts: AdaptedModel, base: Mapping[str, Any]
) -> dict[str, Any]:
    """The extras that the model trains; of any other the base must have the very same."""
    trainable, frozen, kept = flatten(parts.trainable), flatten(base), {}
    for path, leaf in flatten(extras).items():
        wanted = trainable.get(path, frozen.get(path))
        if wanted is None or np.shape(wanted) != np.shape(leaf):
            shape = "no such leaf" if wanted is None else np.shape(wanted)
            raise ValueError(f"{directory}: {path} is {np.shape(leaf)} in the adapter, the model has {shape}")
        if path in trainable:
            kept[path] = leaf
        elif not isinstance(wanted, jax.ShapeDtypeStruct) and not np.array_equal(
            gather_to_host(wanted).astype(leaf.dtype), leaf
        ):
            raise ValueError(
                f"{directory}: {path} was trained in full, or is of another base; the settings leave it frozen: "
                "name its module in lora.modules_to_save"
            )
    return unflatten(kept)


def check_base(directory: Path, found: str | None, base: str | Path) -> None:
    """Raises ValueError if the adapter knows the fingerprint of its base, and the one found is another."""
    wanted = read_notes(directory).get("base")
    if None not in (wanted, found) and found != wanted:
        raise ValueError(f"{directory} belongs to a base with fingerprint {wanted}, {base} has {found}")


def check_init_adapter(settings: Settings, parts: AdaptedModel, params: Mapping[str, Any], task: Any) -> None:
    """Raises ValueError unless training may start from `init_adapter`: it must say what the settings say.

    Args:
      settings: with `init_adapter`.
      parts: the model, of shapes.
      params: shapes of all its parameters.
      task: what is to be learned.
    """
    directory = _start(settings)
    notes = read_notes(directory)
    differences = _differences(settings, directory, parts)
    saved = notes.get("task")
    if isinstance(saved, Mapping):
        for name in ("kind", "names"):
            ours, theirs = (_plain(x.get(name)) for x in (task.notes(), saved))
            if ours != theirs:
                differences.append(f"the task's {name}: {theirs} in the adapter, {ours} here")
    if settings.init_adapter_rates == "same":
        differences += _rate_differences(settings, notes)
    if differences:
        raise ValueError(
            f"init_adapter {directory} does not agree with the settings: {'; '.join(differences)}"
        )
    read_adapter(directory, parts, params)


def adapter_digest(settings: Settings) -> str | None:
    """A short hex digest of the files of `init_adapter`, by which processes know that they start from the same."""
    if settings.init_adapter is None:
        return None
    files = sorted(path for path in _start(settings).iterdir() if path.is_file())
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.name} {path.stat().st_size}".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def load_init_adapter(
    settings: Settings, parts: AdaptedModel, params: Mapping[str, Any], base: str | None
) -> AdaptedModel:
    """The model with the values of `init_adapter`; what it lacks of modules trained in full stays as it is.

    Args:
      settings: with `init_adapter`.
      parts: the model.
      params: all its parameters.
      base: the fingerprint of its frozen variables.
    """
    directory = _start(settings)
    check_base(directory, base, settings.model.path)
    adapter = read_adapter(directory, parts, params)
    values = flatten(combine({"lora": adapter.lora} if adapter.lora else {}, adapter.extras))
    trainable = {path: values.get(path, leaf) for path, leaf in flatten(parts.trainable).items()}
    like = {path: jax.numpy.asarray(leaf, np.float32) for path, leaf in trainable.items()}
    return parts._replace(trainable=unflatten(like))


def _start(settings: Settings) -> Path:
    place = Path(settings.init_adapter or "").expanduser()
    if (directory := find_adapter(place)) is None:
        raise ValueError(
            f"init_adapter: there is no adapter in {place}; it takes a run, or a directory with "
            f"{adapter_files.DESCRIPTION_FILE} or PEFT's {peft_files.OPTIONS}"
        )
    return directory


def _differences(settings: Settings, directory: Path, parts: AdaptedModel) -> list[str]:
    """What the adapter and the section lora say differently, with the flags that would set it right."""
    if settings.applied is None:
        return ["method full has no adapters; use lora_plus or lora"]
    if read_notes(directory):
        adapted = specs_from_json(read_notes(directory)["specs"])
        config, held = saved_config(directory), {path: (s.rank, s.scale) for path, s in adapted.items()}
        chosen = next((s.layers for s in adapted.values() if s.layers is not None), None)
    else:
        config = adapter_config(directory, parts)
        held = {path: (config.rank_of(path), config.scale_of(path)) for path in config.target_modules}
        chosen = config.layers_to_transform
    if config is None:
        return ["it is a model trained in full, and has no adapters"]
    here = {path: (spec.rank, spec.scale) for path, spec in parts.specs.items()}
    there = {path.removesuffix("/kernel"): value for path, value in held.items()}
    layers_here = next((s.layers for s in parts.specs.values() if s.layers is not None), None)
    if (
        there == {path.removesuffix("/kernel"): value for path, value in here.items()}
        and chosen == layers_here
    ):
        return []
    applied, found = settings.applied, []
    if held.keys() != here.keys():
        flag = f"--lora.target_modules '[{', '.join(sorted(held))}]'"
        found.append(
            f"it adapts {', '.join(sorted(held))}, the settings {', '.join(sorted(here))}: set {flag}"
        )
    for name in ("rank", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform"):
        ours, theirs = _plain(getattr(applied, name)), _plain(getattr(config, name))
        if ours != theirs:
            found.append(f"lora.{name} is {theirs} in the adapter, {ours} here: set --lora.{name} {theirs}")
    return found


def _rate_differences(settings: Settings, notes: Mapping[str, Any]) -> list[str]:
    """Lambda, groups and decay, where the adapter knows with which it was trained."""
    config, saved = notes.get("config") or {}, notes.get("settings") or {}
    optimizer = saved.get("optimizer") or {}
    theirs = {f"optimizer.{name}": optimizer[name] for name in _RATES if name in optimizer}
    ours: dict[str, Any] = {f"optimizer.{name}": getattr(settings.optimizer, name) for name in _RATES}
    if settings.applied is not None and "lr_ratio" in config:
        theirs["lora.lr_ratio"], ours["lora.lr_ratio"] = config["lr_ratio"], settings.applied.lr_ratio
    found = [
        f"{name} was {theirs[name]} and is {ours[name]} here" for name in theirs if theirs[name] != ours[name]
    ]
    return [*found, "set them so, or --init_adapter_rates new if that is meant"] if found else []


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list | tuple) else value
