"""`loraplus inspect DIR`: what an adapter of any format is, read as untrusted."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._utils.json_files import read_json
from .._utils.records import FILES, check_files
from .._utils.validation import escape_controls
from ..adapter.einsum_letters import layer_axis
from ..adapter.spec import AdapterSpec
from ..interop.adapter_directory import TENSORS_FILE, load_adapter, read_tensors
from ..interop.factor_trees import read_tree
from ..interop.library_recipes import find_recipe
from ..interop.path_map import FACTOR, MAGNITUDE_END
from ..interop.peft_files import NOTES_FILE, OPTIONS, OWN_TENSORS_FILE, WEIGHTS, peft_notes, read_peft
from ..models.checkpoints.gguf import header
from ..optim.find_pairs import factor_pairs
from ..training.place import ADAPTERS, Place, look
from . import gguf_adapter

SHOWN = 20


@dataclass(frozen=True)
class AdapterSummary:
    """What a file or directory of an adapter holds.

    Attributes:
      kind: its format.
      ranks: the rank of each adapted layer, by name.
      alphas: alphas; empty if the files do not say, and text if they say what is none.
      tensors: shape and dtype of all tensors, by name.
      size: bytes of the files of tensors.
      base: what it says of its base model; None if nothing.
      others: names of tensors that are no factors of LoRA: trained in full, of another method, or a base's.
      is_recorded: whether digests were compared with the files.
      unsupported: why the other commands do not read it; None if they do.
    """

    kind: str
    ranks: Mapping[str, int]
    alphas: Iterable[float | str]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    size: int
    base: str | None = None
    others: list[str] = field(default_factory=list)
    is_recorded: bool = False
    unsupported: str | None = None


def inspect_adapter(place: Path) -> str:
    """Returns a table of what an adapter holds.

    Args:
      place: a run, an adapter directory in this package's format or PEFT's, or what `read_tree` reads; or a GGUF
        adapter.

    Raises:
      ValueError, OSError: it is none of these, or is damaged.
    """
    return _format(place, read_summary(place))


def read_summary(place: Path) -> AdapterSummary:
    """Reads the summary of an adapter; see `inspect_adapter`."""
    found = look(place.parent if place.name in (TENSORS_FILE, WEIGHTS) else place)
    if found.kind in ADAPTERS:
        return _of_peft(found) if found.is_peft else _of_ours(found)
    if (place / "config.json").is_file():  # before gigabytes are read
        raise ValueError(f"{place} is a model, not an adapter")
    if (file := header.find(place)) is not None:
        return _of_gguf(file)
    return _of_library(place)


def _of_ours(place: Place) -> AdapterSummary:
    notes, directory, adapter = place.notes, place.directory, load_adapter(place.directory)
    tensors, config, base = read_tensors(directory / TENSORS_FILE), adapter.config, None
    match notes:
        case {"settings": {"model": {"path": base}}}:
            pass
        case {"base": str(fingerprint)}:
            base = f"weights of fingerprint {fingerprint}"
    return AdapterSummary(
        "adapter of loraplus_jax" + (" with DoRA" if config is not None and config.variant == "dora" else ""),
        {f"{n}/{path}": spec.rank for path, spec in adapter.specs.items() for n in _layers(spec)},
        () if config is None else (config.alpha, *config.alpha_pattern.values()),
        _shapes(tensors),
        (directory / TENSORS_FILE).stat().st_size,
        base=base,
        others=[name for name in tensors if not name.startswith(("lora/", "start/"))],
        is_recorded=FILES in notes,
    )


def _of_peft(place: Place) -> AdapterSummary:
    notes, directory, problem = place.notes, place.directory, None
    values = read_json(directory / OPTIONS)
    try:
        options, _ = read_peft(directory)
        alphas = [options.alpha, *options.alpha_pattern.values()]
    except ValueError as error:
        if not (directory / WEIGHTS).is_file():
            raise
        problem = str(error)
        alphas = [f"{values['lora_alpha']!r:.40}"] if "lora_alpha" in values else []
    tensors = read_tensors(directory / WEIGHTS)
    check_files(place.notes_file, notes)
    if (directory / OWN_TENSORS_FILE).is_file():
        tensors |= read_tensors(directory / OWN_TENSORS_FILE)
    factors = {name: match for name in tensors if (match := FACTOR.fullmatch(name))}
    kinds = [kind for name, kind in {"use_dora": "DoRA", "use_rslora": "rsLoRA"}.items() if values.get(name)]
    files = [file for name in (WEIGHTS, OWN_TENSORS_FILE) if (file := directory / name).is_file()]
    return AdapterSummary(
        "PEFT adapter" + (f" with {' and '.join(kinds)}" if kinds else ""),
        {m[1]: max(tensors[name].shape[:1], default=0) for name, m in factors.items() if m[2] == "A"},
        alphas,
        _shapes(tensors),
        sum(file.stat().st_size for file in files),
        base=values.get("base_model_name_or_path"),
        others=[name for name in tensors if name not in factors and not name.endswith(MAGNITUDE_END)],
        is_recorded=FILES in notes,
        unsupported=problem,
    )


def _of_gguf(file: Path) -> AdapterSummary:
    content = header.read(file)
    if content.one(gguf_adapter.TYPE) != "lora":
        raise ValueError(
            f"{file} is no LoRA adapter: {gguf_adapter.TYPE} is {content.one(gguf_adapter.TYPE)!r:.80}"
        )
    notes = peft_notes(file.parent) or {}
    check_files(file.parent / NOTES_FILE, notes)
    ends = (".weight.lora_a", ".weight.lora_b")
    return AdapterSummary(
        "GGUF adapter",
        {
            n.removesuffix(ends[0]): min(t.shape, default=0)
            for n, t in content.tensors.items()
            if n.endswith(ends[0])
        },
        [content.one(gguf_adapter.ALPHA)],
        {name: (tensor.shape, tensor.dtype) for name, tensor in content.tensors.items()},
        file.stat().st_size,
        base=f"a model of architecture {content.one('general.architecture')!s:.80}",
        others=[name for name in content.tensors if not name.endswith(ends)],
        is_recorded=file.name in notes.get(FILES, {}),
    )


def _of_library(place: Path) -> AdapterSummary:
    tree = read_tree(place)
    pairs = factor_pairs(tree)
    if not pairs:
        raise ValueError(f"{place} has no LoRA factors")
    try:
        problem, library = None, find_recipe(pairs).name
    except ValueError as error:
        problem, library = str(error), "an unknown library"
    factors = {path for pair in pairs.values() for path in pair}
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return AdapterSummary(
        f"factors of {library}",
        {module: _rank(tree[a].shape, tree[b].shape) for module, (a, b) in pairs.items()},
        (),
        _shapes(tree),
        sum(path.stat().st_size for path in files),
        others=[path for path in tree if path not in factors],
        unsupported=problem,
    )


def _layers(spec: AdapterSpec) -> Iterable[int]:
    if spec.kind == "parameter" or not spec.stacked:
        return (0,)
    return spec.layers or range(spec.shape[layer_axis(spec.base_letters, spec.stacked)])


def _rank(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The axis that both sides have, whatever the layout: after those of stacks, the smallest."""
    while min(len(a), len(b)) > 2 and a[0] == b[0]:
        a, b = a[1:], b[1:]
    return min({*a} & {*b}, default=0)


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(x.shape), x.dtype.name) for name, x in tensors.items()}


def _format(place: Path, summary: AdapterSummary) -> str:
    alphas = dict.fromkeys(
        f"{alpha:g}" if isinstance(alpha, float | int) else alpha for alpha in summary.alphas
    )
    numbers = sum(math.prod(shape) for shape, _ in summary.tensors.values())
    ranks, others = {*summary.ranks.values()}, len(summary.others)
    rows = {
        "rank": str(*ranks)
        if len(ranks) == 1
        else _counted(map(str, summary.ranks.values())) or "no factors",
        "alpha": ", ".join(alphas) or "not in the files",
        "targets": _counted(re.split("[./]", name)[-1] for name in summary.ranks) or "none",
        "other tensors": f"{others:,}, such as {summary.others[0]}" if others else "none",
        "dtype": ", ".join(sorted({dtype for _, dtype in summary.tensors.values()})),
        "base": "not in the files" if summary.base is None else f"{summary.base!s:.200}",
        "parameters": f"{numbers:,} in {len(summary.tensors):,} tensors",
        "bytes": f"{summary.size:,}",
        "digests": "as saved" if summary.is_recorded else "none",
    }
    if summary.unsupported is not None:
        rows["unsupported"] = "; ".join(line.strip() for line in summary.unsupported.splitlines())
    lines = [f"{name:{max(map(len, rows))}}  {escape_controls(text)}" for name, text in rows.items()]
    return "\n".join([f"{place}: {summary.kind}", *lines])


def _counted(names: Iterable[str]) -> str:
    counts = Counter(names)
    shown = [f"{name} ({count:,})" for name, count in counts.most_common(SHOWN)]
    return ", ".join([*shown, *([f"and {len(counts) - SHOWN:,} more"] if len(counts) > SHOWN else [])])
