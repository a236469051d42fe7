"""Reads and writes PEFT's `adapter_config.json`: ranks and scales by module; unsupported options raise an error.

The rules are those of PEFT 0.21: a pattern is a regular expression for the end of a module's name, whole segments
only, and the first match applies.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from .._validation import check_choice, check_int, check_number
from ..config import Bias, LoRAPlusConfig
from ..json_files import read_json

# Options that change the model beyond W + s A B; null, false and empty turn them off.
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "megatron_config", "layer_replication"),
    *("trainable_token_indices", "alora_invocation_tokens", "loftq_config", "corda_config", "lora_ga_config"),
    *("velora_config", "kasa_config", "monteclora_config", "arrow_config"),
)
# Options without effect on a trained adapter, or whose effect shows in its tensors.
_IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("peft_type", "layers_pattern", "layers_to_transform", "megatron_core", "eva_config"),
    *("qalora_group_size", "runtime_config", "ephemeral_gpu_offload", "fan_in_fan_out", "target_parameters"),
    *("modules_to_tie", "target_modules_to_tie"),
)
_READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias"),
    *("target_modules", "exclude_modules", "modules_to_save", "ensure_weight_tying", "init_lora_weights"),
)
# Initializations that leave the base unchanged; others subtract from it.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_SHOWN = 20
_CLASSIFIERS = ("classifier", "score")
"""The modules that PEFT always trains fully for the task SEQ_CLS."""


@dataclass(frozen=True, kw_only=True)
class PeftOptions:
    """The validated options of a PEFT adapter.

    Attributes:
      rank, alpha, rank_pattern, alpha_pattern, use_rslora: as in PEFT, with patterns for PyTorch's names.
      dropout, bias: as in PEFT.
      target_modules, exclude_modules: names, one regular expression, or None.
      modules_to_save: names of fully trained modules.
      ties_weights: whether an embedding's adapter also applies to the tied head.
      base_model: name or path of the base model, or None.
      task_type: task, such as `"CAUSAL_LM"`, or None.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    dropout: float
    bias: Bias
    target_modules: str | Sequence[str] | None
    exclude_modules: str | Sequence[str] | None
    modules_to_save: Sequence[str]
    ties_weights: bool
    base_model: str | None
    task_type: str | None

    def rank_of(self, name: str) -> int:
        """The rank of a module's adapter."""
        key = _pattern_of(self.rank_pattern, name)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, name: str) -> float:
        """The alpha of a module's adapter."""
        key = _pattern_of(self.alpha_pattern, name)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scale_of(self, name: str) -> float:
        """The scale s of A B for a module."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def missing_targets(self, names: Collection[str]) -> list[str]:
        """Entries of `target_modules` that match none of the adapted modules' names: the adapter is incomplete."""
        if isinstance(self.target_modules, str):
            matches_all = self.target_modules == "all-linear"
            matches = matches_all or any(re.fullmatch(self.target_modules, name) for name in names)
            return [] if matches else [self.target_modules]
        return [
            target
            for target in self.target_modules or ()
            if not any(_ends_in(name, target) for name in names) and not self._is_excluded(target, names)
        ]

    def _is_excluded(self, target: str, names: Collection[str]) -> bool:
        """Whether `exclude_modules` excludes a target, by its name or as a sibling of an adapted module."""
        if isinstance(self.exclude_modules, str):
            siblings = {f"{name.rpartition('.')[0]}.{target}" for name in names}
            return any(re.fullmatch(self.exclude_modules, name) for name in (target, *siblings))
        return any(_ends_in(target, name) for name in self.exclude_modules or ())


def read_options(path: Path) -> PeftOptions:
    """Reads an `adapter_config.json`.

    Raises:
      ValueError: the file is not the config of a LoRA adapter, a value is invalid, or options are unsupported; the
        message names them all.
    """
    values = {name: value for name, value in read_json(path).items() if value is not None}
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {values.get('peft_type')!r:.80}")
    problems = [f"{name}={values[name]!r:.80}" for name in _UNSUPPORTED if values.get(name)]
    if (init := values.get("init_lora_weights")) not in _PLAIN_INITS:
        problems.append(f"init_lora_weights={init!r:.80} (changes the base)")
    unknown = sorted(
        name for name in values if name not in (*_UNSUPPORTED, *_IGNORED, *_READ) and values[name]
    )
    problems += [f"{name:.80}={values[name]!r:.80} (unknown key)" for name in unknown]
    if problems:
        raise ValueError(
            f"{path} has unsupported options: {', '.join(problems)}; merge the adapter in PEFT "
            "(merge_and_unload), or convert it there if possible"
        )
    try:
        return _parse_options(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_options(values: Mapping[str, Any]) -> PeftOptions:
    check_int("r", values.get("r"), at_least=1)
    check_number("lora_alpha", values.get("lora_alpha"), above=0.0)
    check_number("lora_dropout", values.get("lora_dropout", 0.0), at_least=0.0, below=1.0)
    patterns = {name: values.get(name, {}) for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, Mapping):
            raise TypeError(f"{name} must be a mapping, got {pattern!r:.80}")
        for key, value in pattern.items():
            _check_regex(name, key)
            if name == "rank_pattern":
                check_int(f"{name}[{key!r:.80}]", value, at_least=1)
            else:
                check_number(f"{name}[{key!r:.80}]", value, above=0.0)
    for name in ("use_rslora", "ensure_weight_tying"):
        if not isinstance(values.get(name, False), bool):
            raise TypeError(f"{name} must be true or false, got {values[name]!r:.80}")
    check_choice("bias", values.get("bias", "none"), get_args(Bias))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values.get(name), str):
            _check_regex(name, values[name])
        else:
            _check_names(name, values.get(name, []))
    _check_names("modules_to_save", values.get("modules_to_save", []))
    for name in ("base_model_name_or_path", "task_type"):
        if not isinstance(values.get(name, ""), str):
            raise TypeError(f"{name} must be text, got {values[name]!r:.80}")
    return PeftOptions(
        rank=values["r"],
        alpha=values["lora_alpha"],
        **patterns,
        use_rslora=values.get("use_rslora", False),
        dropout=values.get("lora_dropout", 0.0),
        bias=values.get("bias", "none"),
        target_modules=values.get("target_modules"),
        exclude_modules=values.get("exclude_modules"),
        modules_to_save=values.get("modules_to_save", []),
        ties_weights=values.get("ensure_weight_tying", False),
        base_model=values.get("base_model_name_or_path"),
        task_type=values.get("task_type"),
    )


def make_options(
    config: LoRAPlusConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    saved: Sequence[str],
    parameters: Sequence[str],
    transposed: bool,
    tied: bool,
    base_model: str | None,
    task_type: str | None,
) -> dict[str, Any]:
    """Makes the contents of an `adapter_config.json`, with options that old versions of PEFT know.

    Args:
      config: default rank, alpha and other options.
      ranks, alphas: ranks and alphas of the adapted modules, by name in PyTorch.
      saved: fully trained modules.
      parameters: names in `ranks` that are parameters instead of modules.
      transposed: whether weights are stored as (in, out).
      tied: whether an embedding's adapter also applies to the head.
      base_model, task_type: the base model and the task, if known.
    """
    if task_type == "SEQ_CLS":
        saved = list(dict.fromkeys(first if (first := n.split(".")[0]) in _CLASSIFIERS else n for n in saved))
    options = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": _int_if_integral(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": [name for name in ranks if name not in parameters],
        "rank_pattern": _patterns(ranks, config.rank),
        "alpha_pattern": {key: _int_if_integral(v) for key, v in _patterns(alphas, config.alpha).items()},
        "use_rslora": config.use_rslora,
        "fan_in_fan_out": transposed,
        "bias": config.bias,
        "modules_to_save": list(saved) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    # Newer options only if needed, since older versions of PEFT do not know them.
    return (
        options
        | ({"target_parameters": list(parameters)} if parameters else {})
        | ({"ensure_weight_tying": True} if tied else {})
    )


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raises one ValueError with all problems, if there are any; its first line is a complete message."""
    if problems:
        rest = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError("\n  ".join([f"{what}: {problems[0]}", *problems[1:_SHOWN], *rest]))


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Makes few patterns that give every module its value: the last segment alone if all its modules agree."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        groups.setdefault(name.rpartition(".")[2], {})[name] = value
    patterns = {}
    for segment, group in groups.items():
        if set(group.values()) == {default}:
            continue
        if len(set(group.values())) == 1:
            patterns[re.escape(segment)] = group.popitem()[1]
            continue
        # A name also matches the end of a longer name, so longer names come first.
        for name in sorted(group, key=len, reverse=True):
            ends = any(other.endswith(f".{name}") for other in group)
            if group[name] != default or ends or any(name.endswith(f".{other}") for other in group):
                patterns[re.escape(name)] = group[name]
    return patterns


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _pattern_of(patterns: Mapping[str, Any], name: str) -> str | None:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def _check_regex(field: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{field} must contain regular expressions, got {pattern!r:.80}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}: invalid regular expression {pattern!r:.80}: {error}") from None


def _check_names(field: str, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"{field} must be a list of names, got {names!r:.80}")


def _int_if_integral(value: float) -> float:
    """Converts an integral float to an int, since PEFT writes alphas as ints."""
    return int(value) if value == int(value) else value
