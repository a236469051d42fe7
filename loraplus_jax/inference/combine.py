"""`loraplus combine`: several adapters of one base as one adapter directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._utils.atomic import atomic_write
from .._utils.records import file_digests
from .._utils.validation import check_new_path, check_number, expand_path
from .._utils.yaml_files import read_word
from ..data.fetch import resolve
from ..interop import adapter_directory, peft_files
from ..interop.adapter_directory import Adapter, load_adapter, save_adapter
from ..interop.combination import combine_adapters
from ..training.place import ADAPTERS, Place, look
from ..training.provenance import MODEL_PARTS, check_allowed, check_identity, model_identity
from ..training.run_files import ADAPTER
from ..training.saved_adapter import read_adapter
from .tuned_model import TrainingConfig, describe, read_config

KEPT = ("settings", "task", "identity")
"""What `eval`, `generate` and `export` need of the first adapter that has it."""


class Source(NamedTuple):
    """An adapter to combine.

    Attributes:
      name: as the user names it.
      place: what is there.
      weight: w.
      adapter: its factors.
      notes: its metadata.
      base: the base that PEFT's file names; None for any other adapter.
    """

    name: str
    place: Place
    weight: float
    adapter: Adapter
    notes: Mapping[str, Any]
    base: Path | None = None


def combine_runs(
    adapters: Sequence[str],
    how: str,
    out: Path,
    *,
    config: str | None = None,
    allow_different: Sequence[str] = (),
    **options: Any,
) -> str:
    """Combines runs and adapter directories of one base to a new adapter directory; returns a summary.

    `adapter.json` of the result says what it was made from, under `combined`. `options` are those of
    `combine_adapters`.
    """
    check_allowed(allow_different, MODEL_PARTS)
    listed: list[tuple[str, Place, float]] = []
    for text in adapters:
        name, weight = _split(text)
        place = look(expand_path("adapter", name)).require(*ADAPTERS)
        for earlier, other, _ in listed:  # by whatever path, such as that of its run
            if place.directory.samefile(other.directory):
                raise ValueError(f"{earlier} is listed twice, also as {name}; add up its weights")
        listed.append((name, place, weight))
    check_new_path("--out", out, outside=[place.directory for _, place, _ in listed])
    if config is not None and not any(place.kind == "peft" for _, place, _ in listed):
        raise ValueError("--config requires a PEFT adapter; these have their own training settings")
    read = None if config is None else read_config(config)
    sources = {name: _read(name, place, weight, read, allow_different) for name, place, weight in listed}
    # Of an adapter that PEFT made the base's fingerprint is not known.
    first = next(
        (s for s in sources.values() if s.notes.get("base") is not None), next(iter(sources.values()))
    )
    model = {part: value for part, value in first.notes.get("identity", {}).items() if part != "data"}
    weights = first.notes.get("base")
    for source in sources.values():
        here = model
        if first.place.kind == "run" and _tokenizer(source) not in (None, _tokenizer(first)):
            # Earlier versions digested an encoder's tokenizer in another way; the base says whether it is the same.
            tuned = describe(first.place, allow_different=allow_different)
            here = model_identity(tuned.settings, tuned.base, tuned.task, saved=source.notes)
        check_identity(source.place.directory, source.notes, here, weights=weights, allow=allow_different)
    # An export for the weights before quantization has no fingerprint to compare.
    settings = [source.notes["settings"] for source in sources.values() if "settings" in source.notes]
    runs = [own for own in settings if any(own.get("data", {}).get(name) for name in ("path", "train"))]
    if len(kinds := {own.get("model", {}).get("quantize", "none") for own in runs}) > 1:
        raise ValueError(
            f"the adapters are for bases with different model.quantize: {' and '.join(sorted(kinds))}"
        )
    # Without fingerprints, names are all there is.
    bases: dict[Path, Source] = {}
    if any(source.base for source in sources.values()) and "base.weights" not in allow_different:
        for source in sources.values():
            if source.base is not None:
                bases[source.base] = source
            elif "settings" in source.notes:
                bases[resolve(source.notes["settings"]["model"]["path"], "model").resolve()] = source
    if len(bases) > 1:
        named = " and ".join(f"{base} ({source.name})" for base, source in bases.items())
        raise ValueError(
            f"the adapters name different bases, {named}; if these hold the same weights, add --allow_different "
            "base.weights"
        )
    combined = combine_adapters(
        {name: source.adapter for name, source in sources.items()},
        [source.weight for source in sources.values()],
        how,  # pyright: ignore[reportArgumentType] # checked there
        **options,
    )
    noted = next((s.notes for s in sources.values() if "settings" in s.notes), {})
    with atomic_write(out.resolve(), new=True) as partial:
        save_adapter(
            partial,
            {"lora": combined.lora, **combined.extras},
            combined.specs,
            combined.config,
            base=weights,
            combined={"how": how, **options, "adapters": [_record(source) for source in sources.values()]},
            **{name: noted[name] for name in KEPT if name in noted},
        )
    ranks = sorted({spec.rank for spec in combined.specs.values()})
    count = f"{len(sources)} adapter{'s' if len(sources) > 1 else ''}"
    return f"{out}: {how} of {count}, rank {', '.join(map(str, ranks))}"


def _tokenizer(source: Source) -> str | None:
    """The digest of its base's tokenizer, if it is known."""
    return source.notes.get("identity", {}).get("tokenizer")


def _split(text: str) -> tuple[str, float]:
    """The directory and the weight of `DIR` or `DIR=WEIGHT`."""
    name, equals, weight = text.rpartition("=")
    if not equals or expand_path("adapter", text).exists():  # a path may have a = of its own
        return text, 1.0
    # As a setting, where other scripts' digits and 1_0 are text.
    value = read_word(weight)
    if type(value) not in (int, float):
        raise ValueError(f"{text}: the weight after = must be a finite number, got {weight!r}")
    check_number(f"weight of {name}", value)
    return name, float(value)


def _read(
    name: str, place: Place, weight: float, config: TrainingConfig | None, allow: Sequence[str]
) -> Source:
    if not place.is_peft:
        return Source(name, place, weight, load_adapter(place.directory), place.notes)
    # Only the model says where the tensors of PEFT's file belong.
    tuned = describe(place, config=config if place.kind == "peft" else None, allow_different=allow)
    notes = place.notes if place.kind == "run" else {**place.notes, **tuned.origin}
    theirs = None if notes.get("base") is not None else tuned.base.path.resolve()
    return Source(name, place, weight, read_adapter(place, tuned.parts), notes, theirs)


def _record(source: Source) -> dict[str, Any]:
    """What the result says of an adapter: without directories, which others do not have."""
    directory = source.place.directory.resolve()
    run = directory.parent if directory.name == ADAPTER else directory
    files = (
        (peft_files.OPTIONS, peft_files.WEIGHTS)
        if source.place.is_peft
        else (adapter_directory.DESCRIPTION_FILE, adapter_directory.TENSORS_FILE)
    )
    return {"name": run.name, "weight": source.weight, "files": file_digests(directory, files)}
