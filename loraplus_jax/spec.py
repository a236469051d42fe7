"""`AdapterSpec`: the one table that says what is adapted and how.

Merging, describing, files and sharding all read it, because paths and shapes alone cannot tell a stacked layer
from a wide one or an input axis from an output axis. It is static, JSON-able and saved with every adapter.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from .config import check_number, check_whole, nearest

KINDS = ("dense",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """How one base leaf is adapted: leaf + scale * A B.

    Attributes:
      leaf: path of the base leaf in the variables, `"params/layers/query/kernel"`.
      kind: the layer's kind, one of `KINDS`.
      axes: a letter for each axis of the unstacked leaf: `i` input (contracted with A), `o` output (from B),
        any other letter a batch axis kept in both factors. A Dense kernel is `"io"`.
      shape: the leaf's full shape, stacked axes included.
      rank: the inner dimension r.
      scale: s in W + s A B.
      stacked: the axes that `nn.scan` or `nn.vmap` added, innermost first, each an index as `variable_axes`
        gives it (it may be negative).
    """

    leaf: str
    kind: str
    axes: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    stacked: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "stacked", tuple(self.stacked))
        check_whole(f"{self.leaf}: rank", self.rank, at_least=1)
        check_number(f"{self.leaf}: scale", self.scale)
        if not isinstance(self.leaf, str) or not isinstance(self.axes, str):
            raise ValueError(f"leaf and axes must be strings, got {self.leaf!r} and {self.axes!r}")
        for size in self.shape:
            check_whole(f"{self.leaf}: shape", size, at_least=0)
        for axis in self.stacked:
            if not isinstance(axis, int) or not -len(self.shape) <= axis < len(self.shape):
                raise ValueError(f"{self.leaf}: stacked must hold axes of shape {self.shape}, got {axis!r}")
        if self.kind not in KINDS:
            raise ValueError(f"{self.leaf}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if "i" not in self.axes or "o" not in self.axes:
            raise ValueError(f"{self.leaf}: axes must hold an i and an o, got {self.axes!r}")
        if len(self.axes) + len(self.stacked) != len(self.shape):
            raise ValueError(
                f"{self.leaf}: shape {self.shape} does not fit axes {self.axes!r} with stacked axes {self.stacked}"
            )

    def letters(self, axes: str) -> str:
        """The einsum letters of a leaf whose unstacked axes are `axes`, stacked axes inserted.

        >>> spec = AdapterSpec(leaf="w", kind="dense", axes="io", shape=(3, 2, 5), rank=1, scale=1.0, stacked=(1,))
        >>> spec.letters("io"), spec.letters("ir"), spec.letters("ro")
        ('iAo', 'iAr', 'rAo')
        """
        letters = list(axes)
        for n, axis in enumerate(self.stacked):
            letters.insert(axis if axis >= 0 else len(letters) + 1 + axis, chr(ord("A") + n))
        return "".join(letters)

    @property
    def factor_letters(self) -> tuple[str, str]:
        """The letters of A and of B, the rank as `r`: batch and input axes in A, batch and output axes in B."""
        a = "".join(c for c in self.axes if c != "o") + "r"
        batch = "".join(c for c in self.axes if c not in "io")
        return self.letters(a), self.letters(batch + "ro")

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The full shapes of A and B."""
        size = dict(zip(self.letters(self.axes), self.shape, strict=True)) | {"r": self.rank}
        a, b = self.factor_letters
        return tuple(size[c] for c in a), tuple(size[c] for c in b)

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
                raise ValueError(f"AdapterSpec has no field {name!r}{nearest(name, fields)}")
        needed = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if needed:
            raise ValueError(f"AdapterSpec lacks {', '.join(needed)}")
        return cls(**values)


Specs = Mapping[str, AdapterSpec]
"""Module path, segments joined by "/", to its `AdapterSpec`."""


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
