"""What a checkpoint calls a model's weights: a table beside each model's code, by which `hf` reads."""

import re
from dataclasses import dataclass

import jax

_LAYER = "{layer}"


@dataclass(frozen=True)
class Rule:
    """Where one tensor of the file goes.

    Attributes:
      name: its name in the file, after the table's renames. With `{layer}` in it there is one tensor a layer,
        and the leaf stacks them on axis 0.
      path: the leaf in our parameters, `"encoder/layers/mlp/up/kernel"`.
      transposed: torch keeps Linear weights as (out, in), ours are (in, out).
    """

    name: str
    path: str
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """All that is known of a checkpoint's names.

    Attributes:
      rules: one for each leaf of the model.
      renames: (regular expression, replacement), applied in order to every name in the file: prefixes and
        spellings that differ between checkpoints of the same model.
      ignore: regular expressions, each for whole renamed names, of what a checkpoint may bring and the model
        does not use. Rules come before them.
      copies: (name, other) of a tensor that a checkpoint may hold beside another, with the same values.
    """

    rules: tuple[Rule, ...]
    renames: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()

    def canonical(self, name: str) -> str:
        """The name in the file after the renames."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a renamed name is on the list of what the model does not use."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)


def linear_rules(name: str, path: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Rules for a torch Linear, which becomes an `nn.Dense`."""
    kernel = Rule(f"{name}.weight", f"{path}/kernel", transposed=True)
    return (kernel, Rule(f"{name}.bias", f"{path}/bias")) if bias else (kernel,)


def norm_rules(name: str, path: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Rules for a torch LayerNorm, or with `bias=False` an RMSNorm."""
    scale = Rule(f"{name}.weight", f"{path}/scale")
    return (scale, Rule(f"{name}.bias", f"{path}/bias")) if bias else (scale,)


def embedding_rules(name: str, path: str) -> tuple[Rule, ...]:
    """The rule for a torch Embedding, which becomes an `nn.Embed`."""
    return (Rule(f"{name}.weight", f"{path}/embedding"),)


def is_stacked(rule: Rule) -> bool:
    """Whether a rule stands for one tensor a layer."""
    return _LAYER in rule.name


def expand(rule: Rule, leaf: jax.ShapeDtypeStruct) -> list[str]:
    """The names that a rule stands for, one a layer or just one."""
    if not is_stacked(rule):
        return [rule.name]
    return [rule.name.replace(_LAYER, str(layer)) for layer in range(leaf.shape[0])]


def shape_in_file(rule: Rule, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of each tensor that a rule stands for."""
    shape = leaf.shape[1:] if is_stacked(rule) else leaf.shape
    return tuple(reversed(shape)) if rule.transposed else tuple(shape)
