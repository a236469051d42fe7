"""Maps a checkpoint's tensor names to a model's parameters; each model has a table, and `hf` loads with it."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from ...interop.path_map import Outputs

_HOLE = re.compile(r"\{([^}]+)\}")


@dataclass(frozen=True)
class Rule:
    """Maps one tensor of the file, or a part of it, to a parameter.

    Attributes:
      name: name in the file, after the table's renames. A name with `{layer}` stands for one tensor per layer, and
        one with `{layer}` and `{expert}` for one per layer and expert; the leaf stacks them on its first axes.
        `{gate_proj|up_proj}` stands for tensors whose outputs follow each other in the leaf.
      path: path of the leaf in our parameters, `"encoder/layers/mlp/up/kernel"`.
      transposed: whether to transpose: torch stores Linear weights as (out, in), ours are (in, out).
      part: the outputs of the tensor that the leaf holds; None for all. Outputs are the leaf's last axis.
      parameter: the name in transformers, after the class's prefix, of what is a parameter there; None for the
        weight of a layer.
    """

    name: str
    path: str
    transposed: bool = False
    part: Outputs | None = None
    parameter: str | None = None

    @property
    def stacked(self) -> int:
        """The number of the leaf's first axes that stack tensors of the file."""
        return sum("|" not in hole for hole in _HOLE.findall(self.name))

    @property
    def joined(self) -> tuple[str, ...]:
        """The segment of each tensor whose outputs follow each other in the leaf; empty for one tensor."""
        return next((tuple(hole.split("|")) for hole in _HOLE.findall(self.name) if "|" in hole), ())

    @property
    def is_conv1d(self) -> bool:
        """Whether the tensor is the weight of transformers' Conv1D: a kernel that the file stores as ours."""
        return self.path.endswith("/kernel") and not self.transposed

    @property
    def outputs(self) -> slice:
        """The outputs of the tensor that the leaf holds."""
        return slice(None) if self.part is None else self.part.rows

    @property
    def index(self) -> tuple[slice, ...]:
        """The index of the leaf's values in the file's tensor."""
        return (slice(None), self.outputs) if self.is_conv1d else (self.outputs,)


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """All mappings of a checkpoint's names.

    Attributes:
      rules: one per leaf of the model.
      renames: (regular expression, replacement), applied in order to every name in the file: prefixes and
        spellings that differ between checkpoints of the same model.
      ignore: regular expressions that match entire renamed names of tensors that the model does not use. Rules
        take precedence.
      copies: (name, original) of a tensor that a checkpoint may contain with the same values as the original.
    """

    rules: tuple[Rule, ...]
    renames: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()

    def canonical(self, name: str) -> str:
        """The name after all renames."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        """Whether the model does not use the tensor with this renamed name."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)


def linear_rules(name: str, path: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Rules for a torch Linear, which becomes an `nn.Dense`."""
    kernel = Rule(f"{name}.weight", f"{path}/kernel", transposed=True)
    return (kernel, Rule(f"{name}.bias", f"{path}/bias")) if bias else (kernel,)


def conv1d_rules(name: str, path: str) -> tuple[Rule, ...]:
    """Rules for transformers' Conv1D, a linear layer with its weight as (in, out), which becomes an `nn.Dense`."""
    return (Rule(f"{name}.weight", f"{path}/kernel"), Rule(f"{name}.bias", f"{path}/bias"))


def split_rules(rules: Iterable[Rule], sizes: Mapping[str, int]) -> tuple[Rule, ...]:
    """Rules for a linear layer of the file whose outputs are, in order, those of layers with these sizes."""
    *starts, total = np.cumsum([0, *sizes.values()]).tolist()
    made = []
    for rule in rules:
        module, _, leaf = rule.path.rpartition("/")
        for start, (name, size) in zip(starts, sizes.items(), strict=True):
            path = f"{module.rpartition('/')[0]}/{name}/{leaf}"
            made.append(dataclasses.replace(rule, path=path, part=Outputs(start, start + size, total)))
    return tuple(made)


def norm_rules(name: str, path: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Rules for a torch LayerNorm, or with `bias=False` an RMSNorm."""
    scale = Rule(f"{name}.weight", f"{path}/scale")
    return (scale, Rule(f"{name}.bias", f"{path}/bias")) if bias else (scale,)


def embedding_rules(name: str, path: str) -> tuple[Rule, ...]:
    """The rule for a torch Embedding, which becomes an `nn.Embed`."""
    return (Rule(f"{name}.weight", f"{path}/embedding"),)


class Place(NamedTuple):
    """Where a leaf has the values of a tensor of the file.

    Attributes:
      stack: the index on the leaf's stacked axes, such as (layer, expert).
      outputs: the leaf's outputs that are the tensor's; None for all.
    """

    stack: tuple[int, ...]
    outputs: slice | None

    @property
    def in_leaf(self) -> tuple[Any, ...]:
        """The index of these values in the leaf."""
        return (*self.stack, ...) if self.outputs is None else (*self.stack, ..., self.outputs)


def expand(rule: Rule, leaf: jax.ShapeDtypeStruct) -> dict[str, Place]:
    """The tensors that a rule stands for, by name: one per index of the stacked axes, or a single one."""
    found = {}
    for stack in itertools.product(*map(range, leaf.shape[: rule.stacked])):
        name = rule.name
        for number in stack:
            name = re.sub(r"\{\w+\}", str(number), name, count=1)
        size = leaf.shape[-1] // len(rule.joined) if rule.joined else 0
        for n, segment in enumerate(rule.joined):
            found[_HOLE.sub(segment, name)] = Place(stack, slice(n * size, (n + 1) * size))
        if not rule.joined:
            found[name] = Place(stack, None)
    return found


def shape_in_file(rule: Rule, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape in the file of each tensor that a rule stands for."""
    shape = leaf.shape[rule.stacked :]
    if rule.joined:
        shape = (*shape[:-1], shape[-1] // len(rule.joined))
    if rule.part is not None:
        shape = (*shape[:-1], rule.part.size)
    return tuple(reversed(shape)) if rule.transposed else tuple(shape)
