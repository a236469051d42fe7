"""`AdapterSpec`: the one table that says what is adapted and how.

Merging, describing, files and sharding all read it, because paths and shapes alone cannot tell a stacked layer
from a wide one or an input axis from an output axis. It is static, JSON-able and saved with every adapter.
"""

import dataclasses
import math
import string
from collections.abc import Mapping
from typing import Any, Self

from ._validation import check_choice, check_int, check_number, suggest

LAYER_KINDS = ("dense", "dense_general", "einsum", "conv", "conv_transpose", "embed", "parameter")
LINEAR_KINDS = ("dense", "dense_general", "einsum")
"""The kinds that `"all-linear"` adapts."""
LEAVES = ("kernel", "embedding")
"""The names of a layer's weight."""
FACTORS = ("lora_a", "lora_b")
EMBEDDING_FACTORS = ("lora_embedding_a", "lora_embedding_b")
"""An embedding's factors have names of their own, as in PEFT: they learn at a rate of their own, and the optimizer
sees names and shapes only."""
_LETTERS = "abcdefghijklmnopqstuvwxyz"  # without r, the rank's


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """How one base leaf is adapted: leaf + scale * A B.

    Attributes:
      leaf: path of the base leaf in the variables, `"params/layers/query/kernel"`.
      kind: the layer's kind, one of `LAYER_KINDS`.
      axes: a letter for each axis of the unstacked leaf: `i` input (contracted with A), `o` output (from B),
        any other letter a batch axis kept in both factors. A Dense kernel is `"io"`, one of a two-dimensional
        Conv `"iiio"`.
      shape: the leaf's full shape, stacked axes included.
      rank: the inner dimension r.
      scale: s in W + s A B.
      stacked: the axes that `nn.scan` or `nn.vmap` added, innermost first, each an index as `variable_axes`
        gives it (it may be negative).
      layers: which indices of the outermost stacked axis are adapted, where not all are; the factors of the others
        are zero and stay so, since no gradient moves a pair of zero factors.
    """

    leaf: str
    kind: str
    axes: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    stacked: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None

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
                raise ValueError(f"{self.leaf}: stacked must hold axes of shape {self.shape}, got {axis!r}")
        check_choice(f"{self.leaf}: kind", self.kind, LAYER_KINDS)
        if "i" not in self.axes or "o" not in self.axes:
            raise ValueError(f"{self.leaf}: axes must hold an i and an o, got {self.axes!r}")
        if not set(self.axes) <= set(string.ascii_lowercase) or len(self.axes) > len(_LETTERS):
            raise ValueError(f"{self.leaf}: axes must be lower-case letters, got {self.axes!r}")
        if len(self.axes) + len(self.stacked) != len(self.shape):
            raise ValueError(
                f"{self.leaf}: shape {self.shape} does not fit axes {self.axes!r} with stacked axes {self.stacked}"
            )
        if self.layers is not None:
            self._check_layers()

    def _check_layers(self) -> None:
        assert self.layers is not None
        size = self.shape[layer_axis(self.base_letters, self.stacked)] if self.stacked else 0
        if not self.layers or any(not isinstance(n, int) or not 0 <= n < size for n in self.layers):
            raise ValueError(
                f"{self.leaf}: layers must be some of the {size} stacked ones, got {self.layers}"
            )

    @property
    def base_letters(self) -> str:
        """The einsum letters of the whole base leaf: one of its own for every axis, capitals for stacked ones."""
        return _with_stacked(_LETTERS[: len(self.axes)], self.stacked)

    @property
    def factor_letters(self) -> tuple[str, str]:
        """The einsum letters of A and of B, see `factor_letters`."""
        return factor_letters(self.axes, self.stacked)

    @property
    def rule_letters(self) -> str:
        """The letters of `target_parameters` for the whole leaf, a batch axis for each stacked one."""
        spare = (c for c in "efgh" + _LETTERS if c not in self.axes + "io")
        return "".join(next(spare) if c.isupper() else c for c in _with_stacked(self.axes, self.stacked))

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The full shapes of A and B."""
        size = dict(zip(self.base_letters, self.shape, strict=True)) | {"r": self.rank}
        a, b = self.factor_letters
        return tuple(size[c] for c in a), tuple(size[c] for c in b)

    @property
    def factors(self) -> tuple[str, str]:
        """The names of A and of B."""
        return EMBEDDING_FACTORS if self.kind == "embed" else FACTORS

    def factor_paths(self, module: str) -> tuple[str, str]:
        """The paths of A and of B in the tree of adapters, given the module's."""
        a, b = (f"{module}/{name}" if module else name for name in self.factors)
        return a, b

    @property
    def sides(self) -> tuple[int, int]:
        """The sizes of the input side and of the output side of one slice of the batch and stacked axes."""
        size = dict(zip(self.base_letters, self.shape, strict=True))
        roles = list(zip(_LETTERS, self.axes, strict=False))
        a, b = (math.prod(size[c] for c, role in roles if role == side) for side in "io")
        return a, b

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; an unknown or missing field is a ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"must be a mapping, got {values!r:.40}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ValueError(f"AdapterSpec has no field {name!r}{suggest(name, fields)}")
        needed = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if needed:
            raise ValueError(f"AdapterSpec lacks {', '.join(needed)}")
        return cls(**values)


def factor_letters(axes: str, stacked: tuple[int, ...] = ()) -> tuple[str, str]:
    """The einsum letters of A and of B: batch and input axes in A, batch and output axes in B, the rank as `r`.

    >>> factor_letters("io"), factor_letters("eio"), factor_letters("io", stacked=(1,))
    (('ar', 'rb'), ('abr', 'arc'), ('aAr', 'rAb'))
    """
    roles = list(zip(_LETTERS, axes, strict=False))
    a = "".join(c for c, role in roles if role != "o") + "r"
    batch = "".join(c for c, role in roles if role not in "io")
    b = batch + "r" + "".join(c for c, role in roles if role == "o")
    return _with_stacked(a, stacked), _with_stacked(b, stacked)


def layer_axis(letters: str, stacked: tuple[int, ...]) -> int:
    """Where the outermost stacked axis stands among einsum letters."""
    return letters.index(chr(ord("A") + len(stacked) - 1))


def _with_stacked(letters: str, stacked: tuple[int, ...]) -> str:
    """Capitals where `nn.scan` and `nn.vmap` put their axes, innermost first."""
    found = list(letters)
    for n, axis in enumerate(stacked):
        found.insert(axis if axis >= 0 else len(found) + 1 + axis, chr(ord("A") + n))
    return "".join(found)


Specs = Mapping[str, AdapterSpec]
"""The path of a module, or of a parameter adapted by itself, segments joined by "/", to its `AdapterSpec`."""


def specs_to_json(specs: Specs) -> dict[str, Any]:
    """The whole table as plain JSON values."""
    return {path: spec.to_json() for path, spec in specs.items()}


def specs_from_json(values: Mapping[str, Any]) -> dict[str, AdapterSpec]:
    """The inverse of `specs_to_json`; an error names the path it was met at."""
    if not isinstance(values, Mapping):
        raise ValueError(f"the adapter table must be a mapping, got {values!r:.40}")
    table = {}
    for path, spec in values.items():
        try:
            table[path] = AdapterSpec.from_json(spec)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"adapter table, entry {path!r}: {error}") from None
    return table
