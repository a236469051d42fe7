"""`loraplus export`: a run's adapter for PEFT, or a whole model with the adapter in its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._validation import check_choice, suggest
from ..checkpoint import describe_run, digest_of_lines, fingerprint_line
from ..data.fetch import ASSETS, resolve
from ..interop.adapter_files import Adapter, new_directory, tensor_bytes
from ..interop.peft_files import NOTES_FILE, OWN_TENSORS_FILE, save_peft
from ..models import export
from ..models.gguf import export as gguf_export
from ..models.gguf import load as gguf
from ..models.hf import check_params, load_params
from ..models.merged import CheckpointMerge
from ..settings.schema import Settings
from ..tasks.interface import AdaptedModel
from ..training.init_adapter import (
    find_adapter,
    read_adapter,
    read_notes,
    saved_config,
    transformers_class_of,
)
from ..training.setup import build_model, params_of
from ..tree import flatten, unflatten
from .predict import settings_and_task

DTYPES = {"hf": ("float32", "bfloat16", "float16"), "gguf": tuple(gguf_export.DTYPES)}


class _Source(NamedTuple):
    """What is exported.

    Attributes:
      settings, task: of its run.
      adapter: its tensors.
      parts: its model, of shapes.
      notes: what the adapter says of itself.
      base: where the base is.
      fingerprint: of the base, as the adapter has it.
    """

    settings: Settings
    task: Any
    adapter: Adapter
    parts: AdaptedModel
    notes: Mapping[str, Any]
    base: Path
    fingerprint: str | None


def export_run(
    place: Path, to: Path, *, merged: bool = False, format: str | None = None, dtype: str | None = None
) -> str:
    """Writes a new directory, whole or not at all, and returns what to say of it.

    Args:
      place: a run or an adapter directory, of this package's format or PEFT's.
      to: the directory, which must not exist.
      merged: a whole model instead of an adapter for PEFT.
      format: of a merged model: `"hf"`, the default, or `"gguf"` where the base is a GGUF file.
      dtype: of a merged model's weights, see `DTYPES`; by default what the base's are kept in, float16 for GGUF.

    Raises:
      ValueError, OSError: something does not fit, cannot be read, or is there already.
    """
    if not merged and (format is not None or dtype is not None):
        raise ValueError("--format and --dtype go with --merged; an adapter for PEFT is float32")
    format = format or "hf"
    if format not in DTYPES:
        raise ValueError(f"there is no format {format!r}{suggest(format, DTYPES)}")
    if dtype is not None:
        check_choice(f"--dtype of {format}", dtype, DTYPES[format])
    if to.exists():
        raise ValueError(f"{to} exists already; nothing is overwritten: choose another directory for --to")
    source = _open_source(place)
    if format == "gguf" and gguf.find(source.base) is None:
        raise ValueError(
            f"--format gguf is for models that came from a GGUF file, and {source.base} is none; export it as hf "
            "and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    return _write_merged(source, to, format, dtype) if merged else _write_peft(source, to)


def _open_source(place: Path) -> _Source:
    if (directory := find_adapter(place)) is None:
        raise FileNotFoundError(f"{place} is no run that has ended and no adapter directory")
    notes = read_notes(directory)
    if not {"settings", "task", "base"} <= notes.keys():
        raise ValueError(f"{directory} was not written by loraplus train: its settings are not in it")
    settings, task = settings_and_task(directory, notes)
    config = saved_config(directory)
    base = resolve(settings.model.path, "model")
    parts = build_model(settings, base, task, config)
    adapter = read_adapter(directory, parts, params_of(parts))
    return _Source(settings, task, adapter, parts, notes, base, notes["base"])


def _write_peft(source: _Source, to: Path) -> str:
    if source.adapter.config is None:
        raise ValueError("the model was trained in full and has no adapter: export it with --merged")
    form, base = transformers_class_of(source.parts), source.settings.model.path
    if base in ASSETS or Path(base).expanduser().exists():  # else it is a hub id
        base = str(source.base.resolve())
    kept = _base_leaves(source, [ours for ours, _ in form.heads if ours not in source.parts.base.new])
    extras, own = _split_extras(source, form)
    save_peft(
        to,
        source.adapter.lora,
        source.adapter.specs,
        source.adapter.config,
        export.path_map(source.parts.base.table, form),
        extras=unflatten(kept | flatten(extras)),
        own=own,
        base=source.fingerprint,
        base_model=base,
        task_type=form.task_type,
        readme=_readme(source, form, _USE_ADAPTER, base),
        settings=source.notes["settings"],
        task=source.notes["task"],
    )
    return f"{to}: an adapter for PEFT, {len(source.adapter.specs)} kinds of layers; README.md says how to load it"


def _write_merged(source: _Source, to: Path, format: str, dtype: str | None) -> str:
    parts, adapter = source.parts, source.adapter
    leaves, _ = check_params(source.base, parts.base.table, params_of(parts), new=parts.base.new)
    _base_leaves(source, [])
    form = transformers_class_of(parts)
    extras, own = _split_extras(source, form)
    merge = CheckpointMerge(parts.base.table, leaves, adapter.specs, adapter.lora, adapter.extras)
    notes = describe_run(
        adapter.specs,
        adapter.config,
        base=source.fingerprint,
        merged=True,
        settings=source.notes["settings"],
        task=source.notes["task"],
    )
    with new_directory(to.resolve()) as partial:
        if format == "gguf":
            gguf_export.write_gguf(partial / "model.gguf", source.base, merge, dtype or "float16")
        else:
            new = {path: x for path, x in flatten(extras).items() if path.split("/")[1] in parts.base.new}
            kept = None if dtype is None else jnp.dtype(dtype)
            config = _label_config(source) if form.heads else {}
            export.write_hf(partial, source.base, merge, form, new=unflatten(new), config=config, dtype=kept)
            (partial / "README.md").write_text(_readme(source, form, _USE_MERGED, ""), encoding="utf-8")
        if own:
            (partial / OWN_TENSORS_FILE).write_bytes(tensor_bytes(flatten(own)))
        (partial / NOTES_FILE).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in partial.iterdir())
    return f"{to}: a merged model, {size / 1e6:,.1f} MB"


def _split_extras(source: _Source, form: export.TransformersClass) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables trained in full: those that transformers has too, and those that only we have."""
    shared, own = {}, {}
    for path, leaf in flatten(source.adapter.extras).items():
        is_new = path.split("/")[1] in source.parts.base.new
        (own if is_new and not form.heads else shared)[path] = leaf
    return unflatten(shared), unflatten(own)


def _base_leaves(source: _Source, modules: list[str]) -> dict[str, np.ndarray]:
    """The base's leaves of some modules; all of its leaves are read, one by one, for the fingerprint.

    Raises:
      ValueError: the adapter is for another base.
    """
    parts, lines, kept = source.parts, {}, {}
    frozen, shapes = flatten(parts.frozen), params_of(parts)

    def visit(path: str, array: np.ndarray) -> None:
        leaf = f"params/{path}"
        if leaf in frozen:
            lines[leaf] = fingerprint_line(leaf, jax.device_put(array))
        if path.rpartition("/")[0] in modules:
            kept[leaf] = array

    if frozen:
        load_params(source.base, parts.base.table, shapes, new=parts.base.new, place=visit)
        if (digest := digest_of_lines(lines)) != source.fingerprint:
            raise ValueError(
                f"the adapter belongs to a base with fingerprint {source.fingerprint}, {source.base} has {digest}"
            )
    return kept


def _label_config(source: _Source) -> dict[str, Any]:
    """The head's outputs for `config.json`."""
    names = getattr(source.task, "names", ())
    if not names:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


_USE_ADAPTER = """```python
from peft import PeftModel
from transformers import {cls}

model = {cls}.from_pretrained({base}{labels})
model = PeftModel.from_pretrained(model, "this directory")
```
"""
_USE_MERGED = """```python
from transformers import {cls}

model = {cls}.from_pretrained("this directory")
```
"""


def _readme(source: _Source, form: export.TransformersClass, use: str, base: str) -> str:
    """How to load the directory, and what of the model is not in it as transformers sees it."""
    config, task = source.adapter.config, source.task
    names = getattr(task, "names", ())
    labels = f", num_labels={len(names) or 1}" if form.heads else ""
    title = "An adapter for PEFT" if use is _USE_ADAPTER else "A model with its adapter merged in"
    lines = [f"# {title}", "", f"Base: {source.settings.model.path}. Task: {task.kind}."]
    if config is not None:
        lines.append(
            f"LoRA+ with rank {config.rank}, alpha {config.alpha:g} and lr_ratio {config.lr_ratio:g}."
        )
    where = (
        repr(base)
        if gguf.find(source.base) is None
        else f"{str(source.base.parent)!r}, gguf_file={source.base.name!r}"
    )
    lines += ["", use.format(cls=form.architecture, base=where, labels=labels)]
    if source.parts.base.new and not form.heads:
        pooling = source.settings.model.pooling
        lines += [
            f"transformers has no class whose head stands on the pooling {pooling!r}: it loads the encoder alone. "
            f"The head is in {OWN_TENSORS_FILE}: take the {_POOLED[pooling]}, times params/head/kernel, plus "
            "params/head/bias.",
        ]
    if names:
        lines.append(f"Outputs in this order: {', '.join(names)}.")
    if getattr(task, "kind", "") == "regression":
        lines.append(f"The head's output times {task.std:g} plus {task.mean:g} is the value.")
    return "\n".join(lines).rstrip() + "\n"


_POOLED = {
    "mean": "mean of the hidden states of the tokens that the attention mask keeps",
    "cls": "hidden state of the first token",
}
