"""`loraplus export`: writes a PEFT or GGUF adapter, or a merged model with the adapter in its weights."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._utils.atomic import add_path_to_errors, atomic_write, temporary_directory
from .._utils.records import record_text
from .._utils.validation import check_choice, check_new_path
from ..adapter.tree import flatten, leaves_by_path, unflatten
from ..data.fetch import ASSETS, is_public
from ..inits.from_weights import as_difference
from ..interop.adapter_directory import Adapter, tensor_bytes
from ..interop.peft_files import NOTES_FILE, OWN_TENSORS_FILE, save_peft
from ..models.checkpoints.gguf.file import GgufFile
from ..models.checkpoints.params import check_params, load_params, values_digest
from ..models.checkpoints.transformers_class import TransformersClass, path_map
from ..models.files import open_files
from ..step.fingerprints import digest_of_lines, fingerprint_line
from ..step.run_metadata import describe_run
from ..tasks.interface import params_of
from ..training.place import look
from ..training.provenance import Identity, model_identity
from ..training.run_directory import ADAPTER, read_summary
from ..training.saved_adapter import read_adapter, transformers_class_of
from .checkpoint_merge import CheckpointMerge
from .gguf_adapter import save_gguf_adapter
from .model_card import model_card
from .named_base import named_base
from .push import check_push, hub_base, open_repository, public_settings
from .push import push as upload
from .tuned_model import TunedModel, describe
from .write_gguf import DTYPES as GGUF_DTYPES
from .write_gguf import write_gguf
from .write_hf import write_hf

Card = Callable[..., str]
"""`model_card` without the kind of export and the transformers class."""
DTYPES = {"hf": ("float32", "bfloat16", "float16"), "gguf": tuple(GGUF_DTYPES)}


def export_run(
    place: Path,
    to: Path | None = None,
    *,
    push: str | None = None,
    public: bool = False,
    merged: bool = False,
    dequantized: bool = False,
    format: str = "hf",
    dtype: str | None = None,
    base_model: str | None = None,
    base: str | None = None,
    allow_different: Sequence[str] = (),
) -> str:
    """Exports a run to a new directory, atomically, and to the Hugging Face Hub; returns a summary.

    For the arguments see `loraplus export --help`; `base` is where the run's base is now, if it has moved.
    """
    if base_model is not None and not base_model.strip():
        raise ValueError(
            f"--base_model must be a Hub id or a path, got {base_model!r}; leave it out for the run's model"
        )
    if dtype is not None:
        check_choice(f"--dtype with --format {format}", dtype, DTYPES[format])
    found = look(place).require("run")
    if to is not None:
        check_new_path("--to", to, outside=[found.directory])
    if push is not None:
        check_push(push)
    tuned = describe(found, base=base, allow_different=allow_different)
    notes = tuned.place.notes
    if dequantized and tuned.settings.model.quantize == "none":
        raise ValueError(
            "--dequantized requires a run with model.quantize nf4, int8 or file; this one has none"
        )
    if merged and format == "gguf" and not isinstance(tuned.base, GgufFile):
        raise ValueError(
            f"--merged --format gguf requires a GGUF base model, got {tuned.base}; use --format hf and convert "
            "the result with llama.cpp's convert_hf_to_gguf.py, or leave out --merged for an adapter"
        )
    if push is not None:
        base_model = hub_base(base_model, tuned.settings.model.path)
        notes = {**notes, "settings": public_settings(notes["settings"], base_model)}
        tuned = tuned._replace(place=tuned.place._replace(notes=notes))
    adapter = read_adapter(tuned.place, tuned.parts)
    origin = _origin(tuned, on_original=bool(adapter.start) and not dequantized)
    if adapter.start and not dequantized:  # for the original base, which the start made a packed one resemble
        assert adapter.config is not None
        difference = as_difference(adapter.lora, adapter.start, adapter.specs, adapter.config)
        adapter = Adapter(*difference, adapter.extras)
    named = base_model or lasting_name(tuned.settings.model.path, tuned.base.path)
    directory = tuned.place.directory
    summary = (read_summary(directory.parent) or {}) if directory.name == ADAPTER else {}
    card = functools.partial(
        model_card, tuned=tuned, adapter=adapter, summary=summary, base=named, repository=push
    )
    # Last of the checks, as it may create the repository, but before an export that may be long.
    assert to is not None or push is not None  # which the command requires
    existing = [] if push is None else open_repository(push, public=public)
    with contextlib.ExitStack() as stack:
        if (target := to) is None:
            temporary = stack.enter_context(temporary_directory())
            stack.enter_context(add_path_to_errors(temporary.parent))
            target = temporary / "export"
        if merged:
            written = _write_merged(tuned, adapter, target, card, origin, format, dtype, dequantized)
        elif format == "gguf":
            written = _write_gguf_adapter(tuned, adapter, target, card, origin, dtype, named)
        else:
            written = _write_peft(tuned, adapter, target, card, origin, named)
        if push is None:
            return written
        try:
            pushed = f"pushed to {upload(target, push, existing)}"
        except ValueError as error:
            kept = f"; the export is in {to}: upload it with `hf upload {push} {to}`" if to else ""
            raise ValueError(f"{error}{kept}") from None
        return f"{written}\n{pushed}" if to else pushed


def lasting_name(base: str, path: Path) -> str:
    """The name of the base to write: a Hub id stays one, as a path of the cache would mean nothing elsewhere."""
    return base if base not in ASSETS and is_public(base, "model") else str(path.resolve())


def _write_peft(
    tuned: TunedModel,
    adapter: Adapter,
    to: Path,
    card: Card,
    origin: Mapping[str, Any],
    base: str,
) -> str:
    if adapter.config is None:
        raise ValueError("no adapter to export: the model was trained in full; add --merged")
    form, new = transformers_class_of(tuned.parts), tuned.parts.base.new
    head_leaves = _base_leaves(tuned, [ours for ours, _ in form.heads if ours not in new])
    extras, own = _split_extras(tuned, adapter, form)
    save_peft(
        to,
        adapter.lora,
        adapter.specs,
        adapter.config,
        path_map(tuned.parts.base.table, form),
        extras=unflatten(head_leaves | flatten(extras)),
        own=own,
        modules=named_base(tuned.base).modules,
        base_model=base,
        task_type=form.task_type,
        readme=card("adapter", form=form),
        prune=tuned.settings.optimizer.target_rank is not None,
        identity=_identity(tuned),
        **origin,
    )
    return f"{to}: PEFT adapter for {len(adapter.specs)} kinds of layers; README.md shows how to load it"


def _write_gguf_adapter(
    tuned: TunedModel,
    adapter: Adapter,
    to: Path,
    card: Card,
    origin: Mapping[str, Any],
    dtype: str | None,
    base: str,
) -> str:
    name = "adapter.gguf"
    with atomic_write(to.resolve(), new=True) as partial:
        peft = partial.with_name("peft")
        _write_peft(tuned, adapter, peft, card, origin, base)
        partial.mkdir()
        saved = save_gguf_adapter(partial / name, peft, tuned.base, dtype=dtype or "float16")
        form = transformers_class_of(tuned.parts)
        (partial / "README.md").write_text(card("gguf_adapter", form=form), encoding="utf-8")
        notes = describe_run(
            adapter.specs,
            adapter.config,
            identity=_identity(tuned),
            **origin,
        )
        (partial / NOTES_FILE).write_text(record_text(notes, partial, [name]), encoding="utf-8")
    return saved._replace(file=to / name).describe()


def _write_merged(
    tuned: TunedModel,
    adapter: Adapter,
    to: Path,
    card: Card,
    origin: Mapping[str, Any],
    format: str,
    dtype: str | None,
    dequantized: bool,
) -> str:
    parts, form = tuned.parts, transformers_class_of(tuned.parts)
    leaves, tensors = check_params(tuned.base, parts.base.table, params_of(parts), new=parts.base.new)
    _base_leaves(tuned, [])
    if tuned.settings.model.quantize in ("nf4", "int8") and not dequantized:
        tuned.check_identity({"base": {"unquantized": values_digest(tensors)}})
    extras, own = _split_extras(tuned, adapter, form)
    merge = CheckpointMerge(
        parts.base.table, leaves, adapter.specs, adapter.lora, adapter.extras, dequantize=dequantized
    )
    with atomic_write(to.resolve(), new=True) as partial:
        partial.mkdir()
        if isinstance(tuned.base, GgufFile) and format == "gguf":
            write_gguf(partial / "model.gguf", tuned.base, merge, dtype or "float16")
        else:
            new = {path: x for path, x in flatten(extras).items() if path.split("/")[1] in parts.base.new}
            weights_dtype = None if dtype is None else jnp.dtype(dtype)
            config = _label_config(tuned.task) if form.heads else {}
            write_hf(partial, tuned.base, merge, form, new=unflatten(new), config=config, dtype=weights_dtype)
        kind = "gguf" if format == "gguf" else "merged"
        (partial / "README.md").write_text(card(kind, form=form), encoding="utf-8")
        if own:
            (partial / OWN_TENSORS_FILE).write_bytes(tensor_bytes(flatten(own)))
        # The merged model is a base model of its own.
        identity = {**_identity(tuned), **model_identity(tuned.settings, open_files(partial), tuned.task)}
        notes = describe_run(
            adapter.specs,
            adapter.config,
            merged=True,
            identity=identity,
            **{**origin, "base": None},
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


def _origin(tuned: TunedModel, *, on_original: bool) -> dict[str, Any]:
    """What the metadata says of the base and of how the adapter was made, of one for the original weights too."""
    names = ("base", "settings", "task", "combined")
    notes = {name: tuned.place.notes[name] for name in names if name in tuned.place.notes}
    if on_original and tuned.settings.model.quantize != "none":
        # The difference to the start is for these, not for the quantized ones.
        settings = dict(notes["settings"])
        settings["model"] = settings["model"] | {"quantize": "none", "quantize_exclude": None}
        settings["lora"] = settings["lora"] | {"init": "lora", "init_iterations": None}
        notes |= {"settings": settings, "base": None}
    return notes


def _identity(tuned: TunedModel) -> Identity:
    """The identity of the base as it is now, and of the data as the run recorded it."""
    current = model_identity(tuned.settings, tuned.base, tuned.task)
    return {**tuned.place.notes.get("identity", {}), **current}


def _split_extras(
    tuned: TunedModel, adapter: Adapter, form: TransformersClass
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits fully trained variables into those that the transformers class has and those that only ours has."""
    shared, own = {}, {}
    for path, leaf in flatten(adapter.extras).items():
        is_new = path.split("/")[1] in tuned.parts.base.new
        (own if is_new and not form.heads else shared)[path] = leaf
    return unflatten(shared), unflatten(own)


def _base_leaves(tuned: TunedModel, modules: list[str]) -> dict[str, np.ndarray]:
    """Checks the base's fingerprint, reading one leaf at a time, and returns the base's leaves of `modules`."""
    parts, lines, leaves = tuned.parts, {}, {}
    frozen = flatten(parts.frozen)

    def visit(path: str, array: Any) -> None:
        leaf = f"params/{path}"
        if leaf in frozen:
            arrays = leaves_by_path({"params": {path: array}})  # a packed weight has several
            # On the device, where training computed it too, but one leaf at a time: the model need not fit.
            lines.update((name, fingerprint_line(name, jax.device_put(x))) for name, x in arrays.items())
        if path.rpartition("/")[0] in modules:
            leaves[leaf] = array

    if frozen:
        load_params(tuned.base, parts.base.table, params_of(parts), new=parts.base.new, place=visit)
        tuned.check_identity({}, digest_of_lines(lines))
    return leaves


def _label_config(task: Any) -> dict[str, Any]:
    """The fields of `config.json` that describe the head's outputs."""
    names = getattr(task, "names", ())
    if not names:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }
