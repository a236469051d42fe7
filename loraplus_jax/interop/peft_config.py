"""What `adapter_config.json` of PEFT says, both ways: ranks and scales by module, and options that we lack.

PEFT's rules are those of version 0.21: a pattern is a regular expression for the end of a module's name, whole
segments, and the first that matches counts.
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
from ..untrusted import run_job

# What changes the model beyond W + s A B; each is off where it is null, false or empty.
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "megatron_config", "layer_replication"),
    *("trainable_token_indices", "alora_invocation_tokens", "loftq_config", "corda_config", "lora_ga_config"),
    *("velora_config", "kasa_config", "monteclora_config", "arrow_config"),
)
# No effect on a trained adapter, or visible in its tensors.
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
# Initializations that leave the base unchanged; the others subtract from it.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_SHOWN = 20
_CLASSIFIERS = ("classifier", "score")
"""What PEFT trains in full for the task SEQ_CLS, always as a whole."""


@dataclass(frozen=True, kw_only=True)
class PeftOptions:
    """An adapter's options, checked.

    Attributes:
      file: where they come from, for error messages.
      rank, alpha, rank_pattern, alpha_pattern, use_rslora: as PEFT has them, patterns of its names.
      dropout, bias: likewise.
      target_modules, exclude_modules: names or one regular expression, or None.
      modules_to_save: names of what is trained in full.
      ties_weights: whether an embedding's adapter is the tied head's too.
      base_model: what the adapter says it belongs to.
      task_type: such as `"CAUSAL_LM"`, or None.
    """

    file: Path
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

    def ranks_and_alphas(self, names: Sequence[str]) -> dict[str, tuple[int, float]]:
        """The rank that the adapter of each module must have, and its alpha."""
        ranks = _first_matches(f"{self.file}: rank_pattern", self.rank_pattern, names)
        alphas = _first_matches(f"{self.file}: alpha_pattern", self.alpha_pattern, names)
        return {name: (ranks.get(name, self.rank), alphas.get(name, self.alpha)) for name in names}

    def scale(self, rank: int, alpha: float) -> float:
        """The factor s on A B of a module."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def idle_targets(self, names: Collection[str]) -> list[str]:
        """What `target_modules` names and the adapter has no factors of: it is not whole then."""
        if isinstance(self.target_modules, str):
            matches_all = self.target_modules == "all-linear"
            matches = matches_all or any(_match(f"{self.file}: target_modules", [self.target_modules], names))
            return [] if matches else [self.target_modules]
        idle = [t for t in self.target_modules or () if not any(_ends_in(name, t) for name in names)]
        excluded = self._excluded(idle, names)
        return [target for target in idle if target not in excluded]

    def _excluded(self, targets: Sequence[str], names: Collection[str]) -> set[str]:
        """The targets that `exclude_modules` leaves out; a regular expression, beside some adapted module."""
        if isinstance(self.exclude_modules, str):
            parents = {name.rpartition(".")[0] for name in names}
            pairs = [(t, path) for t in targets for path in (t, *(f"{parent}.{t}" for parent in parents))]
            matched = _match(
                f"{self.file}: exclude_modules", [self.exclude_modules], [path for _, path in pairs]
            )
            return {t for (t, _), indices in zip(pairs, matched, strict=True) if indices}
        return {t for t in targets if any(_ends_in(t, name) for name in self.exclude_modules or ())}


def read_options(path: Path) -> PeftOptions:
    """Reads an `adapter_config.json`.

    Raises:
      ValueError: it is none of a LoRA adapter, a value is odd, or options are on that we lack; all are named.
    """
    given = {name: value for name, value in read_json(path).items() if value is not None}
    if given.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {given.get('peft_type')!r:.80}")
    problems = [f"{name} is {given[name]!r:.80}" for name in _UNSUPPORTED if given.get(name)]
    if (init := given.get("init_lora_weights")) not in _PLAIN_INITS:
        problems.append(f"init_lora_weights is {init!r:.80}, which changes the base")
    unknown = sorted(name for name in given if name not in (*_UNSUPPORTED, *_IGNORED, *_READ) and given[name])
    problems += [f"{name:.80} is {given[name]!r:.80}, and not known here" for name in unknown]
    if problems:
        raise ValueError(
            f"{path} has options that loraplus_jax lacks: {'; '.join(problems)}; with PEFT such an adapter can be "
            "merged (merge_and_unload), or converted where PEFT offers it"
        )
    try:
        return _parse_options(path, given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_options(path: Path, given: Mapping[str, Any]) -> PeftOptions:
    check_int("r", given.get("r"), at_least=1)
    check_number("lora_alpha", given.get("lora_alpha"), above=0.0)
    check_number("lora_dropout", given.get("lora_dropout", 0.0), at_least=0.0, below=1.0)
    patterns = {name: given.get(name, {}) for name in ("rank_pattern", "alpha_pattern")}
    for name, values in patterns.items():
        if not isinstance(values, Mapping):
            raise TypeError(f"{name} must be a mapping, got {values!r:.80}")
        _match(name, [*values], [])
        for key, value in values.items():
            if name == "rank_pattern":
                check_int(f"{name}[{key!r:.80}]", value, at_least=1)
            else:
                check_number(f"{name}[{key!r:.80}]", value, above=0.0)
    for name in ("use_rslora", "ensure_weight_tying"):
        if not isinstance(given.get(name, False), bool):
            raise TypeError(f"{name} must be true or false, got {given[name]!r:.80}")
    check_choice("bias", given.get("bias", "none"), get_args(Bias))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(given.get(name), str):
            _match(name, [given[name]], [])
        else:
            _check_names(name, given.get(name, []))
    _check_names("modules_to_save", given.get("modules_to_save", []))
    for name in ("base_model_name_or_path", "task_type"):
        if not isinstance(given.get(name, ""), str):
            raise TypeError(f"{name} must be a text, got {given[name]!r:.80}")
    return PeftOptions(
        file=path,
        rank=given["r"],
        alpha=given["lora_alpha"],
        **patterns,
        use_rslora=given.get("use_rslora", False),
        dropout=given.get("lora_dropout", 0.0),
        bias=given.get("bias", "none"),
        target_modules=given.get("target_modules"),
        exclude_modules=given.get("exclude_modules"),
        modules_to_save=given.get("modules_to_save", []),
        ties_weights=given.get("ensure_weight_tying", False),
        base_model=given.get("base_model_name_or_path"),
        task_type=given.get("task_type"),
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
    """The contents of an `adapter_config.json`, with the options that PEFT has had for long.

    Args:
      config: rank, alpha and the like where no pattern says otherwise.
      ranks, alphas: of each adapted module, by its name in PyTorch.
      saved: modules trained in full.
      parameters: those of `ranks` that are parameters and not modules.
      transposed: whether weights are kept (in, out).
      tied: whether an embedding's adapter is the head's too.
      base_model, task_type: what the adapter is for, if known.
    """
    if task_type == "SEQ_CLS":
        saved = list(dict.fromkeys(first if (first := n.split(".")[0]) in _CLASSIFIERS else n for n in saved))
    options = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": _int_if_whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": [name for name in ranks if name not in parameters],
        "rank_pattern": _patterns(ranks, config.rank),
        "alpha_pattern": {key: _int_if_whole(v) for key, v in _patterns(alphas, config.alpha).items()},
        "use_rslora": config.use_rslora,
        "fan_in_fan_out": transposed,
        "bias": config.bias,
        "modules_to_save": list(saved) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    # Options of newer versions only where they are needed: an older PEFT does not know them.
    return (
        options
        | ({"target_parameters": list(parameters)} if parameters else {})
        | ({"ensure_weight_tying": True} if tied else {})
    )


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raises one ValueError with all problems, if any; its first line can stand alone."""
    if problems:
        rest = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError("\n  ".join([f"{what}: {problems[0]}", *problems[1:_SHOWN], *rest]))


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The fewest patterns that give every module its value: the last segment of names where all agree on it."""
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
        # A whole name also matches the end of a longer one, which therefore comes first.
        for name in sorted(group, key=len, reverse=True):
            ends = any(other.endswith(f".{name}") for other in group)
            if group[name] != default or ends or any(name.endswith(f".{other}") for other in group):
                patterns[re.escape(name)] = group[name]
    return patterns


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _first_matches(where: str, patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The value of the first pattern that matches the end of each name, whole segments."""
    matched = _match(where, [rf"(.*\.)?({key})" for key in patterns], names)
    values = list(patterns.values())
    return {name: values[indices[0]] for name, indices in zip(names, matched, strict=True) if indices}


def _match(where: str, patterns: Sequence[str], names: Collection[str]) -> list[list[int]]:
    """For each name the indices of the patterns that match it. In the child process, where they cannot hang."""
    if not patterns:
        return [[] for _ in names]
    later = " or a later one" if len(patterns) > 1 else ""
    what = f"{where}: the regular expression {patterns[0]!r:.80}{later}"
    return run_job(what, "match", patterns=patterns, names=list(names))


def _check_names(field: str, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"{field} must be a list of names, got {names!r:.80}")


def _int_if_whole(value: float) -> float:
    """An int where the value is whole, as PEFT writes alphas."""
    return int(value) if value == int(value) else value
