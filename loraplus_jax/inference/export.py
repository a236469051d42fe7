"""`loraplus export`: writes a PEFT adapter, or a merged model with the adapter in its weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._utils.atomic import atomic_write
from .._utils.records import record_text
from .._utils.validation import check_choice, check_new_path, expand_path
from ..adapter.tree import flatten, leaves_by_path, unflatten
from ..data.fetch import ASSETS, resolve
from ..inits.from_weights import as_difference
from ..interop.adapter_files import Adapter, tensor_bytes
from ..interop.peft_files import NOTES_FILE, OWN_TENSORS_FILE, save_peft
from ..models.checkpoints import export
from ..models.checkpoints.gguf import export as gguf_export
from ..models.checkpoints.gguf import load as gguf
from ..models.checkpoints.hf import check_params, load_params, values_digest
from ..models.checkpoints.merge import CheckpointMerge
from ..settings.schema import Settings
from ..step.checkpoint import describe_run
from ..step.fingerprints import digest_of_lines, fingerprint_line
from ..tasks.interface import AdaptedModel
from ..training.provenance import Identity, check_allowed, check_identity, model_identity
from ..training.saved_adapter import (
    read_adapter,
    read_notes,
    require_adapter,
    saved_config,
    transformers_class_of,
)
from ..training.setup import build_model, params_of
from .predict import settings_and_task

DTYPES = {"hf": ("float32", "bfloat16", "float16"), "gguf": tuple(gguf_export.DTYPES)}


class _Source(NamedTuple):
    """The run to export, and its base model.

    Attributes:
      settings, task: settings and task of the run.
      adapter: tensors of the adapter.
      parts: the model, with shapes instead of weights.
      notes: metadata of the adapter.
      base: path of the base model.
      identity: identity of the base model and of the training data.
      allow: parts of the identity that may differ from the adapter's.
    """

    settings: Settings
    task: Any
    adapter: Adapter
    parts: AdaptedModel
    notes: Mapping[str, Any]
    base: Path
    identity: Identity
    allow: Sequence[str]


def export_run(
    place: Path,
    to: Path,
    *,
    merged: bool = False,
    dequantized: bool = False,
    format: str | None = None,
    dtype: str | None = None,
    base_model: str | None = None,
    allow_different: Sequence[str] = (),
) -> str:
    """Exports a run to a new directory, atomically, and returns a one-line summary.

    Args:
      place: a run or an adapter directory, in this package's format or PEFT's.
      to: the directory to create; must not exist.
      merged: write the whole model with the adapter merged in, instead of a PEFT adapter.
      dequantized: merge into the values of the base as `model.quantize` packed them, instead of the checkpoint's.
      format: file format of a merged model: `"hf"` (default), or `"gguf"` if the base is a GGUF file.
      dtype: dtype of a merged model's weights, see `DTYPES`; by default the base's for hf, float16 for gguf.
      base_model: the name or path by which PEFT finds the base; by default the run's hub id or local path.
      allow_different: parts of the base model that may differ from what the run was trained on, see `PARTS`.

    Raises:
      ValueError, OSError: options or files do not match, a file cannot be read, or `to` exists.
    """
    if not merged and (format is not None or dtype is not None):
        raise ValueError("--format and --dtype require --merged; a PEFT adapter is always float32")
    if dequantized and not merged:
        raise ValueError("--dequantized requires --merged; a PEFT adapter holds no weight of the base")
    if merged and base_model is not None:
        raise ValueError(f"--base_model applies to a PEFT adapter, not to --merged; got {base_model!r}")
    if base_model is not None and not base_model.strip():
        raise ValueError(
            f"--base_model must be a Hub id or a path, got {base_model!r}; leave it out for the run's model"
        )
    format = format or "hf"
    check_choice("--format", format, tuple(DTYPES))
    if dtype is not None:
        check_choice(f"--dtype with --format {format}", dtype, DTYPES[format])
    check_new_path("--to", to)
    source = _open_source(place, allow_different, dequantized=dequantized)
    if dequantized and source.settings.model.quantize == "none":
        raise ValueError(
            "--dequantized requires a run with model.quantize nf4, int8 or file; this one has none"
        )
    if format == "gguf" and gguf.find(source.base) is None:
        raise ValueError(
            f"--format gguf requires a GGUF base model, got {source.base}; use --format hf and convert "
            "the result with llama.cpp's convert_hf_to_gguf.py"
        )
    return (
        _write_merged(source, to, format, dtype, dequantized)
        if merged
        else _write_peft(source, to, base_model)
    )


def _open_source(path: Path, allow: Sequence[str], *, dequantized: bool) -> _Source:
    check_allowed(allow)
    directory = require_adapter(path)
    notes = read_notes(directory)
    if not {"settings", "task", "base"} <= notes.keys():
        raise ValueError(f"{directory} has no training settings; export a run or adapter from loraplus train")
    settings, task = settings_and_task(directory, notes)
    config = saved_config(directory)
    base = resolve(settings.model.path, "model")
    identity = model_identity(settings, base, task)
    check_identity(directory, notes, identity, allow=allow)
    parts = build_model(settings, base, task, config)
    adapter = read_adapter(directory, parts, params_of(parts))
    identity = {**notes.get("identity", {}), **identity}  # with the data's
    if adapter.start and not dequantized:  # for the original base, which the start made a packed one resemble
        assert adapter.config is not None
        difference = as_difference(adapter.lora, adapter.start, adapter.specs, adapter.config)
        adapter = Adapter(*difference, adapter.extras)
    return _Source(settings, task, adapter, parts, notes, base, identity, allow)


def _write_peft(source: _Source, to: Path, base_model: str | None) -> str:
    if source.adapter.config is None:
        raise ValueError("no adapter to export: the model was trained in full; add --merged")
    form, base = transformers_class_of(source.parts), source.settings.model.path
    if base_model is not None:
        base = base_model
    elif base in ASSETS or expand_path("model.path", base).exists():  # otherwise a hub id
        base = str(source.base.resolve())
    head_leaves = _base_leaves(source, [ours for ours, _ in form.heads if ours not in source.parts.base.new])
    extras, own = _split_extras(source, form)
    save_peft(
        to,
        source.adapter.lora,
        source.adapter.specs,
        source.adapter.config,
        export.path_map(source.parts.base.table, form),
        extras=unflatten(head_leaves | flatten(extras)),
        own=own,
        base=source.notes["base"],
        base_model=base,
        task_type=form.task_type,
        readme=_readme(source, form, _USE_ADAPTER, base),
        prune=source.settings.optimizer.target_rank is not None,
        settings=source.notes["settings"],
        task=source.notes["task"],
        identity=source.identity,
    )
    count = len(source.adapter.specs)
    return f"{to}: PEFT adapter for {count} kinds of layers; README.md shows how to load it"


def _write_merged(source: _Source, to: Path, format: str, dtype: str | None, dequantized: bool) -> str:
    parts, adapter = source.parts, source.adapter
    leaves, tensors = check_params(source.base, parts.base.table, params_of(parts), new=parts.base.new)
    _base_leaves(source, [])
    if source.settings.model.quantize in ("nf4", "int8") and not dequantized:
        unquantized = {"base": {"unquantized": values_digest(tensors)}}
        check_identity(source.base, source.notes, unquantized, allow=source.allow)
    form = transformers_class_of(parts)
    extras, own = _split_extras(source, form)
    merge = CheckpointMerge(
        parts.base.table, leaves, adapter.specs, adapter.lora, adapter.extras, dequantize=dequantized
    )
    target = to.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target, new=True) as partial:
        partial.mkdir()
        if format == "gguf":
            gguf_export.write_gguf(partial / "model.gguf", source.base, merge, dtype or "float16")
        else:
            new = {path: x for path, x in flatten(extras).items() if path.split("/")[1] in parts.base.new}
            weights_dtype = None if dtype is None else jnp.dtype(dtype)
            config = _label_config(source) if form.heads else {}
            export.write_hf(
                partial, source.base, merge, form, new=unflatten(new), config=config, dtype=weights_dtype
            )
        use = _USE_GGUF if format == "gguf" else _USE_MERGED
        (partial / "README.md").write_text(_readme(source, form, use, ""), encoding="utf-8")
        if own:
            (partial / OWN_TENSORS_FILE).write_bytes(tensor_bytes(flatten(own)))
        # The merged model is a base model of its own.
        identity = {**source.identity, **model_identity(source.settings, partial, source.task)}
        notes = describe_run(
            adapter.specs,
            adapter.config,
            merged=True,
            settings=source.notes["settings"],
            task=source.notes["task"],
            identity=identity,
        )
        # The identity has the other files' content.
        tensors = sorted(path.name for path in partial.iterdir() if path.suffix in (".safetensors", ".gguf"))
        (partial / NOTES_FILE).write_text(record_text(notes, partial, tensors), encoding="utf-8")
        size = sum(path.stat().st_size for path in partial.iterdir())
    into = ""
    if dequantized:
        into = (
            f", in the weights as the run packed them; these differ by {merge.rounding:.2%} from the base's"
        )
    return f"{to}: merged model, {size / 1e6:,.1f} MB{into}"


def _split_extras(source: _Source, form: export.TransformersClass) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits fully trained variables into those that the transformers class has and those that only ours has."""
    shared, own = {}, {}
    for path, leaf in flatten(source.adapter.extras).items():
        is_new = path.split("/")[1] in source.parts.base.new
        (own if is_new and not form.heads else shared)[path] = leaf
    return unflatten(shared), unflatten(own)


def _base_leaves(source: _Source, modules: list[str]) -> dict[str, np.ndarray]:
    """Checks the base's fingerprint, reading one leaf at a time, and returns the base's leaves of `modules`.

    Raises:
      ValueError: the adapter was trained on another base.
    """
    parts, lines, leaves = source.parts, {}, {}
    frozen, shapes = flatten(parts.frozen), params_of(parts)

    def visit(path: str, array: Any) -> None:
        leaf = f"params/{path}"
        if leaf in frozen:
            arrays = leaves_by_path({"params": {path: array}})  # a packed weight has several
            lines.update((name, fingerprint_line(name, jax.device_put(x))) for name, x in arrays.items())
        if path.rpartition("/")[0] in modules:
            leaves[leaf] = array

    if frozen:
        load_params(source.base, parts.base.table, shapes, new=parts.base.new, place=visit)
        weights = digest_of_lines(lines)
        check_identity(source.base, source.notes, {}, weights=weights, allow=source.allow)
    return leaves


def _label_config(source: _Source) -> dict[str, Any]:
    """The fields of `config.json` that describe the head's outputs."""
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
_USE_GGUF = """\
```bash
llama-cli -m model.gguf
```
"""
_USE_MERGED = """```python
from transformers import {cls}

model = {cls}.from_pretrained("this directory")
```
"""


def _readme(source: _Source, form: export.TransformersClass, use: str, base: str) -> str:
    """README.md: how to load the directory, and which parts of the model transformers does not load."""
    config, task = source.adapter.config, source.task
    names = getattr(task, "names", ())
    labels = f", num_labels={len(names) or 1}" if form.heads else ""
    title = "PEFT adapter" if use is _USE_ADAPTER else "Merged model"
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
            f"transformers has no class with a head on {pooling!r} pooling, so it loads only the encoder. "
            f"The head is in {OWN_TENSORS_FILE}: multiply the {_POOLED[pooling]} by params/head/kernel and add "
            "params/head/bias.",
        ]
    if names:
        lines.append(f"Classes, in the order of the outputs: {', '.join(names)}.")
    if getattr(task, "kind", "") == "regression":
        lines.append(f"Predicted value: the head's output * {task.std:g} + {task.mean:g}.")
    return "\n".join(lines).rstrip() + "\n"


_POOLED = {
    "mean": "mean of the hidden states where the attention mask is 1",
    "cls": "hidden state of the first token",
}
