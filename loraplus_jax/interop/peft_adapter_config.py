"""Reads and writes PEFT's `adapter_config.json`: ranks and scales by module; unsupported options raise an error.

The rules are those of PEFT 0.21: a pattern is a regular expression for the end of a module's name, whole segments
only, and the first match applies.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from .._utils.json_files import read_json
from .._utils.untrusted import run_job
from .._utils.validation import check_choice, check_int, check_number
from ..adapter.config import Bias, LoRAPlusConfig
from .path_map import PathMap

# Options that change the model beyond W + s A B; null, false and empty turn them off.
_UNSUPPORTED = (
    *("lora_bias", "use_qalora", "use_bdlora", "megatron_config", "layer_replication"),
    *("trainable_token_indices", "alora_invocation_tokens", "loftq_config", "corda_config", "lora_ga_config"),
    *("velora_config", "kasa_config", "monteclora_config", "arrow_config"),
)
# Options without effect on a trained adapter, or whose effect shows in its tensors.
_IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("peft_type", "megatron_core", "eva_config", "qalora_group_size", "runtime_config"),
    *("ephemeral_gpu_offload", "fan_in_fan_out", "modules_to_tie", "target_modules_to_tie"),
)
_READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "bias"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "ensure_weight_tying", "init_lora_weights"),
)
# Initializations that leave the base unchanged; others subtract from it.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_CLASSIFIERS = ("classifier", "score")
"""The modules that PEFT always trains fully for the task SEQ_CLS."""
_HEADS = ("lm_head", "embed_out")
"""The output layers, which PEFT's "all-linear" leaves out."""
_TIED = ("embed_tokens", "wte", *_HEADS)
"""The modules of which ensure_weight_tying adapts all if one is selected."""


@dataclass(frozen=True, kw_only=True)
class PeftOptions:
    """The validated options of a PEFT adapter.

    Attributes:
      file: their file, for error messages.
      rank, alpha, rank_pattern, alpha_pattern, use_rslora, use_dora: as in PEFT, with patterns for PyTorch's names.
      dropout, bias: as in PEFT.
      target_modules, exclude_modules: names, one regular expression, or None.
      target_parameters: names of adapted parameters.
      layers_to_transform, layers_pattern: numbers of the layers in which `target_modules` selects, or None for all;
        and names of the lists of layers, or () for any.
      modules_to_save: names of fully trained modules.
      ties_weights: whether training an embedding, by an adapter or in full, also trains the tied head.
      base_model: name or path of the base model, or None.
      task_type: task, such as `"CAUSAL_LM"`, or None.
    """

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    dropout: float
    bias: Bias
    target_modules: str | Sequence[str] | None
    exclude_modules: str | Sequence[str] | None
    target_parameters: Sequence[str]
    layers_to_transform: Sequence[int] | None
    layers_pattern: Sequence[str]
    modules_to_save: Sequence[str]
    ties_weights: bool
    base_model: str | None
    task_type: str | None

    def ranks_and_alphas(self, names: Sequence[str]) -> dict[str, tuple[int, float]]:
        """The rank and alpha of each module's adapter."""
        ranks = _first_matches(f"{self.file}: rank_pattern", self.rank_pattern, names)
        alphas = _first_matches(f"{self.file}: alpha_pattern", self.alpha_pattern, names)
        return {name: (ranks.get(name, self.rank), alphas.get(name, self.alpha)) for name in names}

    def scale(self, rank: int, alpha: float) -> float:
        """The scale s of A B for a rank and alpha."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def left_out(self, modules: Mapping[str, bool]) -> dict[str, str]:
        """Finds the modules that PEFT does not adapt by these options.

        Args:
          modules: names of linear layers, convolutions and embeddings; and whether each is an embedding.

        Returns:
          A dict from the name of each such module to the option that leaves it out.
        """
        names = [*modules]
        is_classifier = self.task_type in ("SEQ_CLS", "TOKEN_CLS")
        saved = (*self.modules_to_save, *(_CLASSIFIERS if is_classifier else ()))
        targeted = {name for name in names if any(_owns(t, name) for t in self.target_parameters)}
        other_layers = set[str]()
        if self.target_modules is None:  # levanter's, which adapts what its file holds
            targeted |= set() if self.target_parameters else {*names}
        elif _is_all_linear(self.target_modules):
            targeted |= {n for n in names if not modules[n] and n not in (*_HEADS, *_CLASSIFIERS)}
        else:
            selected = self._selected("target_modules", names)
            if self.layers_to_transform and not isinstance(self.target_modules, str):
                layers = {*self.layers_to_transform}
                ends = selected - {*self.target_modules}  # PEFT takes a whole name in any layer
                other_layers = {name for name in ends if self._layer_of(name) not in layers}
            targeted |= selected - other_layers
        if self.ties_weights and any(name.rpartition(".")[2] in _TIED for name in targeted):
            targeted |= {name for name in names if name.rpartition(".")[2] in _TIED}
        options = {name: "target_modules" for name in names if name not in targeted}
        options |= {name: "layers_to_transform" for name in names if name in other_layers - targeted}
        options |= {n: "modules_to_save" for n in names if any(f".{m}." in f".{n}." for m in saved)}
        return options | dict.fromkeys(self._selected("exclude_modules", names), "exclude_modules")

    def adapted_parameters(self, path_map: PathMap) -> PathMap:
        """The path map without the rules for parameters that `target_parameters` does not name."""
        ends = [end.split(".") for end in self.target_parameters]

        def is_adapted(theirs: str) -> bool:
            segments = theirs.split(".")
            return any(
                len(end) <= len(segments)
                and all("{" in s or s == wanted for s, wanted in zip(segments[-len(end) :], end, strict=True))
                for end in ends
            )

        return tuple(rule for rule in path_map if rule[2:] != ("Parameter",) or is_adapted(rule[1]))

    def _selected(self, option: str, names: Sequence[str]) -> set[str]:
        """The names that `target_modules` or `exclude_modules` matches."""
        rule = getattr(self, option)
        if isinstance(rule, str):
            matched = _match(f"{self.file}: {option}", [rule], names)
            return {name for name, indices in zip(names, matched, strict=True) if indices}
        return {name for ends in _by_end(rule or (), names).values() for name in ends}

    def _layer_of(self, name: str) -> int | None:
        """The number of a module's layer, as PEFT finds it: the first one behind the name of a list of layers."""
        segments = name.split(".")
        numbers = [n for n, segment in enumerate(segments[:-1]) if segment.isdecimal()]
        for pattern in self.layers_pattern or (None,):
            for n in numbers:
                if n > 1 if pattern is None else _ends_in(".".join(segments[:n]), pattern):
                    return int(segments[n])
        return None

    def missing_targets(self, names: Collection[str]) -> list[str]:
        """Entries of `target_modules` that match none of the adapted modules' names and that no option explains.

        For a model whose modules are unknown: in one that has no such module, PEFT ignores the entry.
        """
        if self.exclude_modules or self.layers_to_transform or isinstance(self.target_modules, str):
            return []
        found = _by_end(self.target_modules or (), names)
        return [target for target in self.target_modules or () if target not in found]


def read_options(path: Path) -> PeftOptions:
    """Reads an `adapter_config.json`.

    Returns:
      A `PeftOptions`. Options that are null or not in the file have PEFT's defaults, except `r` and `lora_alpha`,
      which are required.

    Raises:
      ValueError: the file is not the config of a LoRA adapter, a value is invalid, or options are unsupported; the
        message names them all.
    """
    # PEFT writes every field of its config, most of them null.
    values = {name: value for name, value in read_json(path).items() if value is not None}
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"{path}: peft_type must be LORA, got {values.get('peft_type')!r:.80}; merge an adapter of another "
            "type in PEFT (merge_and_unload)"
        )
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
        return _parse_options(path, values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_options(path: Path, values: Mapping[str, Any]) -> PeftOptions:
    check_int("r", values.get("r"), at_least=1)
    check_number("lora_alpha", values.get("lora_alpha"), above=0.0)
    check_number("lora_dropout", values.get("lora_dropout", 0.0), at_least=0.0, below=1.0)
    patterns = {name: values.get(name, {}) for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, Mapping):
            raise TypeError(f"{name} must be a mapping, got {pattern!r:.80}")
        _match(name, [*pattern], [])
        for key, value in pattern.items():
            if name == "rank_pattern":
                check_int(f"{name}[{key!r:.80}]", value, at_least=1)
            else:
                check_number(f"{name}[{key!r:.80}]", value, above=0.0)
    for name in ("use_rslora", "use_dora", "ensure_weight_tying"):
        if not isinstance(values.get(name, False), bool):
            raise TypeError(f"{name} must be true or false, got {values[name]!r:.80}")
    check_choice("bias", values.get("bias", "none"), get_args(Bias))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values.get(name), str):
            _match(name, [values[name]], [])
        else:
            _check_names(name, values.get(name, []))
    for name in ("modules_to_save", "target_parameters"):
        _check_names(name, values.get(name, []))
    layers = values.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (isinstance(layers, list) and all(type(n) is int for n in layers)):
        raise TypeError(f"layers_to_transform must be a list of integers, got {layers!r:.80}")
    lists = values.get("layers_pattern") or []
    lists = [lists] if isinstance(lists, str) else lists
    _check_names("layers_pattern", lists)
    # PEFT takes both for regular expressions.
    for name, entries in (("layers_pattern", lists), ("modules_to_save", values.get("modules_to_save", []))):
        if invalid := [entry for entry in entries if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", entry)]:
            raise ValueError(f"{name} must be names, not regular expressions, got {invalid[0]!r:.80}")
    for name in ("base_model_name_or_path", "task_type"):
        if not isinstance(values.get(name, ""), str):
            raise TypeError(f"{name} must be text, got {values[name]!r:.80}")
    if layers is not None and isinstance(values.get("target_modules"), str):
        raise ValueError(
            "layers_to_transform requires a list of target_modules, as PEFT does, got a regular expression"
        )
    if lists and layers is None:
        raise ValueError(f"layers_pattern requires layers_to_transform, as PEFT does, got {lists} alone")
    return PeftOptions(
        file=path,
        rank=values["r"],
        alpha=values["lora_alpha"],
        **patterns,
        use_rslora=values.get("use_rslora", False),
        use_dora=values.get("use_dora", False),
        dropout=values.get("lora_dropout", 0.0),
        bias=values.get("bias", "none"),
        target_modules=values.get("target_modules"),
        exclude_modules=values.get("exclude_modules"),
        target_parameters=values.get("target_parameters", []),
        layers_to_transform=layers,
        layers_pattern=lists,
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
    modules: Sequence[str] | None,
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
      modules: names of all modules of the PyTorch model; None if unknown.
      transposed: whether weights are stored as (in, out).
      tied: whether an adapted or fully trained embedding is also the head.
      base_model, task_type: the base model and the task, if known.

    Returns:
      A dict of JSON values with PEFT's option names as keys. `"target_parameters"`, `"ensure_weight_tying"` and
      `"use_dora"` are in it only if needed.
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
        "target_modules": _shortest_ends([name for name in ranks if name not in parameters], modules),
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
        | ({"use_dora": True} if config.variant == "dora" else {})
    )


def _shortest_ends(names: Sequence[str], modules: Sequence[str] | None) -> list[str]:
    """The shortest ends, whole segments only, that select these of all modules; the names if those are unknown."""
    if modules is None:
        return list(names)
    # The same module may be named with another prefix in the two lists.
    others = [m for m in modules if not any(_ends_in(m, name) or _ends_in(name, m) for name in names)]
    ends: dict[str, None] = {}
    for name in names:
        segments = name.split(".")
        candidates = (".".join(segments[n:]) for n in reversed(range(len(segments))))
        ends[next(end for end in candidates if not any(_ends_in(other, end) for other in others))] = None
    return list(ends)


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    # Few patterns, since PEFT tries all of them for every module: the last segment alone if all its modules agree.
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


def _is_all_linear(rule: str | Sequence[str]) -> bool:
    return isinstance(rule, str) and rule.lower() == "all-linear"


def _owns(parameter: str, module: str) -> bool:
    """Whether a name in `target_parameters` is that of a parameter of the module."""
    owner = parameter.rpartition(".")[0]
    return not owner or _ends_in(module.removesuffix(".base_layer"), owner)


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _by_end(ends: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """The names by the ends that `_ends_in` finds, without a comparison of each with each: both are untrusted."""
    ends, found = {*ends}, {}
    segments = {end.count(".") + 1 for end in ends}
    for name in names:
        for end in {".".join(name.rsplit(".", count)[-count:]) for count in segments} & ends:
            found.setdefault(end, []).append(name)
    return found


def _first_matches(where: str, patterns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The value of the first pattern that matches the end of each name, whole segments."""
    matched = _match(where, [rf"(.*\.)?({key})" for key in patterns], names)
    values = list(patterns.values())
    return {name: values[indices[0]] for name, indices in zip(names, matched, strict=True) if indices}


def _match(where: str, patterns: Sequence[str], names: Collection[str]) -> list[list[int]]:
    # For each name the indices of the patterns that match it. In a child process: a pattern from a file may run for
    # ever, and Python's re has no timeout.
    if not patterns:
        return [[] for _ in names]
    later = " or a later one" if len(patterns) > 1 else ""
    what = f"{where}: the regular expression {patterns[0]!r:.80}{later}"
    return run_job(what, "match", patterns=patterns, names=list(names))


def _check_names(field: str, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"{field} must be a list of names, got {names!r:.80}")


def _int_if_integral(value: float) -> float:
    # As PEFT writes it: lora_alpha is an int there.
    return int(value) if value == int(value) else value
