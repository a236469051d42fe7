"""`loraplus convert`: writes an adapter of a known library for others, or merged into its base."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._utils.atomic import atomic_write
from .._utils.json_files import read_json
from .._utils.records import DIGEST, FILES, record_text
from .._utils.validation import check_choice, check_new_path, check_number, suggest
from ..adapter.lora import disabled
from ..adapter.tree import flatten
from ..data.fetch import resolve
from ..interop.adapter_directory import Adapter, check_finite, load_adapter, save_adapter
from ..interop.library_recipes import NAMES
from ..interop.path_map import PathMap, check_path_map, torch_module_of
from ..interop.peft_files import NOTES_FILE, OPTIONS, peft_options, save_peft
from ..models.checkpoints.gguf.file import GgufFile
from ..models.checkpoints.model_files import ModelFiles
from ..models.checkpoints.transformers_class import causal_lm_class
from ..models.checkpoints.transformers_class import path_map as transformers_path_map
from ..models.families import family_of
from ..models.files import open_files
from ..step.fingerprints import fingerprint
from ..step.run_metadata import describe_run
from ..tasks.causal_lm import model_config
from ..training.memory import free_bytes, free_host_bytes
from ..training.place import ADAPTERS, Place, look
from ..training.provenance import MODEL_PARTS, check_allowed
from ..training.saved_adapter import read_adapter, transformers_class_of
from . import verify_conversion as verify_by
from .checkpoint_merge import CheckpointMerge, dtype_of
from .convert_sources import (
    OwnSource,
    PeftSource,
    Source,
    TreeSource,
    temporary_directory_for,
)
from .export import DTYPES, export_run, lasting_name
from .gguf_adapter import save_gguf_adapter
from .named_base import NamedBase, named_base
from .tuned_model import describe, describe_language, load, look_model, settings_and_task
from .verify_conversion import Verified, compare
from .write_hf import write_hf

GGUF_FILE = "adapter.gguf"
_WRITTEN = {
    "peft": "PEFT adapter",
    "gguf": "GGUF adapter",
    "loraplus": "adapter directory",
    "merged": "merged model",
}
_DTYPES = {"merged": DTYPES["hf"], "gguf": DTYPES["gguf"]}
TOLERANCE, LOW_PRECISION, EIGHT_BITS = 1e-5, 5e-3, 5e-2
"""Largest difference of float32, of 16-bit and of 8-bit numbers, relative to the largest output; of a GGUF adapter,
of which only the factors are rounded, relative to what the adapter changes."""


def convert(
    source: Path,
    to: str,
    out: Path,
    *,
    base: str | None = None,
    library: str | None = None,
    scale: float | None = None,
    alpha: float | None = None,
    path_map: Path | None = None,
    leave_out: Sequence[str] = (),
    dtype: str | None = None,
    no_verify: bool = False,
    allow_different: Sequence[str] = (),
) -> str:
    """Converts an adapter to a new directory, atomically; returns a summary.

    For the arguments see `loraplus convert --help`. If it raises, also since the outputs differ, nothing is left at
    `out`.
    """
    for name, value in (("--scale", scale), ("--alpha", alpha)):
        if value is not None:
            check_number(name, value, above=0.0)
    if dtype is not None:
        check_choice(f"--dtype with --to {to}", dtype, _DTYPES[to])
    for rule in leave_out:
        try:
            re.compile(rule)
        except re.error as error:
            raise ValueError(f"--leave_out: invalid regular expression {rule!r:.80}: {error}") from None
    check_allowed(allow_different, MODEL_PARTS)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    place = look(source)
    check_new_path("--out", out, outside=[place.directory])
    kind = _kind_of(place, library)
    options = {"--scale": scale, "--alpha": alpha, "--path_map": path_map, "--leave_out": leave_out or None}
    options["--allow_different"] = allow_different or None
    if given := [name for name, value in options.items() if value is not None and name not in _OPTIONS[kind]]:
        raise ValueError(f"{given[0]} does not apply to {source}, {_KINDS[kind]}; remove it")
    rules = _read_path_map(path_map)
    with atomic_write(out.resolve(), new=True) as partial:
        if kind == "run":
            moved = None if base is None else lasting_name(base, resolve(base, "model"))
            lines = _convert_run(place, moved, to, partial, dtype, no_verify, allow_different)
            return "\n".join([f"{out}: {lines[0]}", *lines[1:]])
        if kind == "peft":
            base = base or peft_options(place.directory).base_model
        if base is None:
            raise ValueError(f"{source} does not name its base model: pass --base")
        named = named_base(open_files(resolve(base, "model")))
        read: Source
        if kind == "loop":
            read = _own_source(place.directory, rules, path_map, named)
        elif kind == "peft":
            read = PeftSource(place.directory)
            named = read.base_for(named)
        else:
            read = TreeSource(
                source,
                library,
                scale=scale,
                alpha=alpha,
                path_map=rules,
                leave_out=leave_out,
                allow_different=allow_different,
            )
        name = lasting_name(base, named.files.path)
        if isinstance(read, PeftSource) and read.options.target_parameters and to == "loraplus":
            lines = _convert_parameters(read, partial, named, name, no_verify)
        else:
            lines = _convert_named(read, to, partial, named, name, dtype, no_verify)
        return "\n".join([f"{out}: {lines[0]}", *lines[1:]])


_KINDS = {
    "run": "a run of loraplus train",
    "loop": "an adapter of this package",
    "peft": "a PEFT adapter",
    "tree": "factors of another library",
}
_OPTIONS = {
    "run": ("--allow_different",),
    "loop": ("--path_map",),
    "peft": (),
    "tree": ("--scale", "--alpha", "--path_map", "--leave_out", "--allow_different"),
}
"""Which options apply to which kind of source."""


def _kind_of(place: Place, library: str | None) -> str:
    """The kind of a source, one of `_KINDS`; raises ValueError if `--from` says another one."""
    kind = place.kind if place.kind in ADAPTERS else "tree"
    libraries = {"run": ("loraplus",), "loop": ("loraplus",), "peft": ("peft", "levanter"), "tree": NAMES}
    # What this package exports for PEFT is both.
    if kind == "run" and place.is_peft and library in libraries["peft"]:
        kind = "peft"
    if library is not None and library not in libraries[kind]:
        raise ValueError(f"{place.path} is {_KINDS[kind]}; remove --from {library}")
    return kind


def _convert_run(
    place: Place,
    base: str | None,
    to: str,
    partial: Path,
    dtype: str | None,
    no_verify: bool,
    allow: Sequence[str],
) -> list[str]:
    """Converts an adapter with training settings; returns lines for the summary."""
    directory = place.directory
    if base is None:
        try:
            resolve(settings_and_task(place)[0].model.path, "model")
        except ValueError as error:
            raise ValueError(f"{directory}: {error}; or pass --base with its new place") from None
    described = describe(place, base=base, allow_different=allow)
    adapter = read_adapter(place, described.parts)
    check_finite(directory, adapter.lora)
    if to != "loraplus":
        form = "gguf" if to == "gguf" else "hf"
        options: Any = {"merged": to == "merged", "format": form, "dtype": dtype}
        about = export_run(directory, partial, base=base, allow_different=allow, **options)
        lines = [about.partition(": ")[2]]
    else:
        made_anew = {*describe_run({}, None), DIGEST, FILES} - {"base"}
        own = {name: value for name, value in described.place.notes.items() if name not in made_anew}
        trainable = {"lora": adapter.lora, **adapter.extras}
        save_adapter(partial, trainable, adapter.specs, adapter.config, start=adapter.start or None, **own)
        lines = ["adapter directory"]
    if no_verify:
        return [*lines, "not verified (--no_verify)"]
    is_checkpoint = described.settings.is_language and not isinstance(described.base, GgufFile)
    if to != "loraplus" and is_checkpoint and adapter.config is not None:
        # In float32, on the original weights, and rounded as in the files: a run may compute with others.
        parts = described.parts
        source = OwnSource(
            directory, adapter, transformers_path_map(parts.base.table, transformers_class_of(parts))
        )
        return [*lines, _verify(source, adapter, named_base(described.base), to, partial, dtype)]
    tuned = load(described)
    if tuned.settings.model.quantize in ("nf4", "int8") and to in ("merged", "gguf"):
        return [*lines, "not verified: the run has a quantized base, and this is for the original weights"]
    trainable = {name: disabled(x) if name == "lora" else x for name, x in tuned.parts.trainable.items()}
    plain = verify_by.tuned_outputs(tuned._replace(parts=tuned.parts._replace(trainable=trainable)))
    at_source = verify_by.tuned_outputs(tuned)
    named = named_base(tuned.base)
    del tuned, trainable  # so that no two models are in memory
    if to == "gguf":
        outputs = verify_by.our_logits(named, dict(_gguf_weights(partial, named)))
    else:
        outputs = verify_by.tuned_outputs(load(describe(look(partial), allow_different=allow)))
    is_low = to == "merged" and dtype not in (None, "float32")
    allowed = LOW_PRECISION if is_low else TOLERANCE, _effect_tolerance(to, dtype)
    verified = compare("outputs", "loraplus", plain, at_source, outputs, *allowed)
    return [*lines, _format(verified)]


def _own_source(directory: Path, rules: PathMap, file: Path | None, base: NamedBase) -> OwnSource:
    """The adapter of a loop of one's own; without rules, of a model of this package."""
    adapter = load_adapter(directory)
    if not rules:
        if not verify_by.is_known(base):
            raise ValueError(
                f"{directory} has the module names of your model: pass --path_map with those of transformers"
            )
        config = model_config(base.files)
        table = family_of(config.model_type).name_table(config)
        rules = transformers_path_map(table, causal_lm_class(config))
    modules = {*adapter.specs, *(path.rpartition("/")[0] for path in adapter.specs)}
    modules |= {path.removeprefix("params/").rpartition("/")[0] for path in flatten(adapter.extras)}
    unused = [rule[0] for rule in rules if not any(torch_module_of([rule], module) for module in modules)]
    if file is not None and unused:
        raise ValueError(
            f"{file}: {unused[0]!r} is the path of no module of {directory}{suggest(unused[0], modules)}"
        )
    return OwnSource(directory, adapter, rules)


def _convert_named(
    source: Source,
    to: str,
    partial: Path,
    base: NamedBase,
    name: str,
    dtype: str | None,
    no_verify: bool,
) -> list[str]:
    """Converts an adapter for a checkpoint, called `name`; returns lines for the summary."""
    named = source.read(base)
    adapter, form = named.adapter, base.transformers_class()
    assert adapter.config is not None
    check_finite(source.place, adapter.lora)
    lines = [f"{_WRITTEN[to]} with {len(adapter.specs)} adapted layers, from {source.about}"]

    def write_peft(directory: Path) -> None:
        save_peft(
            directory,
            adapter.lora,
            adapter.specs,
            adapter.config,  # pyright: ignore[reportArgumentType]
            named.path_map,
            extras=adapter.extras or None,
            modules=base.modules,
            base_model=name,
            task_type=source.options.task_type if isinstance(source, PeftSource) else form.task_type,
        )
        # Our notes would be for a model with the names of the file, which none of ours has.
        (directory / NOTES_FILE).unlink()

    if to == "peft":
        write_peft(partial)
    elif to == "merged":
        table, leaves = base.table()
        merge = CheckpointMerge(table, leaves, adapter.specs, adapter.lora, adapter.extras)
        partial.mkdir()
        new, config, weights_dtype = {}, {}, None if dtype is None else jnp.dtype(dtype)
        if base.is_untied:
            config = {"tie_word_embeddings": False}
            lines.append("its head, tied to the embedding in the base, has a weight of its own now")
            if "lm_head.weight" not in base.files.tensors:
                head = base.tensors["lm_head.weight"]
                value = merge.value("lm_head.weight", lambda _: head[:]).astype(dtype_of(head.get_dtype()))
                new = {"params": {"lm_head": {"kernel": value.T}}}
        write_hf(partial, base.files, merge, form, new=new, config=config, dtype=weights_dtype)
    else:
        peft = partial.with_name("peft")
        write_peft(peft)
        if to == "gguf":
            written = _write_gguf(partial, peft, base.files, dtype)
            lines = [f"{written[0]}, from {source.about}", *written[1:]]
        else:
            _check_known(base)
            _write_ours(partial, peft)
    if to != "loraplus":  # whose own description has the digests
        # All of them: nothing else says what is in the configs.
        files = sorted(path.name for path in partial.iterdir())
        (partial / NOTES_FILE).write_text(
            record_text(describe_run({}, None), partial, files), encoding="utf-8"
        )
    if no_verify:
        return [*lines, "not verified (--no_verify)"]
    return [*lines, _verify(source, adapter, base, to, partial, dtype)]


def _convert_parameters(
    source: PeftSource, partial: Path, base: NamedBase, name: str, no_verify: bool
) -> list[str]:
    """Converts an adapter of parameters of experts, which have several tensors each in the base's file."""
    _check_known(base)
    # PEFT alone computes such an adapter by other means than those that wrote it.
    reasons = {
        "--no_verify": no_verify,
        "torch, transformers and PEFT are not installed": not verify_by.has_peft(),
        "transformers does not read the GGUF file": isinstance(base.files, GgufFile),
    }
    skipped = next((reason for reason, holds in reasons.items() if holds), None)
    if skipped is None and (needed := 2 * _float32_bytes(base)) > (free := _free_bytes()):
        raise ValueError(f"cannot verify within the memory: {_needs(needed, free)}; pass --no_verify")
    with temporary_directory_for(source.place) as folder:
        source.copy(folder, base)
        options = read_json(folder / OPTIONS) | {"base_model_name_or_path": name}
        (folder / OPTIONS).write_text(json.dumps(options), encoding="utf-8")
        _write_ours(partial, folder)
        adapter = load_adapter(partial)
        check_finite(source.place, adapter.lora)
        lines = [f"{_WRITTEN['loraplus']} with {len(adapter.specs)} adapted parameters, from {source.about}"]
        if skipped is not None:
            return [*lines, f"not verified ({skipped})"]
        plain = verify_by.torch_logits(base)
        at_source = verify_by.torch_logits(base, adapter=folder)
    verified = compare("logits", "PEFT", plain, at_source, verify_by.opened_logits(partial), TOLERANCE)
    return [*lines, _format(verified)]


def _check_known(base: NamedBase) -> None:
    if not verify_by.is_known(base):
        raise ValueError(
            f"--to loraplus requires a base of a model of this package, got model_type "
            f"{base.config.get('model_type')!r:.80}; use --to peft or merged"
        )


def _write_ours(partial: Path, peft: Path) -> None:
    """Writes an adapter directory that `loraplus generate` opens on its own."""
    tuned = load(describe_language(look_model(str(peft))))
    parts, config = tuned.parts, tuned.settings.applied
    notes = tuned.origin
    save_adapter(partial, parts.trainable, parts.specs, config, base=fingerprint(parts.frozen), **notes)


def _write_gguf(partial: Path, peft: Path, base: ModelFiles, dtype: str | None) -> list[str]:
    """Writes llama.cpp's adapter file; returns lines for the summary, such as on scales that are in B."""
    partial.mkdir()
    saved = save_gguf_adapter(partial / GGUF_FILE, peft, base, dtype=dtype or "float16")
    return saved.describe().partition(": ")[2].split("\n")


def _gguf_weights(directory: Path, base: NamedBase) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the base's tensors with the adapter of a GGUF file, float32."""
    modules = [name.removesuffix(".weight") for name in base.tensors]
    for module, change in verify_by.gguf_changes(directory / GGUF_FILE, base.config, modules):
        total = base.weight(module) + change
        yield f"{module}.weight", total.T if base.is_conv1d(module) else total


def _effect_tolerance(to: str, dtype: str | None) -> float:
    """The share of what the adapter changes that may differ: in a GGUF adapter only the factors are rounded."""
    return 0.0 if to != "gguf" or dtype == "float32" else EIGHT_BITS if dtype == "q8_0" else LOW_PRECISION


def _verify(
    source: Source, adapter: Adapter, base: NamedBase, to: str, partial: Path, dtype: str | None
) -> str:
    """Compares outputs at the source, from its tensors and the recipe alone, and at the target, read back."""
    written = named_base(open_files(partial)) if to == "merged" else base._replace(tensors={})
    # Of a merged model compared with the same rounding to the dtypes of the files.
    stored = {name: view.get_dtype() for name, view in written.tensors.items()}
    rounded = {n for n, view in base.tensors.items() if n in stored and stored[n] != view.get_dtype()}

    def at_source(others: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        names = set()
        unchanged = ((n, np.asarray(base.tensors[n][:], np.float32)) for n in others if n not in names)
        for name, value in itertools.chain(source.weights(base), unchanged):
            names.add(name)
            yield name, value.astype(dtype_of(stored[name])).astype(np.float32) if stored else value

    tolerance_of = lambda n: TOLERANCE if stored.get(n, "F32") == "F32" else LOW_PRECISION  # noqa: E731
    of_effect = _effect_tolerance(to, dtype)
    is_known = verify_by.is_known(base) and not (base.is_untied and to == "peft" and not verify_by.has_peft())
    # transformers reads no GGUF file by its path.
    by_torch = to in ("peft", "merged") and verify_by.has_peft() and not isinstance(base.files, GgufFile)
    whole = _float32_bytes(base)
    adapted = 4 * sum(math.prod(spec.shape) for spec in adapter.specs.values())
    adapted += 4 * sum(np.size(leaf) for leaf in flatten(adapter.extras).values())
    # The base twice: loading and the compiled program copy it in part.
    needed = 2 * whole + (whole if rounded else adapted) + (adapted if to == "gguf" else 0)
    free = free_host_bytes() if by_torch else _free_bytes()
    if not is_known or needed > free:
        if to == "loraplus":
            at_target = _own_source(partial, (), None, base).weights(base)
        elif to == "merged":
            at_target = ((n, np.asarray(written.tensors[n][:], np.float32)) for n in stored)
        else:
            at_target = PeftSource(partial).weights(base) if to == "peft" else _gguf_weights(partial, base)
        text = _format(verify_by.compare_layers(base, at_source(stored), at_target, tolerance_of, of_effect))
        return f"{text}; {_needs(needed, free)}" if is_known else text
    weights = dict(at_source(rounded))
    tolerance = max(map(tolerance_of, weights), default=TOLERANCE)
    if by_torch:
        plain, source_logits = (verify_by.torch_logits(base, changed=each) for each in ({}, weights))
        if to == "peft":
            at_target = verify_by.torch_logits(base, adapter=partial)
        else:
            at_target = verify_by.torch_logits(written)
        by = "PEFT" if to == "peft" else "transformers"
        return _format(compare("logits", by, plain, source_logits, at_target, tolerance))
    plain, source_logits = (verify_by.our_logits(base, each) for each in ({}, weights))
    by = "loraplus"
    if to == "gguf":
        by, at_target = "gguf and loraplus", verify_by.our_logits(base, dict(_gguf_weights(partial, base)))
    elif to == "merged":
        at_target = verify_by.our_logits(written)
    else:
        at_target = verify_by.opened_logits(partial)
    return _format(compare("logits", by, plain, source_logits, at_target, tolerance, of_effect))


def _float32_bytes(base: NamedBase) -> int:
    return 4 * sum(math.prod(view.get_shape()) for view in base.tensors.values())


def _free_bytes() -> int:
    """Free memory for weights that pass through the host to JAX's device."""
    return min(free_host_bytes(), free_bytes(jax.local_devices()[0]))


def _needs(needed: int, free: int) -> str:
    return f"logits in float32 need about {needed / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free"


def _format(verified: Verified) -> str:
    return (
        f"verified by {verified.by}: {verified.what} differ by at most {verified.difference:.2g} (they are up to "
        f"{verified.size:.3g}; the adapter changes them by up to {verified.effect:.3g})"
    )


def _read_path_map(file: Path | None) -> PathMap:
    if file is None:
        return ()
    content = read_json(file, links="any")
    rules = content.get("rules")
    if not isinstance(rules, list) or not all(isinstance(rule, list) for rule in rules):
        raise ValueError(f'{file} must be {{"rules": [[ours, theirs], ...]}}, got {content!r:.80}')
    try:
        check_path_map([tuple(rule) for rule in rules])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    return tuple(tuple(rule) for rule in rules)
