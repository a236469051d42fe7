"""The adapters that `loraplus convert` reads: our own, PEFT's, and trees of factors of other libraries.

All become an adapter of a `NamedBase`, and tell separately what they make of each weight, for the verification.
"""

import contextlib
import dataclasses
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from .._utils.atomic import add_path_to_errors, temporary_directory
from .._utils.json_files import read_json
from .._utils.records import check_files
from .._utils.validation import raise_problems
from ..adapter.lora import weight_delta
from ..adapter.target_rules import config_of
from ..adapter.tree import factors_by_module, unflatten
from ..inits.from_weights import as_difference
from ..interop.adapter_directory import Adapter, host_array, read_tensors, tensor_bytes
from ..interop.factor_trees import read_tree
from ..interop.library_recipes import Recipe, dense_changes, find_recipe, read_factors
from ..interop.path_map import FACTOR, MAGNITUDE_END, Index, PathMap, Target, adapted_leaves
from ..interop.peft_adapter_config import PeftOptions
from ..interop.peft_files import (
    NOTES_FILE,
    OPTIONS,
    OWN_TENSORS_FILE,
    WEIGHTS,
    load_peft,
    peft_names,
    peft_notes,
    peft_options,
    read_peft,
    save_peft,
)
from ..models.families import family_of
from ..optim.find_pairs import factor_pairs
from .named_base import OUTER, NamedBase

_PREFIX = "base_model.model."
_LEVANTER = "transformer."
_TUNIX = re.compile(r"layers/\d+/attn/\w+/w_lora_[ab]")
_TUNIX_THETA = {"llama": 1e6, "qwen2": None, "qwen3": 1e6, "gemma": 1e4, "gemma2": 1e4}
"""The rope_theta that tunix 0.1.7 computes with whatever its config says; None for the config's.

None of these models scales its angles. Gemma 3 does both by its config.
"""
_ROPE = ("rope_theta", "rope_scaling")


class NamedAdapter(NamedTuple):
    """An adapter of a `NamedBase`.

    Attributes:
      adapter: factors, specs, config and fully trained tensors, by the base's own names.
      path_map: its names in PEFT's file.
    """

    adapter: Adapter
    path_map: PathMap


class Source(Protocol):
    """An adapter to convert."""

    @property
    def place(self) -> Path:
        """Where it is."""
        ...

    @property
    def about(self) -> str:
        """A phrase for the summary."""
        ...

    def read(self, base: NamedBase) -> NamedAdapter:
        """The adapter; an error names every tensor without a place."""
        ...

    def weights(self, base: NamedBase) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of the base that the adapter changes, by name, computed without `read`.

        They are float32 in the file's layout.
        """
        ...


class TreeSource:
    """Factors of another library, in its own names and layout.

    Args:
      path: what `read_tree` reads.
      library: name of the recipe; None to find it by the names.
      scale, alpha, path_map: see `read_factors`.
      leave_out: regular expressions of tensors to ignore, by path.
      allow_different: of tunix's factors, what of the base tunix may have computed otherwise: base.config, or its
        rope_theta or rope_scaling.
    """

    def __init__(
        self,
        path: Path,
        library: str | None = None,
        *,
        scale: float | None = None,
        alpha: float | None = None,
        path_map: PathMap = (),
        leave_out: Sequence[str] = (),
        allow_different: Sequence[str] = (),
    ) -> None:
        self.place, tree = path, read_tree(path)
        ignored = {name: None for name in tree if any(re.fullmatch(rule, name) for rule in leave_out)}
        if unused := [rule for rule in leave_out if not any(re.fullmatch(rule, name) for name in tree)]:
            raise ValueError(f"--leave_out {unused[0]!r:.80} matches no tensor of {path}")
        self.tree = {name: leaf for name, leaf in tree.items() if name not in ignored}
        self.left_out = list(ignored)
        try:
            self.recipe: Recipe = find_recipe(factor_pairs(self.tree), library)
        except ValueError as error:
            raise ValueError(f"{path}: {error}{_optimizer_hint(self.tree)}") from None
        self.is_tunix = self.recipe.name == "qwix" and any(map(_TUNIX.fullmatch, self.tree))
        allowed = ("base.config", *(f"base.config.{field}" for field in _ROPE)) if self.is_tunix else ()
        if unused := [part for part in allow_different if part not in allowed]:
            raise ValueError(
                f"--allow_different {unused[0]} does not apply to {path}, {self.about}; remove it"
            )
        self.allow_different = allow_different
        self.options: dict[str, Any] = {"scale": scale, "alpha": alpha, "path_map": path_map}

    @property
    def about(self) -> str:
        """The library, and what was left out."""
        text = f"factors of {self.recipe.name} ({self.recipe.version})"
        if self.left_out:
            text += f", without {len(self.left_out)} tensors by --leave_out such as {self.left_out[0]}"
        return text

    def read(self, base: NamedBase) -> NamedAdapter:
        """Reads the factors by the recipe; all other tensors must be tensors of the base."""
        if self.is_tunix:
            _check_tunix_rope(self.place, base, self.allow_different)
        try:
            factors, others = read_factors(
                self.tree,
                self.recipe,
                config=base.config,
                check=partial(self._check_sides, base),
                **self.options,
            )
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}{_optimizer_hint(self.tree)}") from None
        locations = base.locate(factors)
        specs = base.specs(locations, {name: (len(f.a), f.scale) for name, f in factors.items()})
        lora: dict[str, np.ndarray] = {}
        for (path, spec), f in zip(specs.items(), factors.values(), strict=True):
            lora |= zip(spec.factor_paths(path), (f.a.T, f.b.T), strict=True)
        check_base_tensors(self.place, others, base)
        config = config_of(specs)
        # The scale of the config, whose alpha is rounded.
        specs = {path: dataclasses.replace(spec, scale=config.scale_of(path)) for path, spec in specs.items()}
        return NamedAdapter(Adapter(unflatten(lora), specs, config, {}), base.path_map(locations))

    def _check_sides(self, base: NamedBase, name: str, inputs: int, outputs: int) -> None:
        (spec,) = base.specs(base.locate([name]), {name: (1, 1.0)}).values()
        if (inputs, outputs) != spec.sides:
            raise ValueError(
                f"the adapter of {name} has {inputs} inputs and {outputs} outputs, its weight in {base.files} has "
                f"{spec.sides[0]} and {spec.sides[1]}"
            )

    def weights(self, base: NamedBase) -> Iterator[tuple[str, np.ndarray]]:
        """Adds the product of the factors as they are to each weight."""
        for name, change in dense_changes(self.tree, self.recipe, config=base.config, **self.options):
            module = base.locate([name])[name]
            total = base.weight(module) + change
            yield f"{module}.weight", total.T if base.is_conv1d(module) else total


class PeftSource:
    """A directory in PEFT's format, as PEFT, levanter or this package write it."""

    def __init__(self, directory: Path) -> None:
        self.place = directory
        if (directory / OWN_TENSORS_FILE).is_file():
            raise ValueError(
                f"{directory / OWN_TENSORS_FILE} has variables that the PyTorch model lacks: convert the run"
            )
        self.options: PeftOptions = peft_options(directory)

    @property
    def about(self) -> str:
        """PEFT's options that matter."""
        # levanter writes null; PEFT would adapt those that it knows for the model.
        is_open = self.options.target_modules is None and not self.options.target_parameters
        of_file = ", whose target_modules null stands for the modules in its file" if is_open else ""
        return "PEFT adapter" + (" with DoRA" if self.options.use_dora else "") + of_file

    def is_levanter(self, base: NamedBase) -> bool:
        """Whether the names have levanter's prefix, which PEFT does not find in the base."""
        is_gpt2 = base.config.get("model_type") == "gpt2"
        return not is_gpt2 and any(name.startswith(f"{_LEVANTER}model.") for name in peft_names(self.place))

    def base_for(self, base: NamedBase) -> NamedBase:
        """The base as PEFT adapts it: without `ensure_weight_tying` a tied head and the embedding part."""
        embedding = base.tied_embedding
        if embedding is None or self.options.ties_weights:
            return base
        adapted = (module for name in peft_names(self.place) if (module := _module(name)) is not None)
        changed = {name.rpartition(".")[2] for name in (*adapted, *self.options.modules_to_save)}
        return base.untied() if changed & {embedding.rpartition(".")[2], "lm_head"} else base

    def read(self, base: NamedBase) -> NamedAdapter:
        """Reads the directory with the checks of `load_peft`."""
        if read_json(self.place / OPTIONS).get("fan_in_fan_out") and not base.has_conv1d:
            raise ValueError(
                f"{self.place / OPTIONS}: fan_in_fan_out is for transformers' Conv1D, as in gpt2; set it to false "
                f"for {base.config.get('model_type')!r:.80}"
            )
        with temporary_directory_for(self.place) as folder:
            copy = self.copy(folder, base)
            options, tensors = read_peft(copy)
            names = _without_tied_head([*tensors], base)
            adapted = list(dict.fromkeys(m for name in names if (m := _module(name)) is not None))
            others = {_plain(name).rpartition(".")[0] for name in names if _module(name) is None}
            locations = base.locate([*adapted, *sorted(others - {*adapted})])
            settings = {
                name: (rank, options.scale(rank, alpha))
                for name, (rank, alpha) in options.ranks_and_alphas(adapted).items()
            }
            specs = base.specs(locations, settings, magnitude=options.use_dora)
            path_map = base.path_map(locations | base.siblings(locations))
            _, leaves = base.table()
            adapter = load_peft(copy, specs, path_map, params=unflatten(leaves))
        for name in names:
            module, _, end = name.rpartition(".")
            saved = any(module.endswith(each) for each in options.modules_to_save)
            is_shared = base.is_untied and module.endswith(OUTER) and not saved
            if end != "weight" or not (is_shared or module.endswith(".base_layer")):
                continue
            # PEFT saves the base's weight with an adapted embedding, and loads it into the head that shares it.
            tensor, plain = host_array(tensors[name]), _plain(name).rpartition(".")[0]
            view = base.tensors[f"{base.locate([plain])[plain]}.weight"]
            if not np.array_equal(np.asarray(view[:]).astype(tensor.dtype), tensor):
                raise ValueError(
                    f"{self.place}: {name} differs from the weight in {base.files}; pass the base that the "
                    "adapter was trained on, with this weight, or merge the adapter in PEFT (merge_and_unload)"
                )
        check_files(self.place / NOTES_FILE, peft_notes(self.place) or {})
        return NamedAdapter(adapter, path_map)

    def weights(self, base: NamedBase) -> Iterator[tuple[str, np.ndarray]]:
        """Computes PEFT's formulas on the tensors of its file."""
        tensors = {
            name.removeprefix(_PREFIX): np.asarray(host_array(tensor), np.float32)
            for name, tensor in read_tensors(self.place / WEIGHTS).items()
        }
        if self.is_levanter(base):
            tensors = {name.removeprefix(_LEVANTER): tensor for name, tensor in tensors.items()}
        names = _without_tied_head([name for name in tensors if ".original_module." not in name], base)
        kept = {name: tensors[name] for name in names}
        adapted = list(dict.fromkeys(m for name in kept if (m := _module(name)) is not None))
        for name, (rank, alpha) in self.options.ranks_and_alphas(adapted).items():
            module, scale = base.locate([name])[name], self.options.scale(rank, alpha)
            old = base.weight(module)
            # PEFT saves the weight of an adapted embedding, too.
            if (saved := kept.get(f"{name}.base_layer.weight")) is not None:
                if saved.shape != old.shape:
                    raise ValueError(
                        f"{self.place}: {name} has a weight of shape {saved.shape}, that of {base.files} has "
                        f"{old.shape}: is it the adapter's base?"
                    )
                old = saved
            if f"{name}.lora_embedding_A" in kept:
                new = old + scale * (kept[f"{name}.lora_embedding_B"] @ kept[f"{name}.lora_embedding_A"]).T
            else:
                new = old + scale * kept[f"{name}.lora_B.weight"] @ kept[f"{name}.lora_A.weight"]
            if (magnitude := kept.get(f"{name}{MAGNITUDE_END}")) is not None:
                new = _with_norms(new, magnitude, base.is_embedding(module))
            yield f"{module}.weight", new.T if base.is_conv1d(module) else new
        copies = {f"{name}.base_layer.weight" for name in adapted}
        for name, tensor in kept.items():
            if _module(name) is None and name not in copies:
                module, _, leaf = _plain(name).rpartition(".")
                yield f"{base.locate([module])[module]}.{leaf}", tensor

    def copy(self, folder: Path, base: NamedBase) -> Path:
        """Copies PEFT's two files alone, with names that PEFT finds: our notes would speak of our own model."""
        (folder / OPTIONS).write_bytes((self.place / OPTIONS).read_bytes())
        if not self.is_levanter(base):
            (folder / WEIGHTS).write_bytes((self.place / WEIGHTS).read_bytes())
            return folder
        tensors = read_tensors(self.place / WEIGHTS)
        renamed = {n.replace(_PREFIX + _LEVANTER, _PREFIX, 1): tensor for n, tensor in tensors.items()}
        (folder / WEIGHTS).write_bytes(tensor_bytes(renamed))
        return folder


class OwnSource:
    """An adapter of this package, by the names of its model.

    Args:
      place: its directory, for messages.
      adapter: the adapter.
      path_map: transformers' names of its modules.
    """

    def __init__(self, place: Path, adapter: Adapter, path_map: PathMap) -> None:
        if adapter.config is None:
            raise ValueError(f"{place} has no adapter: the model was trained in full")
        self.place, self.path_map = place, path_map
        self.adapter = adapter
        if adapter.start:  # for the original base, which the start made a packed one resemble
            difference = as_difference(adapter.lora, adapter.start, adapter.specs, adapter.config)
            self.adapter = Adapter(*difference, adapter.extras)
        self.targets, problems = adapted_leaves(self.adapter.specs, path_map)
        raise_problems(f"{place}: the path map does not fit the adapter", problems)

    @property
    def about(self) -> str:
        """Whose it is."""
        return "an adapter of loraplus_jax"

    def read(self, base: NamedBase) -> NamedAdapter:
        """Reads the directory that `save_peft` writes."""
        for path, target in self.targets.items():
            modules = base.locate(target.names.values()).values()
            if target.kind == "Conv1D" and not all(map(base.is_conv1d, modules)):
                raise ValueError(
                    f"{self.place}: the path map has {path} as Conv1D, which {base.files} is not"
                )
        with self._as_peft() as source:
            return source.read(base)

    def weights(self, base: NamedBase) -> Iterator[tuple[str, np.ndarray]]:
        """Adds s A B to each weight, in the axes of our leaf, before any factor is converted."""
        adapter, parts = self.adapter, dict[str, list[tuple[str, Target, Index]]]()
        factors = factors_by_module(str(self.place), adapter.lora, adapter.specs)
        for path, target in self.targets.items():
            for index, name in target.names.items():
                parts.setdefault(base.locate([name])[name], []).append((path, target, index))
        for module, slices in parts.items():  # one at a time, where a leaf has those of all layers
            total = np.array(base.weight(module))
            for path, target, index in slices:
                spec, at = target.spec, dict(zip(target.letters, index, strict=True))
                a, b, *magnitudes = (
                    np.asarray(x)[tuple(slice(at[c], at[c] + 1) if c in at else slice(None) for c in letters)]
                    # Of magnitudes, which not every adapter has, the axes are those of B.
                    for x, letters in zip(
                        factors[path], spec.factor_letters + spec.factor_letters[1:], strict=False
                    )
                )
                first = (0,) * len(index)
                product = np.asarray(weight_delta(jnp.asarray(a), jnp.asarray(b), spec))
                change = _slice_of_leaf(product, spec.base_letters, target, first)
                rows = target.outputs.rows if target.outputs else slice(None)
                total[rows] += change if base.is_embedding(module) else change.T
                for m in magnitudes:
                    letters = spec.factor_letters[1]
                    values = np.asarray(m, np.float32)
                    values = np.take(values, 0, letters.index("r"))  # an axis of size 1
                    size = _slice_of_leaf(values, letters.replace("r", ""), target, first)[0]
                    total[rows] = _with_norms(total[rows], size, base.is_embedding(module))
            yield f"{module}.weight", total.T if base.is_conv1d(module) else total
        if adapter.extras:
            with self._as_peft() as source:
                weights = {f"{module}.weight" for module in parts}
                yield from (each for each in source.weights(base) if each[0] not in weights)

    @contextlib.contextmanager
    def _as_peft(self) -> Iterator[PeftSource]:
        adapter = self.adapter
        assert adapter.config is not None
        with temporary_directory_for(self.place) as folder:
            extras = adapter.extras or None
            save_peft(
                folder / "peft", adapter.lora, adapter.specs, adapter.config, self.path_map, extras=extras
            )
            yield PeftSource(folder / "peft")


def _with_norms(weight: np.ndarray, norms: np.ndarray, is_embedding: bool) -> np.ndarray:
    """Gives the outputs, rows of a weight or columns of an embedding, these norms, as DoRA does."""
    axis = 0 if is_embedding else 1
    return weight * np.expand_dims(norms / np.linalg.norm(weight, axis=axis), axis)


def _slice_of_leaf(array: np.ndarray, letters: str, target: Target, index: Index) -> np.ndarray:
    """A slice of a leaf with these axes as (in, out)."""
    at = dict(zip(target.letters, index, strict=True))
    kept = [c for c in letters if c not in at]
    part = array[tuple(at.get(c, slice(None)) for c in letters)]
    spec = target.spec
    role = dict(zip((c for c in spec.base_letters if c.islower()), spec.axes, strict=True))
    order = sorted(kept, key=lambda c: (role[c] != "i", kept.index(c)))
    inputs = math.prod(part.shape[kept.index(c)] for c in kept if role[c] == "i")
    return part.transpose([kept.index(c) for c in order]).reshape(inputs, -1)


@contextlib.contextmanager
def temporary_directory_for(place: Path) -> Iterator[Path]:
    """Yields a new directory; an error that names it, or `peft` in it, names `place` instead."""
    with temporary_directory() as folder, add_path_to_errors(folder.parent):
        try:
            yield folder
        except ValueError as error:
            text = str(error).replace(f"{folder}/peft", str(place)).replace(str(folder), str(place))
            raise ValueError(text) from None


def check_base_tensors(source: Path, others: Mapping[str, np.ndarray], base: NamedBase) -> None:
    """Raises ValueError unless every tensor that is no factor holds the values of a tensor of the base.

    The order of the values does not matter, as a library may transpose, reshape or stack the base's tensors.
    """
    if not others:
        return
    digests: dict[str, set[bytes]] = {}
    for path, leaf in others.items():
        dtype, is_real = leaf.dtype.name, np.can_cast(leaf.dtype, np.float64, "same_kind")
        if is_real and dtype not in digests:
            digests[dtype] = {_sorted_bytes(view[:], dtype) for view in base.tensors.values()}
        slices = [leaf, *(list(leaf) if leaf.ndim > 1 else [])] if is_real else []
        slices = [slices[:1], slices[1:], [part for each in slices[1:] if each.ndim > 1 for part in each]]
        if not any(s and all(_sorted_bytes(x, dtype) in digests[dtype] for x in s) for s in slices):
            raise ValueError(
                f"{source}: {path} {leaf.shape} is neither a factor nor a tensor of {base.files}: it was trained, "
                "or the base is another one; to convert the factors without it, pass --leave_out with its path"
                f"{_optimizer_hint(others)}"
            )


def _optimizer_hint(tree: Mapping[str, Any]) -> str:
    """What to leave out if a tree has an optimizer's state, as the end of a message."""
    state = r"((?:[^/]+/)*?(?:opt_state|optimizer|optimizer_state))/|((?:[^/]+/)*?[^/]+)/(?:mu|nu|trace)/"
    match = next((m for path in tree if (m := re.match(state, path))), None)
    if match is None:
        return ""
    where = match[1] or match[2]
    return f"; {where} looks like an optimizer's state: pass --leave_out '{re.escape(where)}/.*'"


def _check_tunix_rope(source: Path, base: NamedBase, allow_different: Sequence[str]) -> None:
    """Raises ValueError if tunix computes other rotary angles for the base than its config says."""
    kind = str(base.config.get("model_type"))
    if kind not in _TUNIX_THETA:
        return
    config: Any = family_of(kind).config.from_hf(base.config)
    theta, scaling = _TUNIX_THETA[kind], getattr(config.rope_scaling, "rope_type", None)
    problems = {}
    if theta not in (None, config.rope_theta):
        problems["rope_theta"] = (
            f"rope_theta {config.rope_theta:.10g}, where tunix computes with {theta:.10g}"
        )
    if scaling is not None:
        problems["rope_scaling"] = f"rope_scaling {scaling}, where tunix has none"
    problems = {
        f"base.config.{name}": text
        for name, text in problems.items()
        if not {"base.config", f"base.config.{name}"} & {*allow_different}
    }
    if not problems:
        return
    raise ValueError(
        f"{source} has tunix's names, and tunix 0.1.7 computes another function than {base.files}, a {kind} with "
        f"{' and '.join(problems.values())}: convert them for a copy of the base whose config.json "
        "says what tunix computes with, and use that copy; or, if your tunix computes as the base does, pass "
        f"{' '.join(f'--allow_different {part}' for part in problems)}"
    )


def _sorted_bytes(values: Any, dtype: str) -> bytes:
    array = np.asarray(values).astype(dtype).reshape(-1)
    return hashlib.sha256(
        np.sort(array.astype(np.float32) if array.dtype.kind == "V" else array).tobytes()
    ).digest()


def _without_tied_head(names: Sequence[str], base: NamedBase) -> list[str]:
    """The names without those of a head that is the embedding: copies of the embedding's, as `load_peft` checks."""
    embedding = base.tied_embedding
    is_copy = embedding is not None and any(f"{embedding.rpartition('.')[2]}." in name for name in names)
    return [name for name in names if not (is_copy and name.startswith("lm_head."))]


def _plain(name: str) -> str:
    """The name of a fully trained tensor without the levels of PEFT's wrappers."""
    return re.sub(r"\.modules_to_save(\.default)?(?=\.)|\.base_layer(?=\.)", "", name)


def _module(name: str) -> str | None:
    """The module of a factor or of magnitudes; None for any other tensor."""
    if name.endswith(MAGNITUDE_END):
        return name.removesuffix(MAGNITUDE_END)
    match = FACTOR.fullmatch(name)
    return match[1] if match else None
