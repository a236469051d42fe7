"""`loraplus combine`: several adapters of one base as one adapter directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._utils.atomic import atomic_write
from .._utils.records import file_digests
from .._utils.validation import check_new_path, check_number, expand_path
from ..data.fetch import resolve
from ..interop import adapter_directory, peft_files
from ..interop.adapter_directory import Adapter, load_adapter, save_adapter
from ..interop.combination import combine_adapters
from ..training.provenance import check_allowed, check_identity
from ..training.run_files import ADAPTER
from ..training.saved_adapter import is_peft, read_adapter, read_notes, require_adapter
from .generate import as_instruction_model, describe_peft
from .predict import NO_DATA, describe_adapter

KEPT = ("settings", "task", "identity")
"""What `eval`, `generate` and `export` need of the first adapter that has it."""


class Source(NamedTuple):
    """An adapter to combine.

    Attributes:
      name: as the user names it.
      directory: where it is.
      weight: w.
      adapter: its factors.
      notes: its metadata.
      base: the base that PEFT's file names; None for any other adapter.
    """

    name: str
    directory: Path
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
    check_new_path("--out", out)
    check_allowed(allow_different)
    sources: dict[str, Source] = {}
    for text in adapters:
        name, weight = _split(text)
        source = _read(name, weight, config, allow_different)
        for earlier in sources.values():  # by whatever path, such as that of its run
            if source.directory.samefile(earlier.directory):
                raise ValueError(f"{earlier.name} is listed twice, also as {name}; add up its weights")
        sources[name] = source
    if config is not None and not any(is_peft(source.directory) for source in sources.values()):
        raise ValueError("--config requires a PEFT adapter; these have their own training settings")
    # Of an adapter that PEFT made the base's fingerprint is not known.
    first = next(
        (s for s in sources.values() if s.notes.get("base") is not None), next(iter(sources.values()))
    )
    model = {part: value for part, value in first.notes.get("identity", {}).items() if part != "data"}
    weights = first.notes.get("base")
    for source in sources.values():
        check_identity(source.directory, source.notes, model, weights=weights, allow=allow_different)
    # An export for the weights before quantization has no fingerprint to compare.
    settings = [source.notes["settings"] for source in sources.values() if "settings" in source.notes]
    runs = [own for own in settings if own.get("data", {}).get("train") != NO_DATA]
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


def _split(text: str) -> tuple[str, float]:
    """The directory and the weight of `DIR` or `DIR=WEIGHT`."""
    name, equals, weight = text.rpartition("=")
    if not equals or expand_path("adapter", text).exists():  # a path may have a = of its own
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        raise ValueError(f"{text}: the weight after = must be a number, got {weight!r}") from None
    check_number(f"weight of {name}", value)
    return name, value


def _read(name: str, weight: float, config: str | None, allow: Sequence[str]) -> Source:
    directory = require_adapter(expand_path("adapter", name))
    notes = read_notes(directory)
    if not is_peft(directory):
        return Source(name, directory, weight, load_adapter(directory), notes)
    # Only the model says where the tensors of PEFT's file belong.
    if "settings" in notes or config is not None:
        tuned = describe_adapter(directory, None if "settings" in notes else config, allow)
    else:
        tuned = as_instruction_model(describe_peft(directory))
    if "settings" not in notes:
        notes = {**notes, **tuned.origin}
    theirs = None if notes.get("base") is not None else tuned.base.path.resolve()
    return Source(name, directory, weight, read_adapter(directory, tuned.parts), notes, theirs)


def _record(source: Source) -> dict[str, Any]:
    """What the result says of an adapter: without directories, which others do not have."""
    run = source.directory.resolve()
    run = run.parent if run.name == ADAPTER else run
    files = (
        (peft_files.OPTIONS, peft_files.WEIGHTS)
        if is_peft(source.directory)
        else (adapter_directory.DESCRIPTION_FILE, adapter_directory.TENSORS_FILE)
    )
    return {"name": run.name, "weight": source.weight, "files": file_digests(source.directory, files)}
