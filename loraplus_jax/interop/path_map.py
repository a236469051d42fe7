"""Path maps: convert names and layouts between a Flax model and a PyTorch model, in both directions.

A path map is a sequence of rules `(ours, theirs)` or `(ours, theirs, kind)`: the path of our module, joined by
"/", its name in PyTorch, joined by ".", and if it is ambiguous the layout of its weight in PyTorch (`KINDS`).
`{name}` on both sides matches one segment. `{name}` only on their side is an index: first of the stacked axes,
outermost first, then of the batch axes. `{k_proj|v_proj}` on their side names the parts of a weight that holds
several modules: its first unstacked axis selects the part. `c_attn[0:8 of 24]` on their side says that our module
is the first 8 of 24 outputs of theirs. The first matching rule applies.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .._utils.validation import suggest
from ..adapter.spec import AdapterSpec, Specs

KINDS = ("Linear", "Conv1D", "Conv", "Embedding", "TiedEmbedding", "TiedHead", "Parameter")
"""Layouts: `Linear` is (out, in), transformers' `Conv1D` (in, out), `Conv` (out, in, window...), `Embedding` like
ours. A `TiedEmbedding` is also the head, whose name a later rule of kind `TiedHead` gives. A `Parameter` is not the
weight of a module: its name ends in the parameter's own name."""

PathMap = Sequence[tuple[str, str] | tuple[str, str, str]]
Index = tuple[int, ...]

FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
"""The name of a factor in PEFT's file: the module, and A or B."""
MAGNITUDE_END = ".lora_magnitude_vector"
"""How the names of DoRA's magnitudes end in PEFT's file."""
SUFFIXES = {"bias": "bias", "kernel": "weight", "scale": "weight", "embedding": "weight"}
"""The names of leaves that can be trained fully, and PyTorch's for them."""
_OF_SPEC = {"embed": "Embedding", "conv": "Conv"}
_OF_LEAF = {"kernel": "Linear", "embedding": "Embedding"}
_SAME_LAYOUT = {"Conv1D": "Linear", "TiedEmbedding": "Embedding"}
_HOLE = re.compile(r"\{(\w+(?:\|\w+)*)\}")
_OUTPUTS = re.compile(r"(.*)\[([0-9]{1,9}):([0-9]{1,9}) of ([0-9]{1,9})\]", re.DOTALL)


class Outputs(NamedTuple):
    """Some outputs of a PyTorch module: from `start` up to `stop`, of `size` in all."""

    start: int
    stop: int
    size: int

    @property
    def rows(self) -> slice:
        """The index of these outputs, such as in the rows of B."""
        return slice(self.start, self.stop)


class TorchModule(NamedTuple):
    """The PyTorch module that corresponds to a module of ours.

    Attributes:
      name: its name, with `{placeholders}` for indices.
      holes: the placeholders, in order; one with `|` lists the names of parts.
      kind: kind given by the rule, or None.
      outputs: the outputs that our module has; None for all.
    """

    name: str
    holes: tuple[str, ...]
    kind: str | None
    outputs: Outputs | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts of a weight that holds several modules; empty if it holds one."""
        return next((tuple(hole.split("|")) for hole in self.holes if "|" in hole), ())

    def at(self, index: Index) -> str:
        """The name with the indices filled in."""
        name = self.name
        for hole, number in zip(self.holes, index, strict=True):
            name = name.replace(f"{{{hole}}}", hole.split("|")[number] if "|" in hole else str(number))
        return name


def check_path_map(path_map: PathMap) -> None:
    """Raises ValueError or TypeError for an invalid rule; the message names it."""
    for rule in path_map:
        sides = rule if isinstance(rule, tuple | list) else ()
        if len(sides) not in (2, 3) or not all(isinstance(side, str) and side for side in sides):
            raise TypeError(f"path map: a rule must be (ours, theirs) or (ours, theirs, kind), got {rule!r}")
        ours, theirs = (_HOLE.findall(side) for side in rule[:2])
        if missing := [name for name in ours if name not in theirs]:
            raise ValueError(f"path map: {{{missing[0]}}} in {rule[0]!r} must also be in {rule[1]!r}")
        parts = [name.split("|") for name in ours + theirs]
        if any(len(set(names)) < len(names) for names in (ours, theirs, *parts)):
            raise ValueError(f"path map: placeholders must be distinct on each side, got {rule!r}")
        if any("|" in name for name in ours) or sum("|" in name for name in theirs) > 1:
            raise ValueError(
                f"path map: parts such as {{a|b}} must be in theirs only, and once, got {rule!r}"
            )
        if len(rule) == 3 and rule[2] not in KINDS:
            raise ValueError(f"path map: unknown kind {rule[2]!r}{suggest(rule[2], KINDS)}")
        outputs = _split_name(rule[1])[1]
        if "[" in rule[1] and (outputs is None or not outputs.start < outputs.stop <= outputs.size):
            raise ValueError(
                f"path map: outputs must be like [0:8 of 24], not empty and within the size, got {rule[1]!r}"
            )
        if outputs is not None and (_kind(rule) not in (None, "Linear", "Conv1D") or "|" in rule[1]):
            raise ValueError(f"path map: only a Linear or Conv1D without {{a|b}} has outputs, got {rule!r}")


def torch_module_of(path_map: PathMap, module: str) -> TorchModule | None:
    """The PyTorch module for a module of ours, by the first rule that matches, or None.

    Example:
      >>> torch_module_of([("layers/{name}", "model.layers.{layer}.{name}")], "layers/up")
      TorchModule(name='model.layers.{layer}.up', holes=('layer',), kind=None, outputs=None)
    """
    for rule in path_map:
        if (values := _match(rule[0], "[^/]+", module)) is not None:
            name, outputs = _split_name(rule[1])
            for shared, value in values.items():
                name = name.replace(f"{{{shared}}}", value)
            return TorchModule(name, tuple(_HOLE.findall(name)), _kind(rule), outputs)
    return None


def modules_of(path_map: PathMap, name: str) -> list[tuple[str, Index]]:
    """Path and index (`()` if whole) of our modules that have outputs of a PyTorch module.

    A `Parameter` is looked up by the module that owns it, since PEFT stores its factors under that name: of several
    in one module, the last one's are under the module itself, and each other's within one `base_layer` more.

    Example:
      >>> modules_of([("layers/{name}", "model.layers.{layer}.{name}")], "model.layers.3.up")
      [('layers/up', (3,))]
      >>> modules_of([("q", "qkv[0:8 of 24]"), ("k", "qkv[8:16 of 24]"), ("v", "qkv[16:24 of 24]")], "qkv")
      [('q', ()), ('k', ()), ('v', ())]
    """
    modules: list[tuple[str, Index]] = []
    for n, rule in enumerate(path_map):
        theirs, outputs = _split_name(rule[1])
        wanted = name
        if _kind(rule) == "Parameter":
            owner, wanted = theirs.rpartition(".")[0], re.sub(r"(\.base_layer)+$", "", name)
            later = path_map[n + 1 :]
            inside = sum(_kind(r) == "Parameter" and r[1].rpartition(".")[0] == owner for r in later)
            if name != wanted + ".base_layer" * inside:
                continue
            theirs = owner
        shared, values = _HOLE.findall(rule[0]), _match(theirs, "[^.]+", wanted)
        if values is None or (modules and outputs is None):
            continue
        module = rule[0]
        for key in shared:
            module = module.replace(f"{{{key}}}", values.pop(key))
        # One spelling of each number, or two names would be one module.
        if not all("|" in hole or re.fullmatch("0|[1-9][0-9]{0,8}", value) for hole, value in values.items()):
            continue
        index = [
            hole.split("|").index(value) if "|" in hole else int(value) for hole, value in values.items()
        ]
        modules.append((module, tuple(index)))
        if outputs is None:
            break
    return modules


def leaf_paths(module: str) -> list[str]:
    """The paths that an adapted parameter for which `module` is looked up may have, see `adapted_leaves`."""
    return [module, *(f"{module}/{leaf}" for leaf in _OF_LEAF)]


def tied_heads(path_map: PathMap) -> dict[str, str]:
    """The PyTorch names of embeddings by those of the heads that share their weight.

    Example:
      >>> tied_heads([("embed", "model.embed_tokens", "TiedEmbedding"), ("embed", "lm_head", "TiedHead")])
      {'lm_head': 'model.embed_tokens'}
    """
    heads = {rule[1]: torch_module_of(path_map, rule[0]) for rule in path_map if rule[2:] == ("TiedHead",)}
    return {head: module.name for head, module in heads.items() if module is not None}


class Target(NamedTuple):
    """An adapted leaf in both models.

    Attributes:
      spec: its spec.
      kind: its layout in PyTorch, one of `KINDS`.
      names: maps each slice of the factors to a PyTorch module, or for a `Parameter` to the parameter.
      letters: einsum letters of the axes that index slices. A factor without one of them is shared by the slices
        along it.
      outputs: the outputs of the PyTorch modules that the leaf has; None for all.
      others: the PyTorch modules of the leaf's layers that are not adapted.
      inside: for a `Parameter`, how many later ones of its module are adapted too: PEFT wraps the module once for
        each, and the first one's factors are innermost.
    """

    spec: AdapterSpec
    kind: str
    names: dict[Index, str]
    letters: str
    outputs: Outputs | None = None
    others: tuple[str, ...] = ()
    inside: int = 0

    def keys(self, index: Index) -> tuple[str, ...]:
        """The names of A and B, and of the magnitudes if there are any, in PEFT's file."""
        name = self.names[index]
        if self.kind == "Parameter":  # the factors belong to its owner
            name = name.rpartition(".")[0] + ".base_layer" * self.inside
        form = "{}.lora_embedding_{}" if self.kind.endswith("Embedding") else "{}.lora_{}.weight"
        pair = form.format(name, "A"), form.format(name, "B")
        return (*pair, f"{name}{MAGNITUDE_END}") if self.spec.magnitude else pair

    def shared_a(self) -> list[list[str]]:
        """The names of A in PEFT's file, grouped by the A of ours that they are copies of."""
        groups: dict[Index, list[str]] = {}
        for index in self.names:
            groups.setdefault(_own_index(self, index, self.spec.factor_letters[0]), []).append(
                self.keys(index)[0]
            )
        return [*groups.values()]


def adapted_leaves(specs: Specs, path_map: PathMap) -> tuple[dict[str, Target], list[str]]:
    """Finds the PyTorch modules for all specs.

    Returns:
      A dict from the path in `specs` to a `Target`; and a list of problems, one line per spec without a counterpart
      and per PyTorch module to which two specs map their factors.
    """
    targets: dict[str, Target] = {}
    problems, places = [], {}  # the number of the rule that matches each
    owners: dict[tuple[str, Outputs | None], str] = {}
    for key, spec in specs.items():
        owner, _, leaf = key.rpartition("/")
        # An adapted parameter is looked up by the module that owns it.
        module = owner if spec.kind == "parameter" and leaf in _OF_LEAF else key
        if (torch_module := torch_module_of(path_map, module)) is None:
            problems.append(f"no rule of the path map matches {module!r}")
            continue
        places[key] = next(
            n for n, rule in enumerate(path_map) if _match(rule[0], "[^/]+", module) is not None
        )
        try:
            kind = _kind_of(spec, torch_module)
            if kind == "TiedEmbedding" and torch_module.name not in tied_heads(path_map).values():
                raise ValueError(
                    f"{spec.leaf} is also the head, whose name is missing: add a rule of kind TiedHead to the "
                    "path map"
                )
            letters = _index_letters(spec, torch_module, kind)
            indices = itertools.product(*(range(spec.sizes[c]) for c in letters))
            all_names = {index: torch_module.at(index) for index in indices}
            # `layers` selects indices of the outermost stacked axis, which comes first.
            names = {i: name for i, name in all_names.items() if spec.layers is None or i[0] in spec.layers}
            others = tuple(name for index, name in all_names.items() if index not in names)
            target = Target(spec, kind, names, letters, torch_module.outputs, others)
        except ValueError as error:
            problems.append(str(error))
            continue
        targets[key] = target
    # PEFT wraps a module's parameters in their order there, which only the rules tell.
    rules = {key: places[key] for key, target in targets.items() if target.kind == "Parameter"}
    for key, rule in rules.items():
        owned = {name.rpartition(".")[0] for name in targets[key].names.values()}
        beside = [
            rules[k] for k in rules if owned & {n.rpartition(".")[0] for n in targets[k].names.values()}
        ]
        if beside.count(rule) > 1:
            problems.append(
                f"the rule {path_map[rule][:2]} is for several parameters of {min(owned)!r}: give each a rule of "
                "its own, in the order that they have in the PyTorch module"
            )
        targets[key] = targets[key]._replace(inside=sum(other > rule for other in beside))
    for key, target in targets.items():
        for index in target.names:
            if (owner := owners.setdefault((target.keys(index)[0], target.outputs), key)) != key:
                problems.append(f"{owner!r} and {key!r} both map their factors to {target.names[index]!r}")
    return targets, problems


def _kind_of(spec: AdapterSpec, torch_module: TorchModule) -> str:
    """The layout of the adapted weight in PyTorch.

    Raises:
      ValueError: PEFT does not support the weight, or the rule contradicts the spec.
    """
    default = _OF_SPEC.get(spec.kind, "Linear")
    if spec.kind == "parameter":
        default = _OF_LEAF.get(spec.leaf.rpartition("/")[2], "Parameter")
    if spec.kind == "conv_transpose":
        raise ValueError(f"{spec.leaf} is a transposed convolution, which PEFT does not support")
    kind = torch_module.kind or default
    if spec.magnitude and kind in ("Parameter", "TiedEmbedding"):
        what = "a parameter" if kind == "Parameter" else "an embedding that is also the head"
        raise ValueError(
            f"{spec.leaf} is {what}, for which PEFT does not support DoRA; merge the adapter instead"
        )
    indices = max(0, len(torch_module.holes) - len(spec.stacked))
    if kind == "Parameter" and (
        spec.axes.count("i") > 1 or spec.axes.count("o") > 1 or len(spec.axes) > 3 + indices
    ):
        raise ValueError(
            f"{spec.leaf} must have one input axis, one output axis and at most one more for PEFT, besides "
            f"{indices} that {torch_module.name} has indices for, got {spec.axes!r}"
        )
    if spec.kind != "parameter" and kind != "Parameter" and _SAME_LAYOUT.get(kind, kind) != default:
        raise ValueError(
            f"{spec.leaf} of kind {spec.kind} must be {default} in the path map, got {kind} for "
            f"{torch_module.name}"
        )
    return kind


def _index_letters(spec: AdapterSpec, torch_module: TorchModule, kind: str) -> str:
    """Einsum letters of the axes that index modules: stacked axes, outermost first, then parts, then batch axes.

    Raises:
      ValueError: the indices and parts in the rule do not fit the leaf's axes.
    """
    stacked = "".join(sorted((c for c in spec.base_letters if c.isupper()), reverse=True))
    unstacked = "".join(c for c in spec.base_letters if c.islower())
    batch = "".join(c for c, axis in zip(unstacked, spec.axes, strict=True) if axis not in "io")
    letters = stacked + batch
    if kind == "Parameter":  # what has no index is PEFT's axis of experts
        letters = letters[: max(len(stacked), len(torch_module.holes))]
    if torch_module.parts:
        size = spec.sizes[unstacked[0]]
        # Of a single output axis each part would have one feature, and the parts of an input axis are added.
        selects = spec.axes[0] not in "io" or (spec.axes[0] == "o" and spec.axes.count("o") > 1)
        is_first = ["|" in hole for hole in torch_module.holes].index(True) == len(spec.stacked)
        if kind == "Parameter" or not selects or size != len(torch_module.parts) or not is_first:
            raise ValueError(
                f"{spec.leaf} with axes {spec.axes!r} and shape {spec.shape} has no parts for {torch_module.name}: "
                f"its first unstacked axis must be a batch axis, or one of several output axes, of size "
                f"{len(torch_module.parts)}; other indices than those of stacked axes must follow the parts"
            )
        letters = stacked + unstacked[0] + batch.removeprefix(unstacked[0])
    if len(letters) != len(torch_module.holes):
        raise ValueError(
            f"{spec.leaf} has {len(letters)} stacked and batch axes, but {torch_module.name} has "
            f"{len(torch_module.holes)} indices"
        )
    return letters


def factors_to_peft(
    factors: Sequence[np.ndarray], target: Target, *, prune: bool = False
) -> Iterator[tuple[Index, tuple[np.ndarray, ...]]]:
    """Converts factors to PEFT's layout, slice by slice.

    `factors` are A, B and, if the spec has them, the magnitudes. With `prune`, without the components that are 0 in
    B, unless all are: then one is kept. Slices with one A keep the same components.

    Yields:
      The slice's index, and its A, B and magnitudes if any, with the shapes of `factor_shapes` for the kept rank.
    """
    for index in target.names:
        kept = _components_in_use(factors[1], index, target) if prune else np.arange(target.spec.rank)
        yield index, _slice_to_peft(factors, index, target, kept)


def rank_of_slice(a: np.ndarray, target: Target) -> int:
    """The rank of a slice from its A in PEFT's layout; below the spec's if it is pruned."""
    return a.shape[0] * target.spec.rank // factor_shapes(target)[0][0]


def factors_from_peft(
    slices: Mapping[Index, tuple[np.ndarray, ...]], target: Target
) -> tuple[np.ndarray, ...]:
    """Converts slices in PEFT's layout to factors; the inverse of `factors_to_peft`.

    Copies of a shared A must be equal.

    Returns:
      A, B and, if the spec has them, the magnitudes, with the spec's `factor_shapes` and the dtype of the first
      slice's A. What is missing in the slices is 0.
    """
    dtype = next(iter(slices.values()))[0].dtype
    factors = tuple(np.zeros(shape, dtype) for shape in target.spec.factor_shapes)
    # The entries' numbers, in PEFT's layout, say where each of its entries belongs: no second set of layouts.
    numbers = [np.arange(factor.size).reshape(factor.shape) for factor in factors]
    for index, arrays in slices.items():
        kept = np.arange(rank_of_slice(arrays[0], target))
        for factor, at, array in zip(
            factors, _slice_to_peft(numbers, index, target, kept), arrays, strict=True
        ):
            factor.reshape(-1)[at] = array
    return factors


def _slice_to_peft(
    factors: Sequence[np.ndarray], index: Index, target: Target, components: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Some components of one slice of the factors, in PEFT's layout."""
    kind, letters = target.kind, target.spec.factor_letters
    views = []  # A (batch, in..., r), B (batch, r, out...) and magnitudes (batch, 1, out...)
    for array, own in zip(factors, (*letters, letters[1]), strict=False):
        order = [c for c in target.letters if c in own] + [c for c in own if c not in target.letters]
        view = np.transpose(array, [own.index(c) for c in order])
        views.append(view[(*_own_index(target, index, own), ...)])
    a, b, *magnitude = views
    a = a[..., components]
    b = np.take(b, components, [c for c in letters[1] if c not in target.letters].index("r"))
    if kind == "Conv":
        a = np.moveaxis(a, (-1, -2), (0, 1))
    elif kind == "Parameter":
        a = a.swapaxes(-1, -2).reshape(-1, a.shape[-2])
    else:
        a = a.reshape(-1, a.shape[-1]).T
    _, b_shape, *magnitude_shape = factor_shapes(target, len(components))
    b = b.T if kind == "Parameter" else b.reshape(b.shape[0], -1).T
    rest = (m.reshape(shape) for m, shape in zip(magnitude, magnitude_shape, strict=True))
    return a, b.reshape(b_shape), *rest


def factor_shapes(target: Target, rank: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Computes the shapes of one slice of each factor in PEFT's layout, for the spec's rank or another.

    Returns:
      The shapes of A and B, and of the magnitudes if there are any: (r, in), (out, r), (out,). For a `Conv`
      (r, in, window...), (out, r, 1...), (1, out, 1...); for a `Parameter` (r · experts, in), (out, r · experts).
    """
    spec, kind, r = target.spec, target.kind, rank or target.spec.rank
    unstacked = [c for c in spec.base_letters if c.islower()]
    roles = zip(unstacked, spec.axes, strict=True)
    sizes = [(spec.sizes[c], axis) for c, axis in roles if c not in target.letters]
    inner, outer = (math.prod(n for n, axis in sizes if axis == side) for side in "io")
    if kind == "Conv":  # PEFT keeps A's window and channels as separate axes
        *window, channels = (n for n, axis in sizes if axis == "i")
        ones = tuple(1 for _ in window)
        pair = (r, channels, *window), (outer, r, *ones)
        return (*pair, (1, outer, *ones)) if spec.magnitude else pair
    if kind == "Parameter":
        experts = math.prod(n for n, axis in sizes if axis not in "io")
        return (r * experts, inner), (outer, r * experts)
    return ((r, inner), (outer, r), (outer,)) if spec.magnitude else ((r, inner), (outer, r))


class LeafLayout(NamedTuple):
    """How a fully trained leaf is stored in PyTorch: one tensor per index.

    Attributes:
      module: the PyTorch module.
      suffix: the last segment of a tensor's name, `"weight"` or `"bias"`.
      indices: the indices of the leaf's slices; `()` is the whole leaf.
      axes: a slice's axes in PyTorch's order.
      sizes: their sizes, in this order.
    """

    module: TorchModule
    suffix: str
    indices: Sequence[Index]
    axes: Sequence[int]
    sizes: Sequence[int]

    @property
    def output_axis(self) -> int:
        """PyTorch's axis of outputs."""
        return int(self.suffix == "weight" and self.module.kind == "Conv1D")

    def to_torch(self, part: np.ndarray) -> np.ndarray:
        """Converts a slice of the leaf to PyTorch's layout, in which a bias has one axis."""
        array = np.transpose(part, self.axes)
        return array.reshape(-1) if self.suffix == "bias" else array

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """The slice of the leaf in a tensor of all outputs; the inverse of `to_torch`.

        Raises:
          ValueError: the tensor has another shape.
        """
        shape = [math.prod(self.sizes)] if self.suffix == "bias" else list(self.sizes)
        rows: tuple[slice, ...] = ()
        if self.module.outputs is not None:
            shape[self.output_axis] = self.module.outputs.size
            rows = (slice(None),) * self.output_axis + (self.module.outputs.rows,)
        if list(tensor.shape) != shape:
            raise ValueError(f"must have shape {shape}, got {list(tensor.shape)}")
        return np.transpose(tensor[rows].reshape(self.sizes), np.argsort(self.axes))


def leaf_layout(path: str, shape: tuple[int, ...], path_map: PathMap) -> LeafLayout:
    """The layout in PyTorch of a fully trained leaf (`"params/..."`) with this shape.

    Raises:
      ValueError: no rule matches, it does not fit the shape, or the layout of a kernel is ambiguous.
    """
    owner, _, name = path.removeprefix("params/").rpartition("/")
    module = torch_module_of(path_map, owner) if path.startswith("params/") else None
    if module is None:
        raise ValueError(f"no rule of the path map matches {owner!r}")
    if len(module.holes) > 1:
        raise ValueError(
            f"a fully trained leaf must have at most one index, got {len(module.holes)} in {module.name}"
        )
    if module.parts and shape[:1] != (len(module.parts),):
        raise ValueError(
            f"its first axis must have size {len(module.parts)} for {module.name}, got shape {shape}"
        )
    if name not in SUFFIXES:
        raise ValueError(f"unsupported leaf {name!r}; must be one of {', '.join(SUFFIXES)}")
    stacked, sizes = shape[: len(module.holes)], shape[len(module.holes) :]
    indices = [*itertools.product(*map(range, stacked))]
    axes = _kernel_axes(len(sizes), module.kind) if name == "kernel" else range(len(sizes))
    return LeafLayout(module, SUFFIXES[name], indices, axes, [sizes[axis] for axis in axes])


def _kernel_axes(ndim: int, kind: str | None) -> Sequence[int]:
    if kind == "Conv1D":
        return range(ndim)
    if kind == "Conv":
        return (ndim - 1, ndim - 2, *range(ndim - 2))
    if kind in (None, "Linear") and ndim == 2:
        return (1, 0)
    raise ValueError(
        f"the input axes of a kernel with {ndim} axes and kind {kind} are ambiguous; set the rule's kind in "
        "the path map to Linear (2 axes), Conv1D or Conv"
    )


def _split_name(theirs: str) -> tuple[str, Outputs | None]:
    match = _OUTPUTS.fullmatch(theirs)
    return (match[1], Outputs(*map(int, match.groups()[1:]))) if match else (theirs, None)


def _match(side: str, segment: str, name: str) -> dict[str, str] | None:
    """The values of the placeholders on one side of a rule; None if the name does not match."""
    literals_and_holes = _HOLE.split(side)
    pattern = "".join(
        re.escape(part) if n % 2 == 0 else f"({part})" if "|" in part else f"({segment})"
        for n, part in enumerate(literals_and_holes)
    )
    match = re.fullmatch(pattern, name)
    return None if match is None else dict(zip(literals_and_holes[1::2], match.groups(), strict=True))


def _kind(rule: Sequence[str]) -> str | None:
    return rule[2] if len(rule) == 3 else None


def _own_index(target: Target, index: Index, letters: str) -> Index:
    """The index of a slice, of the axes that a factor with these letters has."""
    return tuple(n for c, n in zip(target.letters, index, strict=True) if c in letters)


def _components_in_use(b: np.ndarray, index: Index, target: Target) -> np.ndarray:
    """The components that are not 0 in B in a slice, or in another with the same A; the first if there are none."""
    letters_a, letters_b = target.spec.factor_letters
    fixed = {c: n for c, n in zip(target.letters, index, strict=True) if c in letters_a}
    rows = b[tuple(fixed.get(c, slice(None)) for c in letters_b)]
    axis = [c for c in letters_b if c not in fixed].index("r")
    in_use = (np.moveaxis(rows, axis, 0).reshape(target.spec.rank, -1) != 0).any(1)
    return np.flatnonzero(in_use) if in_use.any() else np.arange(1)
