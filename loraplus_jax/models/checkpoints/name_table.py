"""Maps a checkpoint's tensor names to a model's parameters; each model has a table, and `hf` loads with it."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from ...interop.path_map import Outputs

_LAYER = "{layer}"


@dataclass(frozen=True)
class Rule:
    """Maps one tensor of the file, or a part of it, to a parameter.

    Attributes:
      name: name in the file, after the table's renames. A name with `{layer}` stands for one tensor per layer;
        the leaf stacks them on axis 0.
      path: path of the leaf in our parameters, `"encoder/layers/mlp/up/kernel"`.
      transposed: whether to transpose: torch stores Linear weights as (out, in), ours are (in, out).
      part: the outputs of the tensor that the leaf holds; None for all. Outputs are the leaf's last axis.
    """

    name: str
    path: str
    transposed: bool = False
    part: Outputs | None = None

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


def is_stacked(rule: Rule) -> bool:
    """Whether a rule stands for one tensor per layer."""
    return _LAYER in rule.name


def expand(rule: Rule, leaf: jax.ShapeDtypeStruct) -> list[str]:
    """The tensor names that a rule stands for: one per layer, or a single one."""
    if not is_stacked(rule):
        return [rule.name]
    return [rule.name.replace(_LAYER, str(layer)) for layer in range(leaf.shape[0])]


def shape_in_file(rule: Rule, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape in the file of each tensor that a rule stands for."""
    shape = leaf.shape[1:] if is_stacked(rule) else leaf.shape
    if rule.part is not None:
        shape = (*shape[:-1], rule.part.size)
    return tuple(reversed(shape)) if rule.transposed else tuple(shape)
