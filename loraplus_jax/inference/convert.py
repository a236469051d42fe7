"""`loraplus convert`: writes an adapter of a known library for others, or merged into its base."""

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from .._utils.atomic import atomic_write, to_json
from .._utils.json_files import read_json
from .._utils.records import record_text
from .._utils.validation import check_choice, check_new_path, check_number
from ..adapter.lora import disabled
from ..data.fetch import ASSETS, is_public, resolve
from ..interop.adapter_directory import TENSORS_FILE, load_adapter, save_adapter
from ..interop.library_recipes import NAMES
from ..interop.path_map import PathMap, check_path_map
from ..interop.peft_files import OPTIONS, OWN_TENSORS_FILE, WEIGHTS, save_peft
from ..models.checkpoints import export
from ..models.checkpoints.gguf import load as gguf
from ..models.checkpoints.gguf.adapter import save_gguf_adapter
from ..models.checkpoints.hf import load_config
from ..models.checkpoints.merge import CheckpointMerge, dtype_of
from ..models.checkpoints.named_base import NamedBase, read_named_base
from ..models.families import MODEL_TYPES, family_of
from ..step.fingerprints import fingerprint
from ..tasks.causal_lm import model_config
from ..training.run_files import ADAPTER, SUMMARY
from ..training.saved_adapter import (
    find_adapter,
    is_peft,
    notes_path,
    read_adapter,
    read_notes,
    transformers_class_of,
)
from . import verify_conversion as verify_by
from .convert_sources import (
    OwnSource,
    PeftSource,
    Source,
    TreeSource,
    is_peft_directory,
    temporary_directory_for,
)
from .export import DTYPES, export_run
from .generate import as_instruction_model, open_model
from .predict import describe_adapter, load_tuned
from .verify_conversion import Verified, compare

Target = Literal["peft", "gguf", "loraplus", "merged"]
TARGETS: tuple[Target, ...] = ("peft", "gguf", "loraplus", "merged")
LIBRARIES = (*NAMES, "peft", "levanter", "loraplus")
GGUF_FILE = "adapter.gguf"
_WRITTEN = {
    "peft": "PEFT adapter",
    "gguf": "GGUF adapter",
    "loraplus": "adapter directory",
    "merged": "merged model",
}
_DTYPES = {"merged": DTYPES["hf"], "gguf": DTYPES["gguf"]}
TOLERANCE, LOW_PRECISION, EIGHT_BITS = 1e-5, 5e-3, 5e-2
"""Largest difference relative to the largest output: of float32, of 16-bit and of 8-bit weights or factors."""


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

    Args:
      source: a run or adapter directory of this package, a PEFT directory, or what `read_tree` reads.
      to: one of `TARGETS`.
      out: the new directory.
      base: the base model, a value of `model.path`; by default the one that a run or PEFT adapter names.
      library: one of `LIBRARIES`, where the names fit several.
      scale, alpha: the scale of A B, or alpha of a scale alpha / rank, of a library that stores neither.
      path_map: JSON file with a list of rules `[ours, theirs]` for names that no recipe knows.
      leave_out: regular expressions of tensors to leave out, by path.
      dtype: dtype of the weights of a merged model, or of the factors in a GGUF file.
      no_verify: skip the comparison of the outputs at source and target.
      allow_different: parts of a run's base that may differ from what it was trained on, see `PARTS`.

    Raises:
      ValueError, OSError: an argument or file is invalid, a tensor has no place at the target, or the outputs
        differ; nothing is left at `out`.
    """
    check_choice("--to", to, TARGETS)
    if library is not None:
        check_choice("--from", library, LIBRARIES)
    for name, value in (("--scale", scale), ("--alpha", alpha)):
        if value is not None:
            check_number(name, value, above=0.0)
    if dtype is not None:
        if to not in _DTYPES:
            raise ValueError(
                f"--dtype applies to --to {' or '.join(_DTYPES)}, not to {to}: its factors keep theirs"
            )
        check_choice(f"--dtype with --to {to}", dtype, _DTYPES[to])
    for rule in leave_out:
        try:
            re.compile(rule)
        except re.error as error:
            raise ValueError(f"--leave_out: invalid regular expression {rule!r:.80}: {error}") from None
    check_new_path("--out", out)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    directory = find_adapter(source) if library in (None, "loraplus") else None
    is_run = directory is not None and {"settings", "task", "base"} <= read_notes(directory).keys()
    # The adapter of a loop of one's own, which has no settings.
    is_own = directory is not None and not is_peft(directory) and not is_run
    if library == "loraplus" and not is_run and not is_own:
        raise ValueError(f"{source} is no run and no adapter of loraplus_jax")
    if allow_different and not is_run:
        raise ValueError(f"--allow_different is for a run of loraplus train, {source} is none; leave it out")
    foreign = {"--scale": scale, "--alpha": alpha, "--path_map": path_map, "--leave_out": leave_out or None}
    given = [name for name, value in foreign.items() if value is not None]
    if is_own:
        given = [name for name in given if name != "--path_map"]
    if given and (is_run or is_own or is_peft_directory(source)):
        raise ValueError(f"{source} has its own names and scales; remove {given[0]}")
    rules = _read_path_map(path_map)
    with atomic_write(out.resolve(), new=True) as partial:
        if is_run:
            assert directory is not None
            with _relocated(directory, base) as directory:
                lines = _convert_run(directory, to, partial, dtype, no_verify, allow_different)
            return "\n".join([f"{out}: {lines[0]}", *lines[1:]])
        read: Source
        if is_own:
            assert directory is not None
            if base is None:
                raise ValueError(f"{source} does not name its base model: pass --base")
            read = _own_source(directory, rules, resolve(base, "model"))
        elif library in ("peft", "levanter") or (library is None and is_peft_directory(source)):
            read = PeftSource(source)
            base = base or read.options.base_model
        else:
            options: Any = {"scale": scale, "alpha": alpha, "path_map": rules, "leave_out": leave_out}
            read = TreeSource(source, library, **options)
        if base is None:
            raise ValueError(f"{source} does not name its base model: pass --base")
        lines = _convert_named(read, to, partial, out, base, dtype, no_verify)
        return "\n".join([f"{out}: {lines[0]}", *lines[1:]])


@contextlib.contextmanager
def _relocated(directory: Path, base: str | None) -> Iterator[Path]:
    """A run's adapter directory, or a copy whose settings name another place of the base."""
    if base is None:
        yield directory
        return
    notes = read_notes(directory)
    settings = notes["settings"]
    notes["settings"] = {**settings, "model": {**settings["model"], "path": base}}
    with temporary_directory_for(directory.parent) as folder:
        # In a directory like the run's, as the model card reads its summary.
        copy = folder / ADAPTER
        shutil.copytree(directory, copy)
        if directory.name == ADAPTER and (directory.parent / SUMMARY).is_file():
            shutil.copyfile(directory.parent / SUMMARY, folder / SUMMARY)
        files = [name for name in (TENSORS_FILE, WEIGHTS, OWN_TENSORS_FILE) if (copy / name).is_file()]
        notes_path(copy).write_text(record_text(notes, copy, files), encoding="utf-8")
        yield copy


def _convert_run(
    directory: Path, to: str, partial: Path, dtype: str | None, no_verify: bool, allow: Sequence[str]
) -> list[str]:
    """Converts an adapter with training settings; returns lines for the summary."""
    if to != "loraplus":
        form = "gguf" if to == "gguf" else None
        options: Any = {"merged": to == "merged", "format": form, "dtype": dtype}
        about = export_run(directory, partial, allow_different=allow, **options)
        lines = [about.partition(": ")[2]]
    elif not is_peft(directory):
        shutil.copytree(directory, partial)
        lines = ["adapter directory, copied"]
    else:
        tuned = load_tuned(directory, allow_different=allow)
        own = {
            name: value
            for name, value in tuned.notes.items()
            if name in ("base", "settings", "task", "identity")
        }
        config, parts = tuned.settings.applied, tuned.parts
        save_adapter(partial, parts.trainable, parts.specs, config, **own)
        lines = ["adapter directory"]
    if no_verify:
        return [*lines, "not verified (--no_verify)"]
    described = describe_adapter(directory, None, allow)
    adapter = read_adapter(directory, described.parts)
    is_checkpoint = described.settings.is_language and gguf.find(described.base) is None
    if to != "loraplus" and is_checkpoint and adapter.config is not None:
        # In float32, on the original weights, and rounded as in the files: a run may compute with others.
        parts = described.parts
        source = OwnSource(
            directory, adapter, export.path_map(parts.base.table, transformers_class_of(parts))
        )
        return [*lines, _format(_verify(source, read_named_base(described.base), to, partial, dtype))]
    tuned = load_tuned(directory, allow_different=allow)
    if tuned.settings.model.quantize in ("nf4", "int8") and to in ("merged", "gguf"):
        return [*lines, "not verified: the run has a quantized base, and this is for the original weights"]
    trainable = {name: disabled(x) if name == "lora" else x for name, x in tuned.parts.trainable.items()}
    plain = verify_by.tuned_outputs(tuned._replace(parts=tuned.parts._replace(trainable=trainable)))
    if to == "gguf":
        named = read_named_base(tuned.base)
        outputs = verify_by.our_logits(named.source, _gguf_weights(partial, named))
    else:
        outputs = verify_by.tuned_outputs(load_tuned(partial, allow_different=allow))
    verified = compare(
        "outputs", "loraplus", plain, verify_by.tuned_outputs(tuned), outputs, _tolerance(to, dtype, None)
    )
    return [*lines, _format(verified)]


def _own_source(directory: Path, rules: PathMap, base: Path) -> OwnSource:
    """The adapter of a loop of one's own; without rules, of a model of this package."""
    if not rules:
        values: Any = load_config(base)
        if values.get("model_type") not in MODEL_TYPES:
            raise ValueError(
                f"{directory} has the module names of your model: pass --path_map with those of transformers"
            )
        config = model_config(base)
        table = family_of(config.model_type).name_table(config)
        rules = export.path_map(table, export.causal_lm_class(config))
    return OwnSource(directory, load_adapter(directory), rules)


def _convert_named(
    source: Source, to: str, partial: Path, out: Path, base_name: str, dtype: str | None, no_verify: bool
) -> list[str]:
    """Converts an adapter for a checkpoint by the names of its tensors; returns lines for the summary."""
    base = read_named_base(resolve(base_name, "model"))
    named = source.read(base)
    # A Hub id stays one: a path of this machine's cache would mean nothing elsewhere.
    is_hub_id = base_name not in ASSETS and is_public(base_name, "model")
    name = base_name if is_hub_id else str(base.source.resolve())
    adapter, form = named.adapter, base.transformers_class()
    assert adapter.config is not None
    lines = [f"{_WRITTEN[to]} with {len(adapter.specs)} adapted layers, from {source.about}"]

    def write_peft(directory: Path) -> None:
        if isinstance(source, PeftSource) and not source.needs_rewriting(base):
            _copy_peft(source.directory, directory, name)
            return
        save_peft(
            directory,
            adapter.lora,
            adapter.specs,
            adapter.config,  # pyright: ignore[reportArgumentType]
            named.path_map,
            extras=adapter.extras or None,
            base_model=name,
            task_type=form.task_type,
        )
        # Our notes would be for a model with the names of the file, which none of ours has.
        (directory / "loraplus.json").unlink()

    if to == "peft":
        write_peft(partial)
    elif to == "merged":
        table, leaves = base.table()
        merge = CheckpointMerge(table, leaves, adapter.specs, adapter.lora, adapter.extras)
        partial.mkdir()
        weights_dtype = None if dtype is None else jnp.dtype(dtype)
        export.write_hf(partial, base.source, merge, form, new={}, config={}, dtype=weights_dtype)
    else:
        with temporary_directory_for(out) as folder:
            write_peft(folder / "peft")
            if to == "gguf":
                lines += _write_gguf(partial, folder / "peft", base.source, dtype)
            elif not verify_by.is_known(base):
                raise ValueError(
                    f"--to loraplus requires a base of a model of this package, got model_type "
                    f"{base.config.get('model_type')!r:.80}; use --to peft or merged"
                )
            else:
                _write_ours(partial, folder / "peft")
    if no_verify:
        return [*lines, "not verified (--no_verify)"]
    return [*lines, _format(_verify(source, base, to, partial, dtype))]


def _write_ours(partial: Path, peft: Path) -> None:
    """Writes an adapter directory that `loraplus generate` opens on its own."""
    tuned = as_instruction_model(open_model(str(peft), None, None, None, ()))
    parts, settings = tuned.parts, tuned.settings
    notes = {
        "settings": {name: value for name, value in settings.to_json().items() if name != "output_dir"},
        "task": tuned.task.notes(),
        "identity": tuned.identity,
    }
    save_adapter(
        partial, parts.trainable, parts.specs, settings.applied, base=fingerprint(parts.frozen), **notes
    )


def _write_gguf(partial: Path, peft: Path, base: Path, dtype: str | None) -> list[str]:
    """Writes llama.cpp's adapter file; returns lines for the summary, such as on scales that are in B."""
    partial.mkdir()
    saved = save_gguf_adapter(partial / GGUF_FILE, peft, base, dtype=dtype or "float16")
    return saved.describe().partition(": ")[2].split("\n")


def _gguf_weights(directory: Path, base: NamedBase) -> dict[str, np.ndarray]:
    """The base's tensors with the adapter of a GGUF file, float32."""
    weights, modules = {}, [name.removesuffix(".weight") for name in base.tensors]
    for module, change in verify_by.gguf_changes(directory / GGUF_FILE, base.config, modules).items():
        total = base.weight(module) + change
        weights[f"{module}.weight"] = total.T if base.is_conv1d(module) else total
    return weights


def _verify(source: Source, base: NamedBase, to: str, partial: Path, dtype: str | None) -> Verified:
    """Compares outputs at the source, from its tensors and the recipe alone, and at the target, read back."""
    weights = dict(source.weights(base))
    is_low = False
    if to == "merged":  # compared with the same rounding to the dtypes of the files
        stored = {name: view.get_dtype() for name, view in read_named_base(partial).tensors.items()}
        for name, view in base.tensors.items():
            if name in weights or (name in stored and stored[name] != view.get_dtype()):
                value = weights[name] if name in weights else np.asarray(view[:], np.float32)
                weights[name] = value.astype(dtype_of(stored[name])).astype(np.float32)
                is_low |= stored[name] != "F32"
    tolerance = _tolerance(to, dtype, is_low)
    if not verify_by.is_known(base):
        if to == "merged":
            written = read_named_base(partial)
            found = {name: np.asarray(written.tensors[name][:], np.float32) for name in weights}
        else:
            found = dict(PeftSource(partial).weights(base)) if to == "peft" else _gguf_weights(partial, base)
        names = {*weights, *found}
        plain, at_source, at_target = (
            verify_by.layer_outputs(base, names, each) for each in ({}, weights, found)
        )
        return compare("outputs of the adapted layers", "loraplus", plain, at_source, at_target, tolerance)
    # transformers reads no GGUF file by its path.
    if to in ("peft", "merged") and verify_by.has_peft() and gguf.find(base.source) is None:
        plain, at_source = (verify_by.torch_logits(base.source, changed=each) for each in ({}, weights))
        if to == "peft":
            at_target = verify_by.torch_logits(base.source, adapter=partial)
        else:
            at_target = verify_by.torch_logits(partial)
        return compare(
            "logits", "PEFT" if to == "peft" else "transformers", plain, at_source, at_target, tolerance
        )
    plain, at_source = (verify_by.our_logits(base.source, each) for each in ({}, weights))
    by = "loraplus"
    if to == "gguf":
        by, at_target = "gguf and loraplus", verify_by.our_logits(base.source, _gguf_weights(partial, base))
    elif to == "merged":
        at_target = verify_by.our_logits(partial)
    else:
        at_target = verify_by.opened_logits(partial)
    return compare("logits", by, plain, at_source, at_target, tolerance)


def _tolerance(to: str, dtype: str | None, is_low: bool | None) -> float:
    if dtype == "q8_0":
        return EIGHT_BITS
    if is_low is None:
        is_low = to == "merged" and dtype not in (None, "float32")
    return LOW_PRECISION if is_low or (to == "gguf" and dtype != "float32") else TOLERANCE


def _format(verified: Verified) -> str:
    return (
        f"verified by {verified.by}: {verified.what} differ by at most {verified.difference:.2g} (they are up to "
        f"{verified.size:.3g}; the adapter changes them by up to {verified.effect:.3g})"
    )


def _copy_peft(source: Path, target: Path, base: str) -> None:
    """Copies PEFT's two files; the config names the base."""
    target.mkdir()
    options = {**read_json(source / OPTIONS), "base_model_name_or_path": base}
    (target / OPTIONS).write_text(to_json(options, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)


def _read_path_map(file: Path | None) -> PathMap:
    if file is None:
        return ()
    content = read_json(file)
    rules = content.get("rules")
    if not isinstance(rules, list) or not all(isinstance(rule, list) for rule in rules):
        raise ValueError(f'{file} must be {{"rules": [[ours, theirs], ...]}}, got {content!r:.80}')
    try:
        check_path_map([tuple(rule) for rule in rules])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    return tuple(tuple(rule) for rule in rules)
