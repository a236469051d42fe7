"""`AdapterSpec`: which weight is adapted, the roles of its axes, and the adapter's rank and scale.

Merging, describing, saving and sharding all read the table of specs, because paths and shapes alone do not
distinguish a stacked layer from a wide one, or an input axis from an output axis.
"""

import dataclasses
import math
import string
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from .._utils.validation import check_choice, check_int, check_number, suggest, to_plain
from .einsum_letters import LETTERS, factor_letters, layer_axis, with_stacked

LAYER_KINDS = ("dense", "dense_general", "einsum", "conv", "conv_transpose", "embed", "parameter")
LINEAR_KINDS = ("dense", "dense_general", "einsum")
"""The kinds that `"all-linear"` adapts."""
LEAVES = ("kernel", "embedding")
"""The names of a layer's weight."""
FACTORS = ("lora_a", "lora_b")
EMBEDDING_FACTORS = ("lora_embedding_a", "lora_embedding_b")
"""Factors of embeddings have separate names, as in PEFT: they have a separate learning rate, and the optimizer sees
only names and shapes."""
MAGNITUDE = "lora_magnitude"
"""The name of the magnitudes of DoRA, beside the factors."""


class Factor(NamedTuple):
    """A factor of an adapter: A, B or the magnitudes.

    Attributes:
      path: path in the tree of factors.
      shape: shape, with stacked and batch axes.
      letters: an einsum letter for each axis: `r` for the rank, otherwise that of the weight's axis.
      batch: the letters that A and B share.
    """

    path: str
    shape: tuple[int, ...]
    letters: str
    batch: str

    def along(self, by_letter: Mapping[str, Any]) -> tuple[Any, ...]:
        """The values of the axes, such as mesh axes, by letter; None for a letter without one."""
        return tuple(by_letter.get(c) for c in self.letters)

    def rows(self, x: Any) -> Any:
        """The factor, or its gradient, as rows `(batch..., r, rest)`, one for each rank component."""
        x = x.transpose(self._order)
        return x.reshape(*x.shape[: len(self.batch) + 1], -1)

    def restore(self, rows: Any) -> Any:
        """The inverse of `rows`, which may have another rank."""
        sizes = [self.shape[axis] for axis in self._order]
        sizes[len(self.batch)] = rows.shape[-2]
        return rows.reshape(sizes).transpose(np.argsort(self._order))

    @property
    def _order(self) -> tuple[int, ...]:
        first = (*self.batch, "r")
        return tuple(map(self.letters.index, (*first, *(c for c in self.letters if c not in first))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """How one base leaf is adapted: leaf + scale * A B.

    Attributes:
      leaf: path of the base leaf in the variables, such as `"params/layers/query/kernel"`.
      kind: one of `LAYER_KINDS`.
      axes: one letter per axis of the unstacked leaf: `i` input (contracted with A), `o` output (from B), any other
        letter a batch axis kept in both factors. `"io"` for a Dense kernel, `"iiio"` for a two-dimensional Conv.
      shape: full shape of the leaf, including stacked axes.
      rank: inner dimension r.
      scale: s in W + s A B.
      stacked: axes added by `nn.scan` or `nn.vmap`, innermost first, as indices that may be negative, as in
        `variable_axes`.
      layers: adapted indices of the outermost stacked axis, or None for all. The factors of the other layers are
        zero and stay zero, since the gradients of a pair of zero factors are zero.
      magnitude: whether the tree also has the magnitudes m of DoRA (arXiv 2402.09353): the weight is then
        m (leaf + scale * A B) / norm, with the norms over the input axes.
    """

    leaf: str
    kind: str
    axes: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    stacked: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None
    magnitude: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "stacked", tuple(self.stacked))
        object.__setattr__(self, "layers", None if self.layers is None else tuple(self.layers))
        check_int(f"{self.leaf}: rank", self.rank, at_least=1)
        check_number(f"{self.leaf}: scale", self.scale)
        if not isinstance(self.leaf, str) or not isinstance(self.axes, str):
            raise TypeError(f"leaf and axes must be strings, got {self.leaf!r} and {self.axes!r}")
        for size in self.shape:
            check_int(f"{self.leaf}: shape", size, at_least=0)
        for axis in self.stacked:
            if not isinstance(axis, int) or not -len(self.shape) <= axis < len(self.shape):
                raise ValueError(f"{self.leaf}: stacked must contain axes of {self.shape}, got {axis!r}")
        check_choice(f"{self.leaf}: kind", self.kind, LAYER_KINDS)
        if "i" not in self.axes or "o" not in self.axes:
            raise ValueError(f"{self.leaf}: axes must contain i (input) and o (output), got {self.axes!r}")
        if not set(self.axes) <= set(string.ascii_lowercase) or len(self.axes) > len(LETTERS):
            raise ValueError(f"{self.leaf}: axes must be lower-case letters, got {self.axes!r}")
        if len(self.axes) + len(self.stacked) != len(self.shape):
            raise ValueError(
                f"{self.leaf}: axes {self.axes!r}, stacked {self.stacked} do not fit {self.shape}"
            )
        if not isinstance(self.magnitude, bool):
            raise TypeError(f"{self.leaf}: magnitude must be true or false, got {self.magnitude!r}")
        if self.layers is None:
            return
        check_layers_of(self.leaf, self)
        size = self.shape[layer_axis(self.base_letters, self.stacked)] if self.stacked else 0
        if not self.layers or any(not isinstance(n, int) or not 0 <= n < size for n in self.layers):
            raise ValueError(
                f"{self.leaf}: layers must be indices of stacked layers, below {size}, got {self.layers}"
            )

    @property
    def base_letters(self) -> str:
        """The einsum letters of the base leaf, one per axis; stacked axes have capitals."""
        return with_stacked(LETTERS[: len(self.axes)], self.stacked)

    @property
    def factor_letters(self) -> tuple[str, str]:
        """The einsum letters of A and B; see `factor_letters`."""
        return factor_letters(self.axes, self.stacked)

    @property
    def rule_letters(self) -> str:
        """The axis letters of the whole leaf for `target_parameters`; stacked axes become batch axes."""
        spare = (c for c in "efgh" + LETTERS if c not in self.axes + "io")
        return "".join(next(spare) if c.isupper() else c for c in with_stacked(self.axes, self.stacked))

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the base leaf's axes by letter, and the rank as that of `r`."""
        return dict(zip(self.base_letters, self.shape, strict=True)) | {"r": self.rank}

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of a scale for each stacked layer: A's, with 1 for the other axes."""
        sizes = self.sizes
        return tuple(sizes[c] if c.isupper() else 1 for c in self.factor_letters[0])

    @property
    def factors(self) -> tuple[str, ...]:
        """The names of A and B, and of the magnitudes if there are any."""
        pair = EMBEDDING_FACTORS if self.kind == "embed" else FACTORS
        return (*pair, MAGNITUDE) if self.magnitude else pair

    def factors_of(self, module: str) -> tuple[Factor, ...]:
        """A, B and, if there are any, the magnitudes of a module at the path `module`."""
        sizes, (a, b) = self.sizes, self.factor_letters
        batch = "".join(c for c in a if c in b and c != "r")
        sides = ((a, sizes), (b, sizes), (b, sizes | {"r": 1}))
        return tuple(
            Factor(f"{module}/{name}".lstrip("/"), tuple(size[c] for c in letters), letters, batch)
            for name, (letters, size) in zip(self.factors, sides, strict=False)
        )

    def factor_paths(self, module: str) -> tuple[str, ...]:
        """The paths of `factors_of` a module."""
        return tuple(factor.path for factor in self.factors_of(module))

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The full shapes of A and B, and of the magnitudes if there are any: B's, with 1 for the rank."""
        return tuple(factor.shape for factor in self.factors_of(""))

    @property
    def sides(self) -> tuple[int, int]:
        """The input size and output size of the weight, per index of the batch and stacked axes."""
        sizes, roles = self.sizes, list(zip(LETTERS, self.axes, strict=False))
        a, b = (math.prod(sizes[c] for c, role in roles if role == side) for side in "io")
        return a, b

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return to_plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
          ValueError, TypeError: a key is unknown or missing, or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"AdapterSpec must be a mapping, got {values!r:.80}")
        fields = dataclasses.fields(cls)
        for name in values:
            if name not in (names := [field.name for field in fields]):
                raise ValueError(f"AdapterSpec: unknown key {name!r}{suggest(name, names)}")
        if missing := [f.name for f in fields if f.name not in values and f.default is dataclasses.MISSING]:
            raise ValueError(f"AdapterSpec: missing keys: {', '.join(missing)}")
        return cls(**values)


def form_differences(spec: AdapterSpec, other: AdapterSpec) -> list[str]:
    """The fields in which two specs of a module differ, other than rank, scale, layers and variant."""
    fields = ("leaf", "kind", "axes", "shape", "stacked")
    return [field for field in fields if getattr(spec, field) != getattr(other, field)]


def check_rank(spec: AdapterSpec, where: str) -> None:
    """Raises ValueError if the rank is above one of the sizes; `where` describes the weight."""
    if spec.rank > min(spec.sides):
        raise ValueError(f"rank must be at most the least of {spec.sides} of {where}, got {spec.rank}")


def check_floating_weight(where: str, dtype: Any) -> None:
    """Raises ValueError for a weight of integers, which would round W + s A B; `where` describes the weight."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"{where} must have a floating-point dtype to be adapted, got {dtype}; to train on a quantized base, "
            "pass the floating-point weights to quantize_base"
        )


def check_layers_of(where: str, spec: AdapterSpec) -> None:
    """Raises ValueError if an adapter of some layers of a stack has magnitudes; `where` names the weight."""
    # A pair of zero factors stays zero, but the magnitudes of the other layers would train.
    if spec.magnitude:
        raise ValueError(f"layers_to_transform in the stack {where} requires variant lora, got dora")


def reject_magnitude(what: str, specs: "Specs") -> None:
    """Raises ValueError if an adapter has magnitudes; `what` begins the message."""
    if found := [spec.leaf for spec in specs.values() if spec.magnitude]:
        raise ValueError(f"{what} supports variant lora only, but {found[0]} has an adapter of variant dora")


Specs = Mapping[str, AdapterSpec]
"""Maps the path of each adapted module or parameter, with segments joined by "/", to its `AdapterSpec`."""


def specs_to_json(specs: Specs) -> dict[str, Any]:
    """Converts the table to plain JSON values.

    Returns:
      A dict from path to the spec's fields by name.
    """
    return {path: spec.to_json() for path, spec in specs.items()}


def specs_from_json(values: Mapping[str, Any]) -> dict[str, AdapterSpec]:
    """The inverse of `specs_to_json`; an error names the path of the invalid entry.

    Returns:
      The table, a dict from path to `AdapterSpec`.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"specs must be a mapping, got {values!r:.40}")
    table = {}
    for path, spec in values.items():
        try:
            table[path] = AdapterSpec.from_json(spec)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"specs[{path!r}]: {error}") from None
    return table
