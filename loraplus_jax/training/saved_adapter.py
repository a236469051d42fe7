"""Loads adapters in our format or PEFT's, to use them or to start training from them (`init_adapter`)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .._utils.multihost import gather_to_host
from .._utils.records import file_digests
from .._utils.validation import expand_path, to_plain
from ..adapter.config import LoRAPlusConfig
from ..adapter.spec import specs_from_json
from ..adapter.tree import combine, flatten, unflatten
from ..data.batches import digest
from ..interop import adapter_directory, peft_files
from ..interop.adapter_directory import Adapter, load_adapter
from ..interop.path_map import PathMap
from ..interop.peft_files import load_peft, peft_config, peft_names
from ..models.checkpoints import transformers_class
from ..models.checkpoints.name_table import NameTable, linear_rules
from ..models.families import PREFIXES
from ..settings.schema import Settings
from ..tasks.interface import AdaptedModel, params_of
from .place import ADAPTERS, Place, look
from .provenance import Identity, check_identity

RATES = ("policy", "decay", "weight_decay")


def saved_config(place: Place) -> LoRAPlusConfig | None:
    """The config in an adapter's metadata, which must fit its tensors; None for a fully trained model."""
    if (values := place.notes["config"]) is None:
        return None
    try:
        config = LoRAPlusConfig.from_json(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place.notes_file}: {error}") from None
    file = peft_files.WEIGHTS if place.is_peft else adapter_directory.TENSORS_FILE
    tensors = adapter_directory.read_tensors(place.directory / file)
    adapter_directory.check_ranks(f"{place.notes_file}", config, tensors)
    return config


def transformers_class_of(parts: AdaptedModel) -> transformers_class.TransformersClass:
    """The transformers class that corresponds to a model."""
    model: Any = parts.base.model
    if parts.base.new:
        return transformers_class.encoder_class(model.config, model.pooling)
    return transformers_class.causal_lm_class(model.config)


def path_map_of(directory: Path, parts: AdaptedModel) -> PathMap:
    """The path map for a PEFT adapter, which may be for the model with or without a head."""
    names = peft_names(directory)
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")
    return transformers_class.path_map(parts.base.table, transformers_class_of(parts), prefix=prefix)


def adapter_config(directory: Path, parts: AdaptedModel) -> LoRAPlusConfig:
    """The config of a PEFT adapter as a `LoRAPlusConfig`."""
    model: Any = parts.base.model
    return peft_config(
        directory,
        path_map_of(directory, parts),
        layers=model.config.num_hidden_layers,
        target_parameters=transformers_class.parameter_rules(parts.base.table),
    )


def merged_table(parts: AdaptedModel) -> NameTable:
    """The table of tensor names of a merged model, including its head."""
    form = transformers_class_of(parts)
    rules = [r for r in parts.base.table.rules if r.path.rpartition("/")[0] not in dict(form.heads)]
    rules += [rule for ours, theirs in form.heads for rule in linear_rules(theirs, ours)]
    return dataclasses.replace(parts.base.table, rules=tuple(rules))


def read_adapter(place: Place, parts: AdaptedModel) -> Adapter:
    """Reads an adapter in our format or PEFT's and checks it against a model, whose variables may be shapes."""
    params, directory = params_of(parts), place.directory
    if place.is_peft:
        adapter = load_peft(directory, parts.specs, path_map_of(directory, parts), params=params)
    else:
        adapter = load_adapter(directory)
        if adapter.specs != dict(parts.specs):
            paths = {**adapter.specs, **parts.specs}
            differing = sorted(path for path in paths if adapter.specs.get(path) != parts.specs.get(path))
            raise ValueError(f"{directory}: adapter and model differ at {', '.join(differing[:5])}")
    # Of fully trained variables keep those that the model trains; all others must equal the base's values.
    trainable, frozen, kept = flatten(parts.trainable), flatten({"params": params}), {}
    for path, leaf in flatten(adapter.extras).items():
        expected = trainable.get(path, frozen.get(path))
        if expected is None or np.shape(expected) != np.shape(leaf):
            shape = "no such parameter" if expected is None else np.shape(expected)
            raise ValueError(
                f"{directory}: {path} has shape {np.shape(leaf)} in the adapter, but the model has {shape}"
            )
        if path in trainable:
            kept[path] = leaf
        elif not isinstance(expected, jax.ShapeDtypeStruct) and not np.array_equal(
            gather_to_host(expected).astype(leaf.dtype), leaf
        ):
            raise ValueError(
                f"{directory}: {path} differs from the frozen base: it was fully trained, or the base is another "
                "model; to train it, add its module to lora.modules_to_save"
            )
    return adapter._replace(extras=unflatten(kept))


def find_init_adapter(settings: Settings) -> Place | None:
    """The adapter of `init_adapter`; None if it is not set."""
    if settings.init_adapter is None:
        return None
    try:
        return look(expand_path("init_adapter", settings.init_adapter)).require(*ADAPTERS)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"init_adapter: {error}") from None


def check_init_adapter(place: Place, settings: Settings, parts: AdaptedModel, task: Any) -> None:
    """Raises ValueError if `init_adapter` does not match settings, model and task; names all differences."""
    differences = _lora_differences(settings, place, parts)
    saved = place.notes.get("task")
    if isinstance(saved, Mapping):
        for name in ("kind", "names"):
            ours, theirs = (to_plain(x.get(name)) for x in (task.notes(), saved))
            if ours != theirs:
                differences.append(f"task {name} is {theirs} in the adapter and {ours} here")
    if settings.init_adapter_rates == "same":
        differences += _rate_differences(settings, place.notes)
    if differences:
        raise ValueError(
            f"init_adapter {place.directory} does not match the settings: {'; '.join(differences)}"
        )
    read_adapter(place, parts)


def adapter_digest(place: Place) -> str:
    """A short hex digest of an adapter's files, to check that all processes read the same adapter."""
    names = sorted(path.name for path in place.directory.iterdir() if path.is_file())
    return digest(file_digests(place.directory, names).items())


def check_init_identity(
    place: Place, identity: Identity, weights: str | None, allow: Sequence[str]
) -> list[str]:
    """Raises ValueError if `init_adapter` was trained on another base model; its data may differ.

    Returns the differences that `allow` accepts, as text.
    """
    model = {name: value for name, value in identity.items() if name != "data"}
    allowed = check_identity(place.directory, place.notes, model, weights=weights, allow=allow)
    return [f"init_adapter {place.directory}: {line}" for line in allowed]


def load_init_adapter(place: Place, parts: AdaptedModel) -> tuple[AdaptedModel, dict[str, Any] | None]:
    """Returns the model with the values of `init_adapter`, and the start that the adapter itself had, if saved.

    Trainable values that it lacks stay unchanged.
    """
    adapter = read_adapter(place, parts)
    values = flatten(combine({"lora": adapter.lora} if adapter.lora else {}, adapter.extras))
    trainable = {path: values.get(path, leaf) for path, leaf in flatten(parts.trainable).items()}
    float32 = {path: jax.numpy.asarray(leaf, np.float32) for path, leaf in trainable.items()}
    return parts._replace(trainable=unflatten(float32)), dict(adapter.start) or None


def _lora_differences(settings: Settings, place: Place, parts: AdaptedModel) -> list[str]:
    if settings.applied is None:
        return ["method full has no adapters; use method lora_plus or lora"]
    if place.notes and not (place.is_peft and place.notes["config"] is None):
        adapted = specs_from_json(place.notes["specs"])
        config = saved_config(place)
        theirs = {path: (s.rank, s.scale, s.magnitude) for path, s in adapted.items()}
        their_layers = next((s.layers for s in adapted.values() if s.layers is not None), None)
    else:
        config = adapter_config(place.directory, parts)
        is_dora = config.variant == "dora"
        targets = (*config.target_modules, *config.target_parameters)
        theirs = {p: (config.rank_of(p), config.scale_of(p), is_dora) for p in targets}
        their_layers = config.layers_to_transform
    if config is None:
        return ["it is a fully trained model without adapters"]
    ours = {path: (spec.rank, spec.scale, spec.magnitude) for path, spec in parts.specs.items()}
    our_layers = next((s.layers for s in parts.specs.values() if s.layers is not None), None)
    # A module and its kernel are the same target.
    modules = [{path.removesuffix("/kernel"): x for path, x in all_.items()} for all_ in (theirs, ours)]
    if their_layers == our_layers and modules[0] == modules[1]:
        return []
    applied, differences = settings.applied, []
    if theirs.keys() != ours.keys():
        parameters = to_plain(config.target_parameters)
        modules = sorted(path for path in theirs if path not in parameters)
        flags = f"--lora.target_modules '[{', '.join(modules)}]'"
        flags += f" --lora.target_parameters '{json.dumps(parameters)}'" if parameters else ""
        differences.append(
            f"it adapts {', '.join(sorted(theirs))}, the settings adapt {', '.join(sorted(ours))}: set {flags}"
        )
    names = ("rank", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "variant", "layers_to_transform")
    for name in names:
        value, saved = to_plain(getattr(applied, name)), to_plain(getattr(config, name))
        if value != saved:
            differences.append(
                f"lora.{name} is {saved} in the adapter and {value} here: set --lora.{name} {saved}"
            )
    return differences


def _rate_differences(settings: Settings, notes: Mapping[str, Any]) -> list[str]:
    config, saved = notes.get("config") or {}, notes.get("settings") or {}
    theirs = saved.get("optimizer") or {}
    values = [(f"optimizer.{name}", getattr(settings.optimizer, name), theirs.get(name)) for name in RATES]
    if settings.applied is not None:
        values.append(("lora.lr_ratio", settings.lr_ratio, config.get("lr_ratio")))
    differences = [
        f"{name} is {value} in the adapter and {our_value} here"
        for name, our_value, value in values
        if value not in (None, our_value)  # PEFT records neither, and an older version not all
    ]
    hint = "set the same values, or --init_adapter_rates new to use different ones"
    return [*differences, hint] if differences else []
