"""Several adapters over one base for `generate` and `predict`: each request names its adapter."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._utils.multihost import gather_to_host
from .._utils.validation import expand_path, suggest
from ..adapter.adapter_stack import AdapterStack, stack_adapters
from ..adapter.tree import flatten, leaves_by_path, unflatten
from ..data.fetch import resolve
from ..data.readers import Problems, read_rows
from ..linen.wrap import apply_lora_plus
from ..models.files import open_files
from ..quantization.packed_array import is_packed
from ..settings.schema import Settings
from ..step.fingerprints import digest_of_lines, fingerprint, fingerprint_line
from ..step.sharding import distribute
from ..tasks.encoder import has_pairs
from ..tasks.interface import params_of
from ..training.distributed import check_same_everywhere, raise_together
from ..training.place import ADAPTERS, Place, look
from ..training.provenance import MODEL_PARTS, check_allowed, model_identity
from ..training.saved_adapter import adapter_config, read_adapter, saved_config
from ..training.setup import base_parts, build_model
from .devices import MeshSizes, choose_mesh
from .predict import compute_outputs, texts_to_predict
from .tuned_model import OWN_TEMPLATE, TunedModel, describe, load, settings_and_task

SEARCH = ("beams", "max_new_tokens", "length_penalty", "no_repeat_ngram", "no_repeat_in", "early_stopping")
"""Settings of section generation that decide an answer."""

BASE = "base"
"""The name of the base without an adapter."""
COLUMN = "adapter"
"""The column of a file that names the adapter of each row."""


class SeveralAdapters(NamedTuple):
    """Adapters by name over one base, described.

    Attributes:
      tuned: the base.
      adapters: the base with each adapter.
      slots: the slot of each name in a stack; `BASE` is an empty one.
    """

    tuned: TunedModel
    adapters: dict[str, TunedModel]
    slots: dict[str, int]


def describe_adapters(
    source: str, adapters: Sequence[str], allow_different: Sequence[str] = (), **options: Any
) -> SeveralAdapters:
    """Describes a base with several adapters, each checked against the base that it was trained on.

    Args:
      source: a model, which is the base, or a run or adapter, which gives the settings and the base.
      adapters: `NAME=DIR` for each, a run or an adapter directory of either format.
      allow_different: parts of the base that may differ, see `MODEL_PARTS`.
      **options: `template` and `dtype` of `describe`; without them one of the adapters must have settings.
    """
    check_allowed(allow_different, MODEL_PARTS)
    own = look(expand_path("model", source))._replace(name=source)
    places = _parse(adapters)
    if own.kind in ADAPTERS:
        own.require("run")
    with_settings = [place for place in (own, *places.values()) if place.kind == "run"]
    if with_settings:
        if any(value is not None for value in options.values()):
            raise ValueError(OWN_TEMPLATE)
        settings, task = settings_and_task(with_settings[0], None if own.kind == "run" else source)
        base = open_files(resolve(settings.model.path, "model"))
        shared = TunedModel(own, settings, task, base_parts(settings, base, task), base, allow_different)
    elif options:  # of a merged model the weights alone, as of a base
        shared = describe(own._replace(kind="base", notes={}) if own.kind == "merged" else own, **options)
    else:
        raise ValueError(f"no adapter has training settings; pass a run of loraplus train, got {source}")
    # Without adapters: a parameter that one of them trains is frozen for another.
    shared = shared._replace(place=own._replace(kind="base", notes={}), allow_different=allow_different)
    described = {name: _describe(place, shared) for name, place in places.items()}
    return SeveralAdapters(shared, described, {name: n for n, name in enumerate((*places, BASE))})


def load_adapters(several: SeveralAdapters, mesh: Mesh) -> tuple[TunedModel, AdapterStack]:
    """Loads the base, whose model gets the stack's config, and the adapters into a stack."""
    tuned, described = load(several.tuned, mesh), dict[str, TunedModel]()
    params = flatten({"params": params_of(tuned.parts)})
    line = functools.cache(lambda path: _fingerprint_lines(path, params[path]))
    for name, adapter in several.adapters.items():
        frozen = {path: params[path] for path in flatten(adapter.parts.frozen)}
        described[name] = adapter._replace(parts=adapter.parts._replace(frozen=unflatten(frozen)))
        if adapter.place.notes.get("base") is not None:
            lines = {path: text for leaf in frozen for path, text in line(leaf).items()}
            adapter.check_identity({}, digest_of_lines(lines))
    with raise_together():
        loaded = {name: read_adapter(adapter.place, adapter.parts) for name, adapter in described.items()}
    # A new head belongs to its adapter alone.
    new = tuple(f"params/{name}/" for name in tuned.parts.base.new)
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
    replicated = NamedSharding(mesh, PartitionSpec())
    stack = distribute(stack, jax.tree.map(lambda _: replicated, stack))
    if jax.process_count() > 1:
        check_same_everywhere({"adapters": fingerprint(stack.values), "slots": list(loaded)})
    model = apply_lora_plus(tuned.parts.base.model, stack.config)
    return tuned._replace(parts=tuned.parts._replace(model=model)), stack


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
    with raise_together():
        several = describe_adapters(str(directory), adapters, allow_different)
        settings = several.tuned.settings
        on = choose_mesh(settings.mesh, mesh)
        del several.slots[BASE]  # which has no head
        if settings.is_language:
            raise ValueError(f"{directory} is a language model; use loraplus generate")
        requests = texts_to_predict(texts, data, settings)
        if data is None:
            use = use_of(use, several)
            requests, names = [request for request in requests for _ in use], [*use] * len(requests)
        else:
            names, locations = read_adapter_column(resolve(data, "data"), **settings.data.table_options)
            slots_of(names, several, locations)
    tuned, stack = load_adapters(several, on)
    outputs = compute_outputs(tuned, requests, (stack, [several.slots[n] for n in names]))
    rows = []
    for (text, *_), name, output in zip(requests, names, outputs, strict=True):
        (prediction,) = several.adapters[name].task.predictions(output[None])
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


def _parse(adapters: Sequence[str]) -> dict[str, Place]:
    places = {}
    for text in adapters:
        name, equals, directory = text.partition("=")
        if not name.strip() or not equals or not directory:
            raise ValueError(f"--adapter must be NAME=DIR, such as french=runs/french, got {text!r}")
        if name == BASE or name in places:
            reason = "means no adapter" if name == BASE else "has a directory already"
            raise ValueError(f"--adapter {text}: the name {name!r} {reason}; choose another name")
        places[name] = look(expand_path("--adapter", directory)).require("run", "peft")
    return places


def _describe(place: Place, shared: TunedModel) -> TunedModel:
    """The base with one adapter, with shapes as variables, after a check of the base's identity."""
    settings, base, task = shared.settings, shared.base, shared.task
    if place.kind == "run":
        own_settings, task = settings_and_task(place)
        _check_shared(place.directory, own_settings, settings, has_base=place.notes.get("base") is not None)
        config = saved_config(place)
    else:
        config = adapter_config(place.directory, shared.parts)
    if config is None:
        raise ValueError(
            f"{place.directory} is a fully trained model, not an adapter; call it without --adapter"
        )
    described = shared._replace(place=place, task=task)
    # With the template that all share: another one is an error here, and other weights are later.
    described.check_identity(model_identity(settings, base, shared.task, saved=place.notes))
    return described._replace(parts=build_model(settings, base, task, config))


def _check_shared(directory: Path, own: Settings, shared: Settings, *, has_base: bool) -> None:
    """Raises ValueError if an adapter's settings differ from those with which all adapters are computed."""

    def values(settings: Settings) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if own.data.files:  # else these are no run's
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
