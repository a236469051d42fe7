"""What the result of a run depends on: the base model's files and the data, the settings, and JAX's options.

A run's directory has one record of all this, `identity.json`, which is compared whenever a run or sweep resumes
there. An adapter, which may leave the directory, has the identity of base and data too. It is compared by eval,
predict, generate, export and `init_adapter`.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .._utils.validation import check_choice, join_first, to_plain
from ..models.checkpoints.model_files import ModelFiles
from ..models.families import ENCODERS, FAMILIES, encoder_of
from ..settings.schema import Settings
from ..step.run_metadata import field_differences
from ..tasks import causal_lm, encoder

Identity = dict[str, Any]
"""JSON values by part, without the weights: their fingerprint is the metadata's `base`."""

Origin = dict[str, Any]
"""An identity as `identity`, and the weights' fingerprint as `base`."""


class Allowed(BaseModel, strict=True):
    """A difference that `--allow_different` has accepted.

    Attributes:
      digest: that of the record before; None if it was not a file of its own.
      differences: the differences, as text.
    """

    digest: str | None
    differences: list[str]


FORMAT = 2
"""The format of the directories of runs and sweeps. Those of another one are not read: it grows with a change
after which what was saved before would continue in another way."""


class Record(BaseModel, strict=True):
    """The schema of `identity.json`.

    Attributes:
      format: `FORMAT`.
      base: the weights' fingerprint.
      identity: the parts of base and data.
      settings: those that may not change.
      jax_config: the options of JAX that change bits.
      allowed: what differed from it before, in order.
    """

    format: int
    base: str | None
    identity: dict[str, Any]
    settings: dict[str, Any]
    jax_config: dict[str, Any]
    allowed: list[Allowed] = []


SPLITS = ("train", "validation", "test")
PARTS = (
    "base.weights",
    "base.unquantized",
    "base.config",
    "tokenizer",
    "special_tokens",
    "chat_template",
    "data",
)
"""The parts that `--allow_different` accepts, as well as their fields, such as base.config.rope_theta."""
MODEL_PARTS = PARTS[:-1]
"""Those of a command that compares no data."""
PAD_TOKENS = ("[PAD]", "<pad>", "</s>", "<|endoftext|>")
"""What earlier versions padded with, where the model's files do not say it."""


def model_identity(
    settings: Settings, files: ModelFiles, task: Any, *, saved: Mapping[str, Any] | None = None
) -> Identity:
    """The identity of a base model; the task may hold the user's own chat template.

    With the metadata of an adapter to compare as `saved`, the digest of the tokenizer is made as there.
    """
    more: Identity = {}
    if settings.is_language:
        config = causal_lm.model_config(files, split_fused=settings.model.split_fused)
        _, template = causal_lm.tokenizer_and_template(settings.task_options, files, task)
        tokenizer = files.tokenizer
        names = {"bos": template.bos_token, "eos": template.eos_token, "stop": list(files.stop_ids)}
        more = {"special_tokens": names, "chat_template": _digest(template.source)}
    else:
        config = encoder_of(files.config.get("model_type")).config.from_hf(files.config)
        tokenizer = encoder.tokenizer_for(settings.task_options, files)
    digest, identity = _digest(tokenizer.to_str()), (saved or {}).get("identity")
    if not settings.is_language and isinstance(identity, Mapping) and identity.get("tokenizer") != digest:
        # Earlier versions padded texts, and digested an encoder's tokenizer with its padding.
        length = settings.data.max_length
        for token in dict.fromkeys((*files.special_tokens.values(), *PAD_TOKENS)):
            if (pad_id := tokenizer.token_to_id(token)) is not None:
                tokenizer.enable_padding(pad_id=pad_id, pad_token=token, length=length)
                if (padded := _digest(tokenizer.to_str())) == identity.get("tokenizer"):
                    digest = padded
    config = to_plain(dataclasses.asdict(config))
    return {"base": {"config": config}, "tokenizer": digest, **more}


def check_allowed(allow: Sequence[str], parts: Sequence[str] = PARTS) -> None:
    """Raises ValueError if a name is not a part of an identity that a command compares, or a field of one."""
    kinds = [family.config for family in (*ENCODERS, *FAMILIES)]
    configs = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    fields = {
        "base.config": configs,
        "special_tokens": {"bos", "eos", "stop"},
        "data": {*SPLITS, "unrelated"},
    }
    for name in allow:
        part, _, field = name.rpartition(".")
        if part not in parts or field not in fields.get(part, ()):
            check_choice("--allow_different", name, parts)


def check_identity(
    source: Path,
    metadata: Mapping[str, Any],
    identity: Identity,
    *,
    weights: str | None = None,
    allow: Sequence[str] = (),
) -> list[str]:
    """Compares a base model and data with what a run, adapter or checkpoint was made with.

    Parts that only one of them has are not compared, such as those of an adapter that PEFT wrote.

    Args:
      source: the run, adapter or checkpoint, for the message.
      metadata: its metadata.
      identity: the current identity.
      weights: `fingerprint` of the current frozen variables, if they are loaded.
      allow: parts that may differ, as in `--allow_different`.

    Returns:
      The differences that `allow` accepts, as text.

    Raises:
      ValueError: there are others.
    """
    saved = metadata.get("identity", {})
    if not isinstance(saved, Mapping) or not isinstance(saved.get("base", {}), Mapping):
        raise ValueError(f"{source}: identity must be a mapping from parts to values, got {saved!r:.80}")
    base = dict(saved.get("base", {}))
    if isinstance(config := base.get("config"), Mapping) and "rope_scaling" in config:
        base["config"] = {**config, "rope_scaling": _by_name(config["rope_scaling"])}
    if (fingerprint := metadata.get("base")) is not None:
        base["weights"] = fingerprint
    saved = {**saved, "base": base}
    if weights is not None:
        identity = {**identity, "base": {**identity.get("base", {}), "weights": weights}}
    lines = field_differences(
        common_fields(saved, identity), common_fields(identity, saved), ("there", "here")
    )
    allowed = [line for line in lines if line.startswith(tuple(f"{n}{end}" for n in allow for end in " ."))]
    if differences := [line for line in lines if line not in allowed]:
        parts = [
            name for name in PARTS if any(line.startswith((f"{name} ", f"{name}.")) for line in differences)
        ]
        flags = " ".join(f"--allow_different {part}" for part in parts)
        raise ValueError(
            f"{source} was made with another {join_first(parts)}: {join_first(differences)}; restore it, or accept "
            f"the difference with {flags}"
        )
    return allowed


def check_record(
    directory: Path, saved: Mapping[str, Any], current: Mapping[str, Any], *, allow: Sequence[str] = ()
) -> list[str]:
    """Raises ValueError if what is in a directory was made with another base, data, setting or option of JAX.

    Parts that only one record has are not compared, such as a setting that an earlier version did not have. `allow`
    names parts of base and data that may differ; returns those differences as text.
    """
    allowed = check_identity(directory, saved, current["identity"], weights=current["base"], allow=allow)
    rest = [{n: record[n] for n in ("settings", "jax_config") if n in record} for record in (saved, current)]
    if differences := field_differences(common_fields(*rest), common_fields(*rest[::-1]), ("there", "here")):
        raise ValueError(
            f"{directory} does not match this run: {join_first(differences)}; resume with the same settings and "
            "options of JAX, or start over with --fresh"
        )
    return allowed


def common_fields(values: Any, others: Any) -> Any:
    """The values whose names the others have, too."""
    if not isinstance(values, Mapping) or not isinstance(others, Mapping):
        return values
    return {name: common_fields(value, others[name]) for name, value in values.items() if name in others}


def _by_name(scaling: Any) -> Any:
    """A saved `rope_scaling`: earlier versions have pairs of name and value, and none without scaling."""
    if not isinstance(scaling, list):
        return scaling
    return {str(pair[0]): pair[1] for pair in scaling if isinstance(pair, list) and len(pair) == 2} or None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
