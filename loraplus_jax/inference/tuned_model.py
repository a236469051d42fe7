"""The model that a command uses: described from its files, and loaded once the user's own input is checked."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from .._utils.records import check_files
from .._utils.validation import expand_path
from ..adapter.tree import combine, flatten, unflatten
from ..data.fetch import resolve
from ..data.options import DataOptions
from ..interop.adapter_directory import read_tensors
from ..interop.peft_files import NOTES_FILE, OWN_TENSORS_FILE, peft_notes, peft_options
from ..models.checkpoints.model_files import ModelFiles
from ..models.files import open_files
from ..models.options import Dtype, ModelOptions
from ..settings.parsing import parse_settings, settings_from_json
from ..settings.schema import INVARIANT, Settings
from ..step.checkpoint import leaf_dtypes_and_shapes
from ..step.fingerprints import fingerprint
from ..step.sharding import check_tensor
from ..tasks.causal_lm import LanguageTask, model_config
from ..tasks.encoder import EncoderTask
from ..tasks.interface import AdaptedModel
from ..tasks.options import LANGUAGE_TASKS
from ..training.distributed import check_same_everywhere, raise_together
from ..training.place import Place, look
from ..training.provenance import MODEL_PARTS, Identity, check_allowed, check_identity, model_identity
from ..training.saved_adapter import adapter_config, merged_table, read_adapter, saved_config
from ..training.setup import base_parts, build_model, load_model, task_class
from .devices import choose_mesh, to_mesh

EVALUATED_TOKENS = 1024
"""Most tokens of a row in `loraplus eval --data` for an adapter that was trained elsewhere."""
OWN_TEMPLATE = "--template and --dtype apply to models and PEFT adapters; a run has its own"


class TunedModel(NamedTuple):
    """A run, adapter or merged model, or a model without any.

    Attributes:
      place: what is at its path.
      settings: settings of the run; without one, only the fields that build a language model are used.
      task: task that it was trained for; None if that is unknown.
      parts: model and variables, which are shapes before `load`.
      base: files of the base model.
      allow_different: parts of the base model that may differ from what it was trained on, see `PARTS`.
      mesh: device mesh of the variables; None before `load`.
    """

    place: Place
    settings: Settings
    task: Any
    parts: AdaptedModel
    base: ModelFiles
    allow_different: Sequence[str] = ()
    mesh: Any = None

    @property
    def origin(self) -> dict[str, Any]:
        """What an adapter's metadata says of the run: `settings`, `task` and `identity`."""
        settings = {name: value for name, value in self.settings.to_json().items() if name != "output_dir"}
        task = self.task or LanguageTask(kind="instruction")
        identity = model_identity(self.settings, self.base, task)
        return {"settings": settings, "task": task.notes(), "identity": identity}

    @property
    def variables(self) -> dict[str, Any]:
        """All variables of the model."""
        return combine(self.parts.trainable, self.parts.frozen)

    def check_identity(self, identity: Identity, weights: str | None = None) -> None:
        """Raises ValueError if it was trained with another base model or data; see `check_identity`."""
        check_identity(
            self.place.directory, self.place.notes, identity, weights=weights, allow=self.allow_different
        )


def describe(
    place: Place,
    *,
    config: "str | TrainingConfig | None" = None,
    template: str | None = None,
    dtype: Dtype | None = None,
    base: str | None = None,
    allow_different: Sequence[str] = (),
    compared: Sequence[str] = MODEL_PARTS,
) -> TunedModel:
    """Describes what `look` finds, with shapes as variables, and checks the identity of its base; reads no weights.

    Args:
      place: what is there.
      config: a training config, for a PEFT adapter, or what `read_config` made of it; supplies the model, the data
        and the task.
      template, dtype: chat template and dtype of the weights, for a language model or a PEFT adapter without
        `config`, whose file names its base.
      base: where the base of a run is now, instead of `model.path` in its settings.
      allow_different: see `TunedModel`.
      compared: those of `PARTS` that the command compares, which alone may differ.

    Raises:
      ValueError, OSError: there is no model or it is damaged, or the base model has changed.
    """
    check_allowed(allow_different, compared)
    place.require("run", "merged", "peft", "base")
    if config is not None and place.kind != "peft":
        raise ValueError(f"--config requires a PEFT adapter without training settings, got {place.path}")
    is_own = config is not None or place.kind in ("run", "merged")
    if is_own and (template is not None or dtype is not None):
        raise ValueError(OWN_TEMPLATE)
    if config is not None:
        settings, task, files = read_config(config) if isinstance(config, str) else config
        settings = _with_adapter(place, settings, files, task)
    elif is_own:
        settings, task = settings_and_task(place, base)
        files = open_files(resolve(settings.model.path, "model"))
    else:
        settings, task, files = _without_run(place, template, dtype)
    if base is not None:
        model = {**place.notes["settings"]["model"], "path": base}
        moved = {**place.notes["settings"], "model": model}
        place = place._replace(notes={**place.notes, "settings": moved})
    if place.kind == "peft" and not is_own:
        # A fingerprint there is of a loop of one's own, whose parameters may have other names.
        place = place._replace(notes={})
    if is_own:
        identity = model_identity(settings, files, task, saved=place.notes)
        check_identity(place.directory, place.notes, identity, allow=allow_different)
    if place.kind in ("run", "peft"):
        adapter = saved_config(place) if place.kind == "run" else settings.applied
        parts = build_model(settings, files, task, adapter)
    else:
        parts = base_parts(settings, files, task)
    if place.kind == "merged" and not (place.directory / OWN_TENSORS_FILE).is_file():
        # Its class in transformers has the head.
        parts = parts._replace(base=parts.base._replace(table=merged_table(parts), new=()))
    return TunedModel(place, settings, task, parts, files, allow_different)


def look_model(source: str) -> Place:
    """What is at a path, or the base model of a name; raises FileNotFoundError for an unfinished run or a sweep."""
    place = look(expand_path("model", source))._replace(name=source)
    if place.kind == "base":
        place.check_finished()
    return place


def describe_language(
    place: Place, config: str | None = None, allow_different: Sequence[str] = (), **options: Any
) -> TunedModel:
    """Describes a language model from `look_model`; see `describe`."""
    if allow_different and config is None and place.kind in ("peft", "base"):
        raise ValueError(
            f"--allow_different {allow_different[0]} requires a run or merged model, got {place.name}"
        )
    return check_language(describe(place, config=config, allow_different=allow_different, **options))


def check_language(tuned: TunedModel) -> TunedModel:
    """Raises ValueError unless it is a language model."""
    if not tuned.settings.is_language:
        raise ValueError(
            f"{tuned.place.name} is an encoder for {tuned.settings.task}, not a language model; use loraplus "
            "predict"
        )
    return tuned


def load(tuned: TunedModel, mesh: Mesh | None = None) -> TunedModel:
    """Loads the weights of what `describe` returns onto a mesh, by default that of the run.

    Each of several processes reads only its own parts.

    Raises:
      ValueError: the processes read different weights, or the base is not what the adapter was trained on.
    """
    place, parts = tuned.place, tuned.parts
    with raise_together():
        mesh = mesh or choose_mesh(tuned.settings.mesh)
        check_tensor(mesh, parts.base.tensor_sizes)
        if place.kind in ("run", "peft"):
            parts = load_model(tuned.settings, tuned.base, parts, mesh)
            adapter = read_adapter(place, parts)
            trainable = ({"lora": adapter.lora} if adapter.lora else {}) | adapter.extras
            if jax.tree.map(np.shape, trainable) != jax.tree.map(np.shape, parts.trainable):
                raise ValueError(
                    f"{place.directory}: tensor shapes do not match the model that its settings describe"
                )
            parts = parts._replace(trainable=trainable)
        else:
            check_files(tuned.base.path / NOTES_FILE, peft_notes(tuned.base.path) or {})
            parts = load_model(tuned.settings, tuned.base, parts, mesh)
            if place.kind == "merged" and parts.base.new:
                own = flatten(read_tensors(place.directory / OWN_TENSORS_FILE))
                starts = tuple(f"params/{name}/" for name in parts.base.new)
                expected = {path: x for path, x in flatten(parts.frozen).items() if path.startswith(starts)}
                if jax.tree.map(np.shape, own) != jax.tree.map(np.shape, expected):
                    raise ValueError(
                        f"{place.directory / OWN_TENSORS_FILE} does not have the tensors of the model's "
                        f"{', '.join(parts.base.new)}; export the model again"
                    )
                parts = parts._replace(frozen=unflatten(flatten(parts.frozen) | own))
        parts = to_mesh(parts, mesh)
    is_distributed = jax.process_count() > 1
    if is_distributed:
        shapes = leaf_dtypes_and_shapes({"trained": parts.trainable, "weights": parts.frozen})
        values = {"model": tuned.settings.to_json()["model"], "mesh": dict(mesh.shape)}
        check_same_everywhere({**values, **shapes})
    # From here on, computations run on all processes together.
    has_base = place.notes.get("base") is not None
    weights = fingerprint(parts.frozen) if parts.frozen and (has_base or is_distributed) else None
    if is_distributed:
        check_same_everywhere({"base": weights, "trained": fingerprint(parts.trainable)})
    if has_base and weights is not None:
        tuned.check_identity({}, weights)
    return tuned._replace(parts=parts, mesh=mesh)


def settings_and_task(place: Place, base: str | None = None) -> tuple[Settings, Any]:
    """Settings and task from the metadata of an adapter or a merged model, on `base` if it is not at its path."""
    try:
        settings = settings_from_json({**place.notes["settings"], "output_dir": str(place.directory)})
        fields = place.notes["task"]
        if fields["kind"] in LANGUAGE_TASKS:
            task: Any = LanguageTask(**fields)
        else:
            if not all(isinstance(name, str) for name in fields["names"]):
                raise ValueError(f"task.names must be a list of texts, got {fields['names']!r:.80}")
            metrics = tuple(fields.get("metrics", ()))
            task = EncoderTask(**{**fields, "names": tuple(fields["names"]), "metrics": metrics})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{place.notes_file} is damaged: {error}") from None
    model, lora = settings.model, settings.lora
    if place.kind == "merged":  # without an adapter, also one of a run on a quantized base
        base = str(place.directory)
        model = dataclasses.replace(model, quantize="none", quantize_exclude=None)
        lora = dataclasses.replace(lora, init="lora", init_iterations=None)
    if base is not None:
        model = dataclasses.replace(model, path=base)
    return dataclasses.replace(settings, model=model, lora=lora), task


class TrainingConfig(NamedTuple):
    """What a training config says of a PEFT adapter: its settings, task and base."""

    settings: Settings
    task: Any
    files: ModelFiles


def read_config(config: str) -> TrainingConfig:
    """Reads a training config, and of its data at most the labels."""
    settings = parse_settings(config)
    files = open_files(resolve(settings.model.path, "model"))
    return TrainingConfig(settings, task_class(settings).from_options(settings.task_options, files), files)


def _without_run(
    place: Place, template: str | None, dtype: Dtype | None
) -> tuple[Settings, None, ModelFiles]:
    """Settings of a language model without a run, and so without data, and its files."""
    path = peft_options(place.directory).base_model if place.kind == "peft" else place.name
    if path is None:
        raise ValueError(
            f"{place.directory} does not name its base model; pass --config with a training config that sets "
            "model.path"
        )
    files = open_files(resolve(path, "model"))
    longest = min(EVALUATED_TOKENS, model_config(files).max_length)
    weights_dtype = dtype or "float32"
    settings = Settings(
        model=ModelOptions(path=path, dtype=weights_dtype, param_dtype=weights_dtype),
        data=DataOptions(max_length=longest, template=template or "model"),
        task="instruction",
        output_dir=str(place.directory),
    )
    return _with_adapter(place, settings, files, None) if place.kind == "peft" else settings, None, files


def _with_adapter(place: Place, settings: Settings, files: ModelFiles, task: Any) -> Settings:
    """Settings with the lora section of a PEFT adapter."""
    lora = adapter_config(place.directory, base_parts(settings, files, task))
    optimizer, train = settings.optimizer, settings.train
    # Settings of training that may not suit this adapter.
    if optimizer.name in INVARIANT:
        lora = dataclasses.replace(lora, lr_ratio=1.0)
    if lora.variant == "lora":
        optimizer = dataclasses.replace(optimizer, magnitude_learning_rate=None)
    else:
        train = dataclasses.replace(train, theory_every=None)
    return dataclasses.replace(settings, method="lora_plus", lora=lora, optimizer=optimizer, train=train)
