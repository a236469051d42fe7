"""Reads and writes adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Two more files hold what PEFT cannot store: `loraplus.json` the metadata of `step.describe_run`, including
lambda and your own fields, and `loraplus.safetensors` variables without a name in the PyTorch model. A path map
converts names and layouts, see `path_map`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._utils.atomic import atomic_write, to_json
from .._utils.records import check_files, record_text
from .._utils.validation import check_choice, raise_problems
from ..adapter.config import LoRAPlusConfig, pattern_of
from ..adapter.spec import Specs
from ..adapter.target_rules import parameter_rule
from ..adapter.tree import factors_by_module, flatten, unflatten
from ..optim.trained_ranks import alpha_for
from ..step.run_metadata import describe_run
from .adapter_directory import (
    Adapter,
    check_config_matches_specs,
    check_ranks,
    host_array,
    read_description,
    read_tensors,
    tensor_bytes,
)
from .fused_modules import Factors, Part, fuse, split
from .path_map import (
    MAGNITUDE_END,
    Index,
    PathMap,
    Target,
    adapted_leaves,
    check_path_map,
    factor_shapes,
    factors_from_peft,
    factors_to_peft,
    leaf_paths,
    modules_of,
    rank_of_slice,
    tied_heads,
    torch_module_of,
)
from .peft_adapter_config import PeftOptions, make_options, read_options
from .peft_modules_to_save import OF_HEAD, drop_copies, leaves_from_torch, leaves_to_torch
from .serving_checks import SERVERS, Server, find_problems

OPTIONS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOTES_FILE, OWN_TENSORS_FILE = "loraplus.json", "loraplus.safetensors"
_PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", MAGNITUDE_END)
_DTYPES = ("float32", "float16", "bfloat16")


def save_peft(
    directory: str | Path,
    lora: Mapping[str, Any],
    specs: Specs,
    config: LoRAPlusConfig,
    path_map: PathMap,
    *,
    extras: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
    modules: Sequence[str] | None = None,
    base: str | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    readme: str | None = None,
    check_for: Server | None = None,
    prune: bool = False,
    **more: Any,
) -> None:
    """Writes an adapter in PEFT's format, atomically; `PeftModel.from_pretrained` loads it without changes.

    Args:
      directory: a new directory; existing files are never overwritten.
      lora: the tree of factors; stacked layers become separate modules.
      specs: the table from `init_lora`.
      config: config of the adapter.
      path_map: PyTorch names of all adapted modules and all modules in `extras`. Adapters on parts of a PyTorch
        module become one, whose rank is the sum of theirs.
      extras: fully trained variables that the PyTorch model also has, `{"params": ...}`. A leaf whose rule has an
        index is stacked on its first axis.
      own: fully trained variables that the PyTorch model lacks; stored for loraplus_jax only.
      modules: names of all linear layers, convolutions and embeddings of the PyTorch model, with or without the
        prefix of a model with a head. With them `target_modules` holds the shortest ends of names that select the
        same modules, such as `q_proj`; else whole names.
      base: `step.fingerprint` of the frozen variables.
      base_model: name or path under which PEFT finds the base model.
      task_type: task, such as `"CAUSAL_LM"` or `"SEQ_CLS"`.
      readme: text of a `README.md`.
      check_for: a server, `"vllm"` or `"sglang"`, that must serve the adapter as PEFT would.
      prune: whether to leave out components that are 0 in B, which gives every layer a rank of its own, as after
        AdaLoRA; a layer without other components keeps one. The scales s stay as they are.
      **more: your own JSON-serializable fields for `loraplus.json`, such as rates, groups and decay.

    Raises:
      ValueError: the directory exists; a module has no rule or no counterpart in PEFT (the message lists all); or
        config, specs and tensors differ; or `check_for` would reject or ignore something (the message lists all).
    """
    if check_for is not None:
        check_choice("check_for", check_for, tuple(SERVERS))
    check_path_map(path_map)
    check_config_matches_specs(specs, config)
    targets, problems = adapted_leaves(specs, path_map)
    adapted = {name for target in targets.values() for name in target.names.values()}
    leaves = flatten(extras or {})
    leaf_tensors, saved, more_problems = leaves_to_torch(leaves, adapted, path_map)
    raise_problems(f"{directory}: cannot convert the adapter to PEFT", problems + more_problems)
    factors = factors_by_module("lora", lora, specs)
    tensors, ranks, alphas = _factor_tensors(factors, targets, config, prune=prune)
    # Under the head's name too: versions of PEFT without ensure_weight_tying for adapters then compute the same.
    for head, name in tied_heads(path_map).items():
        if name in ranks:
            ranks[head], alphas[head] = ranks[name], alphas[name]
            copies = {f"{head}.{end}": tensors[f"{name}.{of}"].T for end, of in OF_HEAD.items()}
            tensors |= {key: np.ascontiguousarray(copy) for key, copy in copies.items()}
    settings = {(ranks[name], alphas[name]) for name in ranks}
    if len(settings) == 1:  # no patterns, which servers ignore
        rank, alpha = settings.pop()
        defaults = dataclasses.replace(config, rank=rank, alpha=alpha)
    else:
        defaults = config
    options = make_options(
        defaults,
        ranks,
        alphas,
        saved=saved,
        parameters=[n for t in targets.values() if t.kind == "Parameter" for n in t.names.values()],
        modules=modules,
        transposed=any(t.kind == "Conv1D" for t in targets.values()),
        tied=_has_tied(targets, leaves, path_map),
        base_model=base_model,
        task_type=task_type,
    )
    if check_for is not None:
        what = f"{check_for} would not serve the adapter as PEFT does; merge it into the model instead"
        raise_problems(what, find_problems(check_for, options))
    files = {
        WEIGHTS: tensor_bytes({_PREFIX + name: tensor for name, tensor in (tensors | leaf_tensors).items()}),
        OPTIONS: (to_json(options, indent=1) + "\n").encode(),
    }
    files |= {OWN_TENSORS_FILE: tensor_bytes(flatten(own))} if own else {}
    files |= {"README.md": readme.encode()} if readme is not None else {}
    directory = Path(directory).resolve()
    with atomic_write(directory, new=True) as partial:
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_bytes(content)
        # Not the options: publishing an adapter means editing its base model's name there.
        tensor_files = [name for name in (WEIGHTS, OWN_TENSORS_FILE) if name in files]
        notes = record_text(describe_run(specs, config, base=base, **more), partial, tensor_files)
        (partial / NOTES_FILE).write_text(notes, encoding="utf-8")


def load_peft(
    directory: str | Path, specs: Specs, path_map: PathMap, *, params: Mapping[str, Any] | None = None
) -> Adapter:
    """Reads an adapter in PEFT's format for a model with matching adapters.

    Args:
      directory: directory with `adapter_config.json` and `adapter_model.safetensors`.
      specs: the table from `init_lora`, for a model with the config `peft_config(directory, ...)` or an equivalent
        one.
      path_map: as for `save_peft`.
      params: the base's parameters or their shapes; required if the file contains more than factors. With shapes,
        copies of base weights in the file are not compared with the base, and a leaf for which the file has only
        some layers stays a shape.

    Returns:
      Factors and extras in their stored dtypes, and the config from `peft_config`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged or a pickle, an option is unsupported, or file, options, specs and path map do
        not match; the message lists all problems.
    """
    check_path_map(path_map)
    directory = Path(directory)
    options, tensors = read_peft(directory, path_map)
    targets, problems = adapted_leaves(specs, path_map)
    factors = {name: tensor for name, tensor in tensors.items() if name.endswith(_ENDS)}
    # Our own export may be pruned: its notes have the specs' ranks, and its layers have lower ones.
    saved_config = _saved_config(directory)
    slices, more_problems = _slice_factors(
        factors, options, targets, tied_heads(path_map), is_ours=saved_config is not None
    )
    problems += more_problems + _missing_modules(tensors, options, targets, path_map, params)
    others = {name: tensor for name, tensor in tensors.items() if name not in factors}
    extras, more_problems = leaves_from_torch(others, path_map, flatten({"params": params or {}}))
    problems += more_problems
    if not problems and not options.ties_weights and _has_tied(targets, extras, path_map):
        problems.append(
            "ensure_weight_tying must be true, since the model's embedding is also its head; the adapter is "
            "for the embedding only"
        )
    raise_problems(f"{directory} does not match the model", problems)
    lora = {}
    for key, target in targets.items():
        paths = target.spec.factor_paths(key)
        lora |= zip(paths, map(jnp.asarray, factors_from_peft(slices[key], target)), strict=True)
    extras |= read_tensors(directory / OWN_TENSORS_FILE) if (directory / OWN_TENSORS_FILE).is_file() else {}
    layers = next((spec.layers for spec in specs.values() if spec.layers is not None), None)
    letters = {key: spec.rule_letters for key, spec in specs.items() if spec.kind == "parameter"}
    config = saved_config or _config(directory, options, [*tensors], path_map, layers, letters.get)
    check_config_matches_specs(specs, config)
    # Last, since the other messages say more.
    check_files(directory / NOTES_FILE, peft_notes(directory) or {})
    return Adapter(unflatten(lora), dict(specs), config, unflatten(extras))


def peft_config(
    directory: str | Path,
    path_map: PathMap,
    *,
    layers: int | None = None,
    target_parameters: Mapping[str, str] | Sequence[str] = (),
) -> LoRAPlusConfig:
    """Reads the config of an adapter in PEFT's format, from `loraplus.json` if it exists.

    PEFT does not store lambda: without that file, `lr_ratio` is the default.

    Args:
      directory: directory with `adapter_config.json` and `adapter_model.safetensors`.
      path_map: as for `save_peft`.
      layers: number of layers in a stack; by default the file is assumed to contain all of them.
      target_parameters: the model's parameters that no layer owns, such as experts, as in `LoRAPlusConfig`: PEFT's
        files do not have the letters of their axes. Those that the adapter adapts are in the config's
        `target_parameters`, and everything else is in its `target_modules`.

    Returns:
      A `LoRAPlusConfig` whose rules are for our paths.

    Raises:
      FileNotFoundError, ValueError: as in `load_peft`; or layers of one stack differ in rank or alpha.
    """
    check_path_map(path_map)
    given: Any = LoRAPlusConfig(target_modules="all-linear", target_parameters=target_parameters)
    options, tensors = read_peft(Path(directory), path_map)
    if (config := _saved_config(Path(directory))) is not None:
        check_ranks(f"{Path(directory) / NOTES_FILE}", config, tensors)
        return config
    path_map = options.adapted_parameters(path_map)
    numbers = {index[0] for name in tensors for _, index in _find_modules(name, path_map) if index}
    if layers is not None and (extra := sorted(n for n in numbers if n >= layers)):
        raise ValueError(
            f"{directory} does not match the model: it adapts layers {extra} of a model with {layers} layers"
        )
    # Other trained tensors may be in all layers.
    factors = (name for name in tensors if name.endswith(_ENDS))
    adapted = {index[0] for name in factors for _, index in _find_modules(name, path_map) if index}
    is_part = layers is not None and adapted != {*range(layers)}
    numbers = tuple(sorted(adapted)) or None if is_part else None
    return _config(
        Path(directory),
        options,
        [*tensors],
        path_map,
        numbers,
        lambda path: given.target_parameters.get(parameter_rule(given, path)),
    )


def peft_options(directory: str | Path) -> PeftOptions:
    """Reads the options in `adapter_config.json`.

    Returns:
      A `PeftOptions`, as from `read_options`.

    Raises:
      FileNotFoundError, ValueError: as in `load_peft`.
    """
    return read_peft(Path(directory))[0]


def peft_names(directory: str | Path) -> list[str]:
    """Reads the names of an adapter's tensors.

    Returns:
      The names in the naming of the base model, without the prefix of PEFT's wrapper, and without the tensors under
      `modules_to_save` and `original_module`.

    Raises:
      FileNotFoundError, ValueError: as in `load_peft`.
    """
    return list(read_peft(Path(directory))[1])


def peft_notes(directory: str | Path) -> dict[str, Any] | None:
    """Reads `loraplus.json`.

    Returns:
      A dict of JSON values, as from `read_description`; None if the file does not exist.

    Raises:
      ValueError: the file is damaged or has another format version.
    """
    path = Path(directory) / NOTES_FILE
    return read_description(path) if path.is_file() else None


def _saved_config(directory: Path) -> LoRAPlusConfig | None:
    notes = peft_notes(directory)
    if notes is None or notes["config"] is None:  # of `loraplus convert`, whose record has the digests alone
        return None
    try:
        return LoRAPlusConfig.from_json(notes["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / NOTES_FILE}: {error}") from None


def _config(
    directory: Path,
    options: PeftOptions,
    names: list[str],
    path_map: PathMap,
    layers: tuple[int, ...] | None,
    letters_of: Callable[[str], str | None],
) -> LoRAPlusConfig:
    """Converts PEFT's options and tensor names to our config; `letters_of` a path is None if a layer owns it."""
    modules: dict[str, dict[Index, str]] = {}
    saved, problems, path_map = {}, [], options.adapted_parameters(path_map)
    for name in names:
        locations = _find_modules(name, path_map)
        if not locations:
            problems.append(f"{name}: no rule of the path map matches")
        for module, index in locations:
            if name.endswith(_ENDS):
                torch_module = torch_module_of(path_map, module)
                assert torch_module is not None
                modules.setdefault(module, {})[index] = torch_module.at(index)
            elif name.endswith(".weight") and not name.endswith(".base_layer.weight"):
                saved[module] = None
    ranks, alphas = {}, {}
    all_names = [name for torch_names in modules.values() for name in torch_names.values()]
    by_name = options.ranks_and_alphas(all_names)
    for module, torch_names in modules.items():
        settings = {by_name[name] for name in torch_names.values()}
        if len(settings) > 1:
            problems.append(
                f"{module}: all layers of a stack must have equal ranks and alphas, got {sorted(settings)}"
            )
        if () not in torch_names and layers is not None and {index[0] for index in torch_names} != {*layers}:
            problems.append(
                f"{module} must be adapted in the layers {layers}, like other modules of its stack"
            )
        ranks[module], alphas[module] = settings.pop()
    raise_problems(f"{directory} does not match the model", problems)
    rules, parameters = {module: re.escape(module) for module in modules}, {}
    for module in sorted(modules):
        # Only the model knows which of these paths it has, so a rule may be for several.
        axes = {path: letters for path in leaf_paths(module) if (letters := letters_of(path)) is not None}
        if axes:
            rules[module] = "|".join(map(re.escape, axes))
            parameters[rules[module]] = next(iter(axes.values()))
    return LoRAPlusConfig(
        target_modules=tuple(module for module in sorted(modules) if rules[module] not in parameters),
        target_parameters=parameters,
        layers_to_transform=layers,
        rank=options.rank,
        alpha=float(options.alpha),
        rank_pattern={rules[m]: rank for m, rank in ranks.items() if rank != options.rank},
        alpha_pattern={rules[m]: float(alpha) for m, alpha in alphas.items() if alpha != options.alpha},
        use_rslora=options.use_rslora,
        dropout=options.dropout,
        variant="dora" if options.use_dora else "lora",
        modules_to_save=tuple(sorted(saved)),
        # PEFT accepts any on a model without biases.
        bias=options.bias if any(name.endswith(".bias") for name in names) else "none",
    )


def _find_modules(name: str, path_map: PathMap) -> list[tuple[str, Index]]:
    end = next((end for end in _ENDS if name.endswith(end)), None)
    module = name.removesuffix(end) if end else name.rpartition(".")[0].removesuffix(".base_layer")
    return modules_of(path_map, module)


def read_peft(directory: Path, path_map: PathMap = ()) -> tuple[PeftOptions, dict[str, Any]]:
    """Reads the options and the tensors of an adapter, whatever the model; `path_map` names tied heads.

    Returns:
      The options, and the tensors as JAX arrays in their stored dtypes, by the names of `peft_names`.

    Raises:
      FileNotFoundError, ValueError: as in `load_peft`.
    """
    if not (directory / OPTIONS).is_file():
        raise FileNotFoundError(f"{directory} is not a PEFT adapter: {OPTIONS} is missing")
    if not (directory / WEIGHTS).is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ValueError(
                f"{directory} has its weights only in {pickles[0]}, a pickle, which can run arbitrary code; "
                "convert it in a sandbox with PEFT: model.save_pretrained(d)"
            )
        raise FileNotFoundError(f"{directory} is not a PEFT adapter: {WEIGHTS} is missing")
    options, tensors = read_options(directory / OPTIONS), read_tensors(directory / WEIGHTS)
    problems = [f"{name} must start with {_PREFIX}" for name in tensors if not name.startswith(_PREFIX)]
    problems += [
        f"{name} must be {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, got {tensor.dtype}"
        for name, tensor in tensors.items()
        if tensor.dtype.name not in _DTYPES
    ]
    raise_problems(f"{directory / WEIGHTS} is unsupported", problems)
    check_ranks(f"{directory / OPTIONS}", options, tensors)
    # PEFT names modules as seen from its wrapper around the model.
    unprefixed = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    kept, problems = drop_copies(unprefixed, path_map)
    raise_problems(f"{directory / WEIGHTS} is inconsistent", problems)
    modules = {
        name.removesuffix(end): "embedding" in end for name in kept for end in _ENDS if name.endswith(end)
    }
    problems = [f"{name} is left out by {option}" for name, option in options.left_out(modules).items()]
    for name in kept:
        module, _, end = name.rpartition(".")
        inner = module.removesuffix(".base_layer")
        # PEFT has the weight and bias of an adapted module, and only of one, under base_layer.
        if not name.endswith(_ENDS) and (inner in modules) == (inner == module):
            called = f"{inner}.base_layer.{end}" if inner in modules else f"{inner}.{end}"
            problems.append(f"{name} would be {called}")
    raise_problems(
        f"{directory / WEIGHTS} has tensors that PEFT ignores; correct {OPTIONS} or their names, or remove them",
        problems,
    )
    return options, kept


def _slice_factors(
    factors: Mapping[str, Any],
    options: PeftOptions,
    targets: Mapping[str, Target],
    heads: Mapping[str, str],
    *,
    is_ours: bool,
) -> tuple[dict[str, dict[Index, Factors]], list[str]]:
    """The factors of each adapted leaf by index, and one line per factor that is missing, extra or misshapen, or
    that contradicts options or specs. Ours may be pruned, and parts of a module may have had different scales.
    """
    slices: dict[str, dict[Index, Factors]] = {key: {} for key in targets}
    problems, expected = [], set()
    names = [name for target in targets.values() for name in target.names.values()]
    heads = {head: name for head, name in heads.items() if name in names}
    by_name = options.ranks_and_alphas([*names, *heads])
    problems += [
        f"~ {head} must have the rank and alpha of {name}, {by_name[name]}, got {by_name[head]}, since they are "
        "one weight"
        for head, name in heads.items()
        if by_name[head] != by_name[name]
    ]
    owners: dict[str, list[tuple[str, Index]]] = {}  # several if they are parts of a module
    for key, target in targets.items():
        for index, name in target.names.items():
            owners.setdefault(name, []).append((key, index))
        problems += _check_shared(factors, target)
    for name, leaves in owners.items():
        target, (rank, alpha) = targets[leaves[0][0]], by_name[name]
        keys = target.keys(leaves[0][1])
        expected |= {*keys}
        if missing := [key for key in keys if key not in factors]:
            problems += [f"- {key} is missing" for key in missing]
            continue
        pair = tuple(host_array(factors[key]) for key in keys)
        # Check the tensors against the file's own options, then against the model.
        (length, *_), (_, width, *_) = factor_shapes(target, rank)[:2]
        if (pair[0].shape[:1], pair[1].shape[1:2]) != ((length,), (width,)):
            shapes = f"{pair[0].shape} and {pair[1].shape}"
            problems.append(f"~ {name}: factors must have rank {rank} as in {OPTIONS}, got {shapes}")
            continue
        pairs, scale = [pair], options.scale(rank, alpha)
        if target.outputs is not None:
            parts = [targets[key] for key, _ in leaves]
            try:
                pairs = split(pair, [(part.outputs, part.spec.rank) for part in parts if part.outputs])
            except ValueError as error:
                problems.append(f"~ {name}: {error}")
                continue
        for (key, index), pair in zip(leaves, pairs, strict=True):
            target, to_scale = targets[key], scale
            if is_ours and target.outputs is not None and not math.isclose(scale, target.spec.scale):
                a, b, *rest = pair
                pair, to_scale = (a, b * (scale / target.spec.scale), *rest), target.spec.scale
            problems += _check_pair(name, pair, to_scale, options, target, may_be_pruned=is_ours)
            slices[key][index] = pair
    problems += [f"+ {name} has no adapter in the model" for name in sorted(factors.keys() - expected)]
    return slices, problems


def _module_names(targets: Mapping[str, Target], path_map: PathMap, params: Any) -> dict[str, bool]:
    """PyTorch's names of the modules of a model that PEFT can adapt; and whether each is an embedding."""
    names: dict[str, bool] = {}
    for target in targets.values():
        if target.kind != "Parameter":
            modules = (*target.names.values(), *target.others)
            names |= dict.fromkeys(modules, target.kind.endswith("Embedding"))
    leaves = {target.spec.leaf for target in targets.values()}
    for path, leaf in flatten({"params": params or {}}).items():
        module, _, name = path.removeprefix("params/").rpartition("/")
        torch_module = torch_module_of(path_map, module)
        if path in leaves or torch_module is None or torch_module.kind == "Parameter":
            continue
        if name in ("kernel", "embedding"):
            # As of fully trained leaves, the indices of a stack come first.
            sizes = map(range, leaf.shape[: len(torch_module.holes)])
            names |= {torch_module.at(index): name == "embedding" for index in itertools.product(*sizes)}
    return names


def _missing_modules(
    tensors: Mapping[str, Any],
    options: PeftOptions,
    targets: Mapping[str, Target],
    path_map: PathMap,
    params: Any,
) -> list[str]:
    """One line per module without a spec that the options select and the file has no tensors for.

    Without `params`, which say what modules there are, one line per entry of `target_modules` without factors.
    """
    names = _module_names(targets, path_map, params)
    trained = {name.rpartition(".")[0] for name in tensors}
    problems = [
        f"- {name} has no weight, but {OPTIONS} has it in modules_to_save"
        for name in sorted(names.keys() - trained)
        if any(name.endswith(end) for end in options.modules_to_save)  # as PEFT finds it
    ]
    adapted = {name.removesuffix(end) for name in tensors for end in _ENDS if name.endswith(end)}
    adapted |= {name for target in targets.values() for name in target.names.values()}
    adapted |= {head for head, name in tied_heads(path_map).items() if name in adapted}
    problems += [
        f"target_parameters: {rule!r:.80} has no factors"
        for rule in options.target_parameters
        if not any(f".{name}".endswith((f".{rule}", f".{rule}".removesuffix(".weight"))) for name in adapted)
    ]
    if options.target_modules is None:
        return problems
    others = {name: is_embedding for name, is_embedding in names.items() if name not in adapted}
    missing = others.keys() - options.left_out(others).keys()
    idle = options.missing_targets(adapted) if params is None else []
    problems += [f"- {name} has no factors, but {OPTIONS} selects it" for name in sorted(missing)]
    return problems + [f"target_modules: {rule!r:.80} has no factors" for rule in idle]


def _has_tied(targets: Mapping[str, Target], leaves: Iterable[str], path_map: PathMap) -> bool:
    # Of an embedding that is also the head, PEFT must be told that both change.
    modules = (torch_module_of(path_map, path.removeprefix("params/").rpartition("/")[0]) for path in leaves)
    return any(m is not None and m.kind == "TiedEmbedding" for m in (*targets.values(), *modules))


def _check_pair(
    name: str, pair: Factors, scale: float, options: PeftOptions, target: Target, *, may_be_pruned: bool
) -> list[str]:
    spec, rank, shapes = target.spec, rank_of_slice(pair[0], target), [factor.shape for factor in pair]
    expected = factor_shapes(target, rank)
    if rank > spec.rank or (rank < spec.rank and not may_be_pruned):
        return [f"~ {name} must have the model's rank {spec.rank}, got {rank}"]
    if not math.isclose(scale, spec.scale):
        return [f"~ {name} must have the model's scale {spec.scale:g}, got {scale:g}"]
    if options.use_dora != spec.magnitude:
        ours, theirs = ("dora" if is_dora else "lora" for is_dora in (spec.magnitude, options.use_dora))
        return [f"~ {name} must have the model's variant {ours}, got {theirs}"]
    if tuple(shapes) != expected:
        lists = (" and ".join(map(str, each)) for each in (expected, shapes))
        return [f"~ {name}: factors must be {next(lists)}, got {next(lists)}"]
    return []


def _check_shared(factors: Mapping[str, Any], target: Target) -> list[str]:
    """One line per A in the file that differs from another, though the model has one A for both."""
    return [
        f"~ {key} must equal {first}, since {target.spec.leaf} has one A for both; give its first axis a batch "
        "letter in target_parameters, for one A each"
        for first, *others in target.shared_a()
        for key in others
        if {first, key} <= factors.keys() and not np.array_equal(factors[first], factors[key])
    ]


def _factor_tensors(
    lora: Mapping[str, Sequence[Any]],
    targets: Mapping[str, Target],
    config: LoRAPlusConfig,
    *,
    prune: bool,
) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, float]]:
    """The tensors of PEFT's file, and ranks and alphas by name in PyTorch."""
    modules: dict[str, list[tuple[str, Index, Factors]]] = {}  # several if they are parts of a module
    for key, target in targets.items():
        values = [host_array(factor) for factor in lora[key]]
        for index, factors in factors_to_peft(values, target, prune=prune):
            modules.setdefault(target.names[index], []).append((key, index, factors))
    tensors, ranks, alphas = {}, {}, {}
    for name, leaves in modules.items():
        key, index, factors = leaves[0]
        target, spec = targets[key], targets[key].spec
        if target.outputs is not None:
            parts = [(targets[each], pair) for each, _, pair in leaves]
            try:
                factors = fuse(
                    [Part(t.outputs, pair, t.spec.scale) for t, pair in parts if t.outputs], spec.scale
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        tensors |= dict(zip(target.keys(index), map(np.ascontiguousarray, factors), strict=True))
        rank = ranks[name] = rank_of_slice(factors[0], target)
        pattern = pattern_of(config.alpha_pattern, key)
        alphas[name] = config.alpha if pattern is None else config.alpha_pattern[pattern]
        if rank != spec.rank:  # with the same scale
            alphas[name] = alpha_for(spec.scale, rank, config)
    return tensors, ranks, alphas
