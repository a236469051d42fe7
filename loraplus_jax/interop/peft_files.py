"""Adapters in PEFT's files, written and read: `adapter_config.json` and `adapter_model.safetensors`.

What PEFT has no place for lies beside them: `loraplus.json` holds what `checkpoint.describe_run` makes, lambda and
the caller's own fields included, and `loraplus.safetensors` variables that have no name in the other model. Names
and layouts come from a path map, see `path_map`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..atomic import replacing, to_json
from ..checkpoint import FORMAT, describe_run
from ..config import LoRAPlusConfig, pattern_of
from ..json_files import read_json
from ..spec import Specs
from ..tree import flat_factors, flatten, unflatten
from .adapter_files import (
    Adapter,
    check_config_matches_specs,
    host_array,
    read_tensors,
    tensor_bytes,
)
from .path_map import (
    Index,
    PathMap,
    Target,
    adapted_leaves,
    check_path_map,
    factor_shapes,
    factors_from_peft,
    factors_to_peft,
    module_of,
    torch_module_of,
)
from .peft_config import PeftOptions, make_options, raise_problems, read_options
from .peft_modules_to_save import assign_tensors, drop_copies, name_leaves, slice_leaves, stack_slices

OPTIONS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOTES_FILE, OWN_TENSORS_FILE = "loraplus.json", "loraplus.safetensors"
_PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
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
    base: str | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    readme: str | None = None,
    **more: Any,
) -> None:
    """Writes an adapter as PEFT keeps it, whole or not at all; `PeftModel.from_pretrained` loads it as it is.

    Args:
      directory: a new one; nothing is ever overwritten.
      lora: the tree of factors; stacked layers become modules of their own.
      specs: the table from `init_lora`.
      config: what was applied.
      path_map: where each adapted module, and each one in `extras`, is in the PyTorch model.
      extras: variables trained in full that the PyTorch model has too, `{"params": ...}`. A leaf whose rule has an
        index is stacked on its first axis.
      own: variables that it has not; they are kept for us, and PEFT does not see them.
      base: `checkpoint.fingerprint` of the frozen variables.
      base_model: the name or path that PEFT is to find the base by.
      task_type: such as `"CAUSAL_LM"` or `"SEQ_CLS"`.
      readme: the text of a `README.md`.
      **more: the caller's own JSON-able fields for `loraplus.json`: rates, groups, decay.

    Raises:
      ValueError: the directory exists; a module has no rule, or PEFT nothing like it (all are listed); config,
        specs and tensors differ.
    """
    check_path_map(path_map)
    check_config_matches_specs(specs, config)
    targets, problems = adapted_leaves(specs, path_map)
    slots, more_problems = slice_leaves(flatten(extras or {}), path_map)
    raise_problems(f"{directory}: the adapter cannot be written for PEFT", problems + more_problems)
    tensors = _factor_tensors(flat_factors(lora, specs), targets)
    adapted = {name for target in targets.values() for name in target.names.values()}
    leaves, saved = name_leaves(slots, adapted, path_map)
    options = make_options(
        config,
        {name: t.spec.rank for t in targets.values() for name in t.names.values()},
        {name: _alpha_of(config, key) for key, t in targets.items() for name in t.names.values()},
        saved=saved,
        parameters=[n for t in targets.values() if t.kind == "Parameter" for n in t.names.values()],
        transposed=any(t.kind == "Conv1D" for t in targets.values()),
        tied=any(t.kind == "TiedEmbedding" for t in targets.values()),
        base_model=base_model,
        task_type=task_type,
    )
    files = {
        WEIGHTS: tensor_bytes({_PREFIX + name: tensor for name, tensor in (tensors | leaves).items()}),
        OPTIONS: _to_json(options),
        NOTES_FILE: _to_json(describe_run(specs, config, base=base, **more)),
    }
    files |= {OWN_TENSORS_FILE: tensor_bytes(flatten(own))} if own else {}
    files |= {"README.md": readme.encode()} if readme is not None else {}
    directory = Path(directory).resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing(directory, new=True) as partial:
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_bytes(content)


def load_peft(
    directory: str | Path, specs: Specs, path_map: PathMap, *, params: Mapping[str, Any] | None = None
) -> Adapter:
    """Reads an adapter in PEFT's files for a model that has adapters already.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      specs: the table of the model, from `init_lora` of a model made with `peft_config(directory, ...)`, or with
        another config that says the same.
      path_map: as for `save_peft`.
      params: the base's parameters or their shapes, needed where the file has more than factors. With shapes, what
        needs values is left out: a copy of a base weight in the file is not compared with it, and a leaf of which
        the file has some layers only stays a shape.

    Returns:
      Factors and extras, in their stored dtypes, and the config that `peft_config` gives.

    Raises:
      FileNotFoundError: no such files.
      ValueError: a file is damaged or a pickle, an option is on that we lack, or file, options, specs and path map
        do not fit each other; all problems are listed.
    """
    check_path_map(path_map)
    directory = Path(directory)
    options, tensors = _read(directory, path_map)
    targets, problems = adapted_leaves(specs, path_map)
    factors = {name: tensor for name, tensor in tensors.items() if name.endswith(_ENDS)}
    problems += _check_factors(factors, options, targets)
    others = {name: tensor for name, tensor in tensors.items() if name not in factors}
    slots, more_problems = assign_tensors(others, path_map, flatten({"params": params or {}}))
    raise_problems(f"{directory} does not fit the model", problems + more_problems)
    lora = {}
    for key, target in targets.items():
        pairs = {index: tuple(host_array(factors[k]) for k in target.keys(index)) for index in target.names}
        paths = target.spec.factor_paths(key)
        lora |= zip(paths, map(jnp.asarray, factors_from_peft(pairs, target)), strict=True)
    extras = stack_slices(slots, flatten({"params": params or {}}))
    extras |= read_tensors(directory / OWN_TENSORS_FILE) if (directory / OWN_TENSORS_FILE).is_file() else {}
    layers = next((spec.layers for spec in specs.values() if spec.layers is not None), None)
    config = _saved_config(directory) or _config(directory, options, [*tensors], path_map, layers)
    check_config_matches_specs(specs, config)
    return Adapter(unflatten(lora), dict(specs), config, unflatten(extras))


def peft_config(directory: str | Path, path_map: PathMap, *, layers: int | None = None) -> LoRAPlusConfig:
    """The config of a model for an adapter in PEFT's files; that of `loraplus.json` where there is one.

    PEFT has no lambda: without that file `lr_ratio` is the default.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      path_map: as for `save_peft`.
      layers: how many layers a stack has; without it all of them are taken to be in the file.

    Raises:
      FileNotFoundError, ValueError: as `load_peft`; or layers of one stack differ in rank or alpha.
    """
    check_path_map(path_map)
    options, tensors = _read(Path(directory), path_map)
    if (config := _saved_config(Path(directory))) is not None:
        return config
    numbers = {index[0] for name in tensors if (index := _find_module(name, path_map)[1])}
    if layers is not None and (extra := sorted(n for n in numbers if n >= layers)):
        raise ValueError(
            f"{directory} does not fit the model: it has layers {extra}, the model only {layers}"
        )
    adapted = tuple(sorted(numbers)) if layers is not None and numbers != {*range(layers)} else None
    return _config(Path(directory), options, [*tensors], path_map, adapted or None)


def peft_options(directory: str | Path) -> PeftOptions:
    """The options in `adapter_config.json`.

    Raises:
      FileNotFoundError, ValueError: as `load_peft`.
    """
    return _read(Path(directory))[0]


def peft_names(directory: str | Path) -> list[str]:
    """The names of an adapter's tensors, as the base model has them.

    Raises:
      FileNotFoundError, ValueError: as `load_peft`.
    """
    return list(_read(Path(directory))[1])


def peft_notes(directory: str | Path) -> dict[str, Any] | None:
    """The contents of `loraplus.json`, or None where there is none.

    Raises:
      ValueError: it is damaged or of a later format.
    """
    path = Path(directory) / NOTES_FILE
    if not path.is_file():
        return None
    notes = read_json(path)
    if not {"format", "config", "specs"} <= notes.keys() or notes["format"] != FORMAT:
        raise ValueError(f"{path} has format {notes.get('format')!r:.80}, this version reads {FORMAT}")
    return notes


def _saved_config(directory: Path) -> LoRAPlusConfig | None:
    notes = peft_notes(directory)
    if notes is None:
        return None
    try:
        return LoRAPlusConfig.from_json(notes["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / NOTES_FILE}: {error}") from None


def _config(
    directory: Path, options: PeftOptions, names: list[str], path_map: PathMap, layers: tuple[int, ...] | None
) -> LoRAPlusConfig:
    """PEFT's options and the names of its tensors in our terms."""
    modules: dict[str, dict[Index, str]] = {}
    saved, problems = {}, []
    for name in names:
        module, index = _find_module(name, path_map)
        if module is None:
            problems.append(f"{name}: no rule of the path map matches")
        elif name.endswith(_ENDS):
            place = torch_module_of(path_map, module)
            assert place is not None
            modules.setdefault(module, {})[index] = place.at(index)
        elif name.endswith(".weight") and not name.endswith(".base_layer.weight"):
            saved[module] = None
    ranks, alphas = {}, {}
    for module, there in modules.items():
        settings = {(options.rank_of(name), options.alpha_of(name)) for name in there.values()}
        if len(settings) > 1:
            problems.append(
                f"{module}: layers of one stack have different ranks and alphas: {sorted(settings)}"
            )
        if () not in there and layers is not None and {index[0] for index in there} != {*layers}:
            problems.append(
                f"{module} is not adapted in the layers {layers}, in which others of its stack are"
            )
        ranks[module], alphas[module] = settings.pop()
    raise_problems(f"{directory} does not fit the model", problems)
    return LoRAPlusConfig(
        target_modules=tuple(sorted(modules)),
        layers_to_transform=layers,
        rank=options.rank,
        alpha=float(options.alpha),
        rank_pattern={_escape(m): rank for m, rank in ranks.items() if rank != options.rank},
        alpha_pattern={_escape(m): float(alpha) for m, alpha in alphas.items() if alpha != options.alpha},
        use_rslora=options.use_rslora,
        dropout=options.dropout,
        modules_to_save=tuple(sorted(saved)),
        bias=options.bias,
    )


def _find_module(name: str, path_map: PathMap) -> tuple[str | None, Index]:
    """The module of ours that a tensor of PEFT's file belongs to, and its index; None where no rule matches."""
    end = next((end for end in _ENDS if name.endswith(end)), None)
    module = name.removesuffix(end) if end else name.rpartition(".")[0].removesuffix(".base_layer")
    return module_of(path_map, module) or (None, ())


def _escape(module: str) -> str:
    return "".join(f"[{c}]" if c in ".^$*+?{}|()" else c for c in module)


def _alpha_of(config: LoRAPlusConfig, key: str) -> float:
    pattern = pattern_of(config.alpha_pattern, key)
    return config.alpha if pattern is None else config.alpha_pattern[pattern]


def _read(directory: Path, path_map: PathMap = ()) -> tuple[PeftOptions, dict[str, Any]]:
    """Options, and tensors by their names in the base model, without copies."""
    if not (directory / OPTIONS).is_file():
        raise FileNotFoundError(f"{directory} is no adapter of PEFT: it lacks {OPTIONS}")
    if not (directory / WEIGHTS).is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ValueError(
                f"{directory} has its weights only as {pickles[0]}, a pickle, which can run any code when "
                "opened and is not read here; convert it where you trust it, with PEFT: model.save_pretrained(d)"
            )
        raise FileNotFoundError(f"{directory} is no adapter of PEFT: it lacks {WEIGHTS}")
    options, tensors = read_options(directory / OPTIONS), read_tensors(directory / WEIGHTS)
    problems = [f"{name} does not begin with {_PREFIX}" for name in tensors if not name.startswith(_PREFIX)]
    problems += [
        f"{name} is {tensor.dtype}, only {', '.join(_DTYPES)} are read"
        for name, tensor in tensors.items()
        if tensor.dtype.name not in _DTYPES
    ]
    raise_problems(f"{directory / WEIGHTS} is no adapter that is known here", problems)
    unprefixed = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    kept, problems = drop_copies(unprefixed, path_map)
    raise_problems(f"{directory / WEIGHTS} is at odds with itself", problems)
    return options, kept


def _check_factors(
    factors: Mapping[str, Any], options: PeftOptions, targets: Mapping[str, Target]
) -> list[str]:
    """A line for each factor that is missing, left over or misshapen, or at odds with options or specs."""
    problems, expected, names = [], set(), []
    for target in targets.values():
        for index, name in target.names.items():
            keys = target.keys(index)
            names.append(name)
            expected |= {*keys}
            if missing := [key for key in keys if key not in factors]:
                problems += [f"- {key} is missing" for key in missing]
                continue
            problems += _check_pair(name, [tuple(factors[key].shape) for key in keys], options, target)
    problems += [
        f"+ {name} has no adapter in the model to go to" for name in sorted(factors.keys() - expected)
    ]
    problems += [f"target_modules: {rule!r:.80} has no factors" for rule in options.idle_targets(names)]
    tied = any(t.kind == "TiedEmbedding" for t in targets.values())
    if not problems and tied and not options.ties_weights:
        problems.append(
            "ensure_weight_tying is not set: the adapter is for the embedding alone, and here that is the head too"
        )
    return problems


def _check_pair(name: str, shapes: list[tuple[int, ...]], options: PeftOptions, target: Target) -> list[str]:
    rank, scale, spec = options.rank_of(name), options.scale_of(name), target.spec
    # What the tensors must be by the file's own options, then by the model.
    needed = factor_shapes(spec, target.kind, rank)
    ranks = (shapes[0][:1], shapes[1][1:2])
    if ranks != (needed[0][:1], needed[1][1:2]):
        return [f"~ {name}: r is {rank} in {OPTIONS}, the factors are {shapes[0]} and {shapes[1]}"]
    if rank != spec.rank:
        return [f"~ {name} has rank {rank}, the model's adapter {spec.rank}"]
    if scale != spec.scale:
        alpha = options.alpha_of(name)
        return [f"~ {name} has the scale {scale:g} (alpha {alpha:g}), the model's adapter {spec.scale:g}"]
    if tuple(shapes) != needed:
        return [
            f"~ {name}: the factors are {shapes[0]} and {shapes[1]}, the model needs {needed[0]} and {needed[1]}"
        ]
    return []


def _factor_tensors(lora: Mapping[str, Any], targets: Mapping[str, Target]) -> dict[str, np.ndarray]:
    tensors = {}
    for key, target in targets.items():
        names = target.spec.factor_paths(key)
        shapes = tuple(np.shape(lora[name]) if name in lora else None for name in names)
        if shapes != target.spec.factor_shapes:
            raise ValueError(f"{key}: the factors are {shapes}, the specs say {target.spec.factor_shapes}")
        a, b = (host_array(lora[name]) for name in names)
        for index, *pair in factors_to_peft(a, b, target):
            tensors |= dict(zip(target.keys(index), pair, strict=True))
    known = {path for key, target in targets.items() for path in target.spec.factor_paths(key)}
    if unknown := sorted(lora.keys() - known):
        raise ValueError(f"the tree has factors that are not in the specs: {', '.join(unknown[:5])}")
    return tensors


def _to_json(content: Mapping[str, Any]) -> bytes:
    return (to_json(content, indent=1) + "\n").encode()
