"""Several adapters over one base for `generate` and `predict`: each request names its adapter."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .._utils.multihost import gather_to_host
from .._utils.validation import expand_path, suggest
from ..adapter.adapter_stack import AdapterStack, stack_adapters
from ..adapter.tree import flatten, leaves_by_path, unflatten
from ..data.fetch import resolve
from ..data.readers import Problems, read_rows
from ..linen.wrap import apply_lora_plus
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.quantized import pack_shapes
from ..models.files import open_files
from ..quantization.packed_array import is_packed
from ..settings.schema import Settings
from ..step.fingerprints import digest_of_lines, fingerprint, fingerprint_line
from ..step.sharding import distribute
from ..tasks.encoder import has_pairs
from ..tasks.interface import AdaptedModel, params_of
from ..training.distributed import check_same_everywhere, raise_together
from ..training.provenance import check_allowed, check_identity, model_identity
from ..training.saved_adapter import (
    adapter_config,
    find_adapter,
    is_peft,
    read_adapter,
    read_notes,
    require_adapter,
    saved_config,
)
from ..training.setup import base_parts, build_model, load_model
from .devices import MeshSizes, choose_mesh, to_mesh
from .predict import NO_DATA, TunedModel, compute_outputs, settings_and_task, texts_to_predict

SEARCH = ("beams", "max_new_tokens", "length_penalty", "no_repeat_ngram", "no_repeat_in", "early_stopping")
"""Settings of section generation that decide an answer."""

BASE = "base"
"""The name of the base without an adapter."""
COLUMN = "adapter"
"""The column of a file that names the adapter of each row."""


class SeveralAdapters(NamedTuple):
    """Adapters by name over one base.

    Attributes:
      tuned: the model, with the stack's config; its variables are the base's.
      stack: the adapters.
      slots: the slot of each name; `BASE` is an empty one.
      tasks: what each adapter was trained for; None where that is unknown.
    """

    tuned: TunedModel
    stack: AdapterStack
    slots: dict[str, int]
    tasks: dict[str, Any]


def open_adapters(
    source: str,
    adapters: Sequence[str],
    plain_settings: Settings | None,
    allow_different: Sequence[str] = (),
    mesh: MeshSizes = None,
) -> SeveralAdapters:
    """Opens a base with several adapters, each checked against the base that it was trained on.

    Args:
      source: a model, which is the base, or a run or adapter, which gives the settings and the base.
      adapters: `NAME=DIR` for each, a run or an adapter directory of either format.
      plain_settings: settings of the model `source` where no adapter has any; None if that is an error.
      allow_different: parts of the base that may differ, see `PARTS`.
      mesh: see `load_tuned`.
    """
    with raise_together():
        check_allowed(allow_different)
        directories = _parse(adapters)
        own = find_adapter(expand_path("model", source))
        settings, task = _settings(source, own, directories, plain_settings)
        base = open_files(resolve(settings.model.path, "model"))
        described, tasks = {}, {}
        for name, directory in directories.items():
            described[name], tasks[name] = _describe(directory, settings, base, task, allow_different)
        # Without adapters: a parameter that one of them trains is frozen for another.
        parts = base_parts(settings, base, task)
        shapes = jax.eval_shape(parts.model.init, jax.random.key(0), *parts.base.inputs)["params"]
        packed = unflatten(pack_shapes(flatten(shapes), parts.base.formats, parts.base.table))
        chosen = choose_mesh(settings.mesh, mesh)
        parts = load_model(settings, base, parts._replace(frozen={"params": packed}), chosen)
    parts = to_mesh(parts, chosen)
    params = flatten({"params": params_of(parts)})
    line = functools.cache(lambda path: _fingerprint_lines(path, params[path]))
    frozen = {name: {p: params[p] for p in flatten(described[name].frozen)} for name in directories}
    for name, directory in directories.items():
        if (notes := read_notes(directory)).get("base") is not None:
            lines = {path: text for leaf in frozen[name] for path, text in line(leaf).items()}
            check_identity(directory, notes, {}, weights=digest_of_lines(lines), allow=allow_different)
    with raise_together():
        loaded = {
            name: read_adapter(directory, described[name]._replace(frozen=unflatten(frozen[name])))
            for name, directory in directories.items()
        }
    # A new head belongs to its adapter alone.
    new = tuple(f"params/{name}/" for name in parts.base.new)
    trained = {
        path for adapter in loaded.values() for path in flatten(adapter.extras) if not path.startswith(new)
    }
    dense = lambda x: x.dequantize() if is_packed(x) else x  # noqa: E731
    host_base = unflatten({path: gather_to_host(dense(params[path])) for path in trained})
    try:
        stack = stack_adapters(list(loaded.values()), slots=len(loaded) + 1, base=host_base)
    except ValueError as error:
        text = str(error)
        for n, name in enumerate(loaded):
            text = text.replace(f"adapters[{n}]", f"--adapter {name}")
        raise ValueError(text) from None
    replicated = NamedSharding(chosen, PartitionSpec())
    stack = distribute(stack, jax.tree.map(lambda _: replicated, stack))
    if jax.process_count() > 1:
        check_same_everywhere(
            {"base": fingerprint(parts.frozen), "adapters": fingerprint(stack.values), "slots": list(loaded)}
        )
    model = apply_lora_plus(parts.base.model, stack.config)
    tuned = TunedModel(settings, task, parts._replace(model=model), base, mesh=chosen)
    return SeveralAdapters(tuned, stack, {name: n for n, name in enumerate((*loaded, BASE))}, tasks)


def predict_several(
    directory: Path,
    *,
    adapters: Sequence[str],
    use: Sequence[str] = (),
    texts: Sequence[str] = (),
    data: str | None = None,
    allow_different: Sequence[str] = (),
    mesh: MeshSizes = None,
) -> list[dict[str, Any]]:
    """Predictions of several adapters over the base `directory`, or over that of the run in it; see `predict_run`.

    Each of `texts` is for every adapter in `use`, by default all; the rows of `data` name theirs in the column
    `adapter`. Each adapter has the classes that it was trained for; all must have the same number of them.
    """
    several = open_adapters(str(directory), adapters, None, allow_different, mesh)
    settings = several.tuned.settings
    del several.slots[BASE]  # which has no head
    with raise_together():
        if settings.is_language:
            raise ValueError(f"{directory} is a language model; use loraplus generate")
        requests = texts_to_predict(texts, data, settings)
        if data is None:
            use = use_of(use, several)
            requests, names = [request for request in requests for _ in use], [*use] * len(requests)
        else:
            names, locations = read_adapter_column(resolve(data, "data"), **settings.data.table_options)
            slots_of(names, several, locations)
    outputs = compute_outputs(several.tuned, requests, (several.stack, [several.slots[n] for n in names]))
    rows = []
    for (text, *_), name, output in zip(requests, names, outputs, strict=True):
        (prediction,) = several.tasks[name].predictions(output[None])
        rows.append({"text": text, "adapter": name, **prediction})
    return rows


def slots_of(names: Sequence[str], several: SeveralAdapters, locations: Sequence[str]) -> list[int]:
    """The slot of each request's adapter; raises one ValueError for all unknown names, with their locations."""
    allowed = f"{COLUMN} must be one of {', '.join(several.slots)}"
    Problems(
        (where, f"{allowed}, got {name!r}{suggest(name, several.slots, fallback=False)}")
        for name, where in zip(names, locations, strict=True)
        if name not in several.slots
    ).report()
    return [several.slots[name] for name in names]


def read_adapter_column(path: Path, **table_options: Any) -> tuple[list[str], list[str]]:
    """The column `adapter` of a file, and the location of each row."""
    rows = read_rows(path, (COLUMN,), **table_options)
    return [name for _, (name,) in rows], [location for location, _ in rows]


def use_of(use: Sequence[str], several: SeveralAdapters) -> list[str]:
    """The names that `--use` gives; all adapters without it."""
    names = list(use) or [name for name in several.slots if name != BASE]
    slots_of(names, several, ["--use"] * len(names))
    return names


def _parse(adapters: Sequence[str]) -> dict[str, Path]:
    directories = {}
    for text in adapters:
        name, equals, directory = text.partition("=")
        if not name.strip() or not equals or not directory:
            raise ValueError(f"--adapter must be NAME=DIR, such as french=runs/french, got {text!r}")
        if name == BASE or name in directories:
            reason = "means no adapter" if name == BASE else "has a directory already"
            raise ValueError(f"--adapter {text}: the name {name!r} {reason}; choose another name")
        directories[name] = require_adapter(expand_path("--adapter", directory))
    return directories


def _settings(
    source: str, own: Path | None, directories: Mapping[str, Path], plain: Settings | None
) -> tuple[Settings, Any]:
    """The settings and the task of `source`, or of the first adapter that has any, on the model `source`."""
    candidates = [path for path in (own, *directories.values()) if path is not None]
    directory = next((path for path in candidates if {"settings", "task"} <= read_notes(path).keys()), None)
    if own is not None and directory != own:
        raise ValueError(
            f"{source} has no training settings; pass a run of loraplus train, or the base model"
        )
    if directory is None:
        if plain is None:
            raise ValueError(f"no adapter has training settings; pass a run of loraplus train, got {source}")
        return plain, None
    settings, task = settings_and_task(directory, read_notes(directory))
    if own is None:
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, path=source))
    return settings, task


def _describe(
    directory: Path, settings: Settings, base: ModelFiles, task: Any, allow: Sequence[str]
) -> tuple[AdaptedModel, Any]:
    """The base with one adapter, with shapes as variables, after a check of the base's identity; and its task."""
    notes, own_task = read_notes(directory), task
    if {"settings", "task", "base"} <= notes.keys():
        own_settings, own_task = settings_and_task(directory, notes)
        _check_shared(directory, own_settings, settings, has_base=notes["base"] is not None)
        config = saved_config(directory)
    elif is_peft(directory):
        config = adapter_config(directory, base_parts(settings, base, task))
    else:
        raise ValueError(f"{directory} has no training settings; use a run or adapter from loraplus train")
    if config is None:
        raise ValueError(f"{directory} is a fully trained model, not an adapter; call it without --adapter")
    # With the template that all share: another one is an error here, and other weights are later.
    check_identity(directory, notes, model_identity(settings, base, task), allow=allow)
    return build_model(settings, base, own_task, config), own_task


def _check_shared(directory: Path, own: Settings, shared: Settings, *, has_base: bool) -> None:
    """Raises ValueError if an adapter's settings differ from those with which all adapters are computed."""

    def values(settings: Settings) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if own.data.train != NO_DATA:  # else these are no run's
            found["model.dtype"] = settings.model.dtype
            if not has_base:  # else the fingerprint of its weights tells
                found["model.quantize"] = settings.model.quantize
        if settings.task == "generation":
            found["task"] = settings.task
            found |= {f"generation.{name}": getattr(settings.generation, name) for name in SEARCH}
        if not settings.is_language:
            found["texts a row"] = 2 if has_pairs(settings.data) else 1
            found |= {"model.pooling": settings.model.pooling, "data.max_length": settings.data.max_length}
        return found

    its, ours = values(own), values(shared)
    if own.is_language != shared.is_language or its.get("task") != ours.get("task"):
        raise ValueError(
            f"{directory} was trained for task {own.task}, but the other adapters for {shared.task}; use it in a "
            "call of its own"
        )
    for name, value in its.items():
        if value != ours[name]:
            raise ValueError(
                f"{directory} is for {name} {value}, but the other adapters for {ours[name]}; use it in a call of "
                "its own"
            )


def _fingerprint_lines(path: str, leaf: Any) -> dict[str, str]:
    leaves = leaves_by_path(unflatten({path: leaf}))
    return {name: fingerprint_line(name, array) for name, array in leaves.items()}
