"""Names and layouts of a Flax model's leaves in a PyTorch model, both ways, by one small table of patterns.

A table is a sequence of rules `(ours, theirs)` or `(ours, theirs, kind)`: the path of a module here, segments
joined by "/", its name there, joined by ".", and where that cannot be told how PyTorch keeps its weight (`KINDS`).
`{name}` on both sides stands for one segment. `{name}` on their side alone is an index: of the stacked axes,
outermost first, and then of batch axes. The first rule that matches counts.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._validation import suggest
from ..spec import AdapterSpec, Specs

KINDS = ("Linear", "Conv1D", "Conv", "Embedding", "TiedEmbedding", "TiedHead", "Parameter")
"""`Linear` keeps (out, in), transformers' `Conv1D` (in, out), `Conv` (out, in, window...), `Embedding` as here; a
`TiedEmbedding` is the head too, and a later rule of kind `TiedHead` gives the name that it has as such; a
`Parameter` is no module's weight: its own name stands last."""

PathMap = Sequence[tuple[str, str] | tuple[str, str, str]]
Index = tuple[int, ...]

_WEIGHTS = ("kernel", "scale", "embedding")
_OF_SPEC = {"embed": "Embedding", "conv": "Conv"}
_OF_LEAF = {"kernel": "Linear", "embedding": "Embedding"}
_SAME_LAYOUT = {"Conv1D": "Linear", "TiedEmbedding": "Embedding"}
_HOLE = re.compile(r"\{(\w+)\}")


class TorchModule(NamedTuple):
    """Where a module of ours is in the other model.

    Attributes:
      name: its name; the indices are still `{placeholders}`.
      holes: these, in order.
      kind: as the rule has it, or None.
    """

    name: str
    holes: tuple[str, ...]
    kind: str | None

    def at(self, index: Index) -> str:
        """The name with the indices in it."""
        name = self.name
        for hole, number in zip(self.holes, index, strict=True):
            name = name.replace(f"{{{hole}}}", str(number))
        return name


def check_path_map(path_map: PathMap) -> None:
    """Raises ValueError or TypeError for a rule that cannot be understood; the message names it."""
    for rule in path_map:
        if not isinstance(rule, tuple | list) or len(rule) not in (2, 3) or not all(rule):
            raise TypeError(f"path map: a rule is (ours, theirs) or (ours, theirs, kind), got {rule!r}")
        ours, theirs = (_HOLE.findall(side) for side in rule[:2])
        if missing := [name for name in ours if name not in theirs]:
            raise ValueError(f"path map: {{{missing[0]}}} of {rule[0]!r} is not in {rule[1]!r}")
        if any(len(set(names)) < len(names) for names in (ours, theirs)):
            raise ValueError(f"path map: a placeholder stands twice on one side of {rule!r}")
        if len(rule) == 3 and rule[2] not in KINDS:
            raise ValueError(f"path map: there is no kind {rule[2]!r}{suggest(rule[2], KINDS)}")


def torch_module_of(path_map: PathMap, module: str) -> TorchModule | None:
    """Where a module of ours is, or None where no rule matches.

    >>> torch_module_of([("layers/{name}", "model.layers.{layer}.{name}")], "layers/up")
    TorchModule(name='model.layers.{layer}.up', holes=('layer',), kind=None)
    """
    for rule in path_map:
        if (match := _pattern(rule[0], "[^/]+").fullmatch(module)) is not None:
            name = rule[1]
            for shared, value in match.groupdict().items():
                name = name.replace(f"{{{shared}}}", value)
            return TorchModule(name, tuple(_HOLE.findall(name)), _kind(rule))
    return None


def module_of(path_map: PathMap, name: str) -> tuple[str, Index] | None:
    """The module of ours that one of theirs means, and which of its slices; None where no rule matches.

    A `Parameter` is found by the module that owns it, under whose name PEFT has its factors.

    >>> module_of([("layers/{name}", "model.layers.{layer}.{name}")], "model.layers.3.up")
    ('layers/up', (3,))
    """
    for rule in path_map:
        theirs = rule[1].rpartition(".")[0] if _kind(rule) == "Parameter" else rule[1]
        shared, match = _HOLE.findall(rule[0]), _pattern(theirs, "[^.]+").fullmatch(name)
        values = {} if match is None else match.groupdict()
        holes = [value for key, value in values.items() if key not in shared]
        if match is None or not all(re.fullmatch("0|[1-9][0-9]{0,8}", value) for value in holes):
            continue
        module = rule[0]
        for key in shared:
            module = module.replace(f"{{{key}}}", values[key])
        return module, tuple(int(value) for value in holes)
    return None


class Target(NamedTuple):
    """An adapted leaf on both sides.

    Attributes:
      spec: its entry in the specs.
      kind: how PyTorch keeps it, one of `KINDS`.
      names: slice of the factors to the module, or for a `Parameter` the parameter, that it is there.
    """

    spec: AdapterSpec
    kind: str
    names: dict[Index, str]

    def keys(self, index: Index) -> tuple[str, str]:
        """The names of A and of B in PEFT's file."""
        name = self.names[index]
        if self.kind == "Parameter":  # its owner has the factors
            name = name.rpartition(".")[0]
        form = "{}.lora_embedding_{}" if self.kind.endswith("Embedding") else "{}.lora_{}.weight"
        return form.format(name, "A"), form.format(name, "B")


def adapted_leaves(specs: Specs, path_map: PathMap) -> tuple[dict[str, Target], list[str]]:
    """Every entry of the specs on both sides, and a line for each that has no place there."""
    targets: dict[str, Target] = {}
    problems = []
    owners: dict[str, str] = {}
    for key, spec in specs.items():
        owner, _, leaf = key.rpartition("/")
        # An adapted parameter is found by the module that owns it.
        module = owner if spec.kind == "parameter" and leaf in _OF_LEAF else key
        if (place := torch_module_of(path_map, module)) is None:
            problems.append(f"no rule of the path map matches {module!r}")
            continue
        try:
            kind = _kind_of(spec, place)
            target = Target(spec, kind, {index: place.at(index) for index in _indices(spec, place, kind)})
        except ValueError as error:
            problems.append(str(error))
            continue
        for index in target.names:
            if (owner := owners.setdefault(target.keys(index)[0], key)) != key:
                problems.append(f"{owner!r} and {key!r} both have their factors in {target.names[index]!r}")
        targets[key] = target
    return targets, problems


def _kind_of(spec: AdapterSpec, place: TorchModule) -> str:
    """How PyTorch keeps the weight that is adapted.

    Raises:
      ValueError: PEFT has no adapter for it, or the rule is at odds with the table.
    """
    default = _OF_SPEC.get(spec.kind, "Linear")
    if spec.kind == "parameter":
        default = _OF_LEAF.get(spec.leaf.rpartition("/")[2], "Parameter")
    if spec.kind == "conv_transpose":
        raise ValueError(f"{spec.leaf} is a transposed convolution, for which PEFT has no adapter")
    kind = place.kind or default
    if kind == "Parameter" and (spec.axes.count("i") > 1 or spec.axes.count("o") > 1 or len(spec.axes) > 3):
        raise ValueError(
            f"{spec.leaf} has the axes {spec.axes!r}; PEFT adapts parameters with one input and one output axis, "
            "and one more at most"
        )
    if spec.kind != "parameter" and kind != "Parameter" and _SAME_LAYOUT.get(kind, kind) != default:
        raise ValueError(
            f"{spec.leaf} is of kind {spec.kind}, the path map says {kind} of {place.name}, not {default}"
        )
    return kind


def _indices(spec: AdapterSpec, place: TorchModule, kind: str) -> list[Index]:
    """Which slices of the factors there are in the other model, each a module of its own.

    Raises:
      ValueError: the rule has more or fewer indices than the leaf has stacked and batch axes.
    """
    letters = _index_letters(spec, kind)
    if len(letters) != len(place.holes):
        raise ValueError(
            f"{spec.leaf} has {len(letters)} stacked and batch axes, {place.name} has {len(place.holes)} indices"
        )
    size = dict(zip(spec.base_letters, spec.shape, strict=True))
    indices = list(itertools.product(*(range(size[c]) for c in letters)))
    # `layers` are those of the outermost stacked axis, which is the first index.
    return indices if spec.layers is None else [index for index in indices if index[0] in spec.layers]


def factors_to_peft(
    a: np.ndarray, b: np.ndarray, target: Target
) -> Iterator[tuple[Index, np.ndarray, np.ndarray]]:
    """Each slice of the factors as PEFT keeps it: A and B of `factor_shapes`."""
    spec, kind, _ = target
    shape = factor_shapes(spec, kind)[1]
    a, b = _index_views(a, b, spec, kind)
    for index in target.names:
        yield index, _a_to_peft(a[index], kind), _b_to_peft(b[index], shape, kind)


def factors_from_peft(
    slices: Mapping[Index, tuple[np.ndarray, ...]], target: Target
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `factors_to_peft`; missing slices become zeros."""
    spec, kind, _ = target
    dtype = next(iter(slices.values()))[0].dtype
    whole_a, whole_b = (np.zeros(shape, dtype) for shape in spec.factor_shapes)
    a, b = _index_views(whole_a, whole_b, spec, kind)
    for index, (array_a, array_b) in slices.items():
        a[index] = _a_from_peft(array_a, a[index].shape, kind)
        b[index] = _b_from_peft(array_b, b[index].shape, kind)
    return whole_a, whole_b


def factor_shapes(
    spec: AdapterSpec, kind: str, rank: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes that PEFT keeps one slice of A and of B in, of the spec's rank or another."""
    (inner, outer), r = spec.sides, rank or spec.rank
    unstacked = [n for c, n in zip(spec.base_letters, spec.shape, strict=True) if c.islower()]
    sizes = list(zip(unstacked, spec.axes, strict=True))
    if kind == "Conv":  # A's window stays apart from its channels
        *window, channels = (n for n, axis in sizes if axis == "i")
        return (r, channels, *window), (outer, r, *(1 for _ in window))
    if kind == "Parameter":
        experts = math.prod(n for n, axis in sizes if axis not in "io")
        return (r * experts, inner), (outer, r * experts)
    return (r, inner), (outer, r)


def leaf_to_torch(name: str, array: np.ndarray, kind: str | None) -> tuple[str, np.ndarray]:
    """A leaf that is trained in full, without stacked axes, under PyTorch's name and in its layout.

    Raises:
      ValueError: the leaf is of another name, or the layout of its kernel is not known.
    """
    if name == "bias":
        return "bias", array.reshape(-1)
    if name not in _WEIGHTS:
        raise ValueError(f"the leaf {name!r} has no counterpart; known: bias, {', '.join(_WEIGHTS)}")
    if name != "kernel" or kind == "Conv1D":
        return "weight", array
    return "weight", np.transpose(array, _kernel_axes(array.ndim, kind))


def leaf_from_torch(name: str, array: np.ndarray, shape: tuple[int, ...], kind: str | None) -> np.ndarray:
    """The inverse of `leaf_to_torch`, for a leaf of a known shape."""
    if name == "bias":
        return array.reshape(shape)
    if name != "kernel" or kind == "Conv1D":
        return array
    return np.transpose(array, np.argsort(_kernel_axes(len(shape), kind)))


def _kernel_axes(ndim: int, kind: str | None) -> tuple[int, ...]:
    """The order of a kernel's axes in PyTorch."""
    if kind == "Conv":
        return (ndim - 1, ndim - 2, *range(ndim - 2))
    if kind in (None, "Linear") and ndim == 2:
        return (1, 0)
    raise ValueError(
        f"a kernel with {ndim} axes, of the kind {kind}: which are its inputs is not known; the path map's rules "
        "may say Linear (2 axes), Conv1D or Conv as their third part"
    )


def _pattern(side: str, segment: str) -> re.Pattern[str]:
    parts = _HOLE.split(side)
    return re.compile(
        "".join(f"(?P<{p}>{segment})" if n % 2 else re.escape(p) for n, p in enumerate(parts)), re.DOTALL
    )


def _kind(rule: Any) -> str | None:
    return rule[2] if len(rule) == 3 else None


def _index_letters(spec: AdapterSpec, kind: str) -> str:
    """Einsum letters of the axes that number modules: stacked ones, outermost first, then batch axes."""
    stacked = "".join(sorted((c for c in spec.base_letters if c.isupper()), reverse=True))
    unstacked = [c for c in spec.base_letters if c.islower()]
    batch = "".join(c for c, axis in zip(unstacked, spec.axes, strict=True) if axis not in "io")
    return stacked if kind == "Parameter" else stacked + batch


def _index_views(a: np.ndarray, b: np.ndarray, spec: AdapterSpec, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Views of the factors with the numbering axes in front, then A (batch, in..., r) and B (batch, r, out...)."""
    first = _index_letters(spec, kind)
    views = []
    for array, letters in zip((a, b), spec.factor_letters, strict=True):
        order = first + "".join(c for c in letters if c not in first)
        views.append(np.transpose(array, [letters.index(c) for c in order]))
    return views[0], views[1]


def _a_to_peft(a: np.ndarray, kind: str) -> np.ndarray:
    """A `(in..., r)` in PEFT's layout."""
    if kind == "Conv":
        return np.moveaxis(a, (-1, -2), (0, 1))
    if kind == "Parameter":  # (batch, in, r)
        return a.swapaxes(-1, -2).reshape(-1, a.shape[-2])
    return a.reshape(-1, a.shape[-1]).T


def _a_from_peft(array: np.ndarray, shape: tuple[int, ...], kind: str) -> np.ndarray:
    if kind == "Conv":
        return np.moveaxis(array, (0, 1), (-1, -2))
    if kind == "Parameter":
        return array.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2)
    return array.T.reshape(shape)


def _b_to_peft(b: np.ndarray, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """B `(r, out...)` in PEFT's layout."""
    if kind == "Parameter":  # (batch, r, out)
        return b.T.reshape(shape)
    return b.reshape(b.shape[0], -1).T.reshape(shape)


def _b_from_peft(array: np.ndarray, shape: tuple[int, ...], kind: str) -> np.ndarray:
    if kind == "Parameter":
        return array.reshape(shape[::-1]).T
    return array.reshape(array.shape[0], array.shape[1]).T.reshape(shape)
