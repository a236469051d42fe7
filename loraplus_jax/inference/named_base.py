"""A checkpoint as a model whose modules have the file's own names, for adapters of any transformers model.

No module runs: the tables say which tensor is which leaf, so that adapters are read, merged and written for models
that are not implemented here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from .._utils.validation import suggest
from ..adapter.spec import AdapterSpec
from ..interop.path_map import PathMap
from ..models.checkpoints.model_files import ModelFiles, View
from ..models.checkpoints.name_table import NameTable, Rule
from ..models.checkpoints.transformers_class import TransformersClass
from ..models.families import KINDS, MODEL_TYPES, PREFIXES, family_of
from .checkpoint_merge import TYPES

_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
OUTER = ("embed_tokens", "wte", "lm_head")
"""What the modules outside the layers are called that an adapter may change."""
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|wpe|\w*embeddings?)$")


class NamedBase(NamedTuple):
    """The tensors of a checkpoint.

    Attributes:
      files: its files.
      config: its `config.json`.
      tensors: lazy views by name.
      is_untied: whether its head is a copy of the embedding, made by `untied`.
    """

    files: ModelFiles
    config: dict[str, Any]
    tensors: Mapping[str, View]
    is_untied: bool = False

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.tensors[name].get_shape())

    @staticmethod
    def is_embedding(module: str) -> bool:
        """Whether a module is an embedding, by its name."""
        return _EMBEDDING.search(module) is not None

    def is_tied_embedding(self, module: str) -> bool:
        """Whether a module is an embedding of tokens that is also the head."""
        if module.rpartition(".")[2] not in ("embed_tokens", "wte"):
            return False
        if (kind := self.config.get("model_type")) in MODEL_TYPES:  # whose default the file may leave out
            model: Any = family_of(str(kind)).config.from_hf(self.config)
            return bool(model.tie_word_embeddings)
        return bool(self.config.get("tie_word_embeddings", "lm_head.weight" not in self.tensors))

    @property
    def tied_embedding(self) -> str | None:
        """The embedding that is also the head; None without one."""
        modules = [name.removesuffix(".weight") for name in self.tensors]
        return next((module for module in modules if self.is_tied_embedding(module)), None)

    def untied(self) -> "NamedBase":
        """The same with a head of its own that equals the embedding, for adapters of only one of the two."""
        tensors = {**self.tensors, "lm_head.weight": self.tensors[f"{self.tied_embedding}.weight"]}
        return self._replace(
            tensors=tensors, config=self.config | {"tie_word_embeddings": False}, is_untied=True
        )

    @property
    def modules(self) -> list[str]:
        """The names of all linear layers and embeddings."""
        weights = [name for name in self.tensors if name.endswith(".weight") and len(self.shape(name)) == 2]
        return [name.removesuffix(".weight") for name in weights]

    @property
    def has_conv1d(self) -> bool:
        """Whether the linear layers in its layers, called h, are transformers' Conv1D."""
        return self.config.get("model_type") in _CONV1D

    def is_conv1d(self, module: str) -> bool:
        """Whether a module is transformers' Conv1D, with its weight as (in, out)."""
        is_layer = self.has_conv1d and re.search(r"(^|\.)h\.\d+\.", module) is not None
        return is_layer and len(self.shape(f"{module}.weight")) == 2

    def weight(self, module: str) -> np.ndarray:
        """The weight of a module, float32 as (out, in), or of an embedding as in the file."""
        values = np.asarray(self.tensors[f"{module}.weight"][:], np.float32)
        return values.T if self.is_conv1d(module) else values

    def locate(self, names: Iterable[str]) -> dict[str, str]:
        """Finds the modules of an adapter in the checkpoint, with or without the prefix of a model with a head.

        Returns:
          A dict from each name to the module's name in the file.

        Raises:
          ValueError: the checkpoint has no such module.
        """
        modules = {name.rpartition(".")[0] for name in self.tensors}
        found = {}
        for name in names:
            spellings = [prefix + name for prefix in ("", *PREFIXES)]
            spellings += [name.removeprefix(prefix) for prefix in PREFIXES]
            if (module := next((each for each in spellings if each in modules), None)) is None:
                if ".experts." in name:
                    raise ValueError(
                        f"{name} is a parameter of experts, whose adapters convert only to loraplus; then "
                        "loraplus export writes PEFT's format, and with --merged the model"
                    )
                close = suggest(name, modules, fallback=False)
                raise ValueError(f"{self.files} is not the adapter's base: it has no module {name}{close}")
            found[name] = module
        return found

    def siblings(self, locations: Mapping[str, str]) -> dict[str, str]:
        """Finds the other modules of the layers that an adapter changes, the embedding and the head.

        They are named as the adapter names its own.

        Args:
          locations: modules by name, from `locate`.

        Returns:
          A dict as from `locate`.
        """
        # Beyond these, files of some models hold layers that predict further tokens; transformers ignores them.
        count, found = self.config.get("num_hidden_layers", self.config.get("n_layer")), {}
        stacks: dict[str, tuple[str, str]] = {}  # prefix of its modules in the file, and in the adapter
        for name, module in locations.items():
            if match := re.match(r"(.*?\.|)\d+\.", module):
                more = len(module) - len(name)  # one of the two has a prefix more
                stacks[match[1]] = module[: max(more, 0)], name[: max(-more, 0)]
        for module in self.modules:
            for stack, (ours, theirs) in stacks.items():
                number = module.removeprefix(stack).split(".")[0]
                is_layer = module.startswith(stack) and number.isdecimal()
                if is_layer and not (isinstance(count, int) and int(number) >= count):
                    found[theirs + module.removeprefix(ours)] = module
                elif module == "lm_head":
                    found[module] = module
                elif module.rpartition(".")[2] in OUTER:
                    found[theirs + module.removeprefix(ours)] = module
        return {name: module for name, module in found.items() if name not in locations}

    def specs(
        self,
        locations: Mapping[str, str],
        adapters: Mapping[str, tuple[int, float]],
        *,
        magnitude: bool = False,
    ) -> dict[str, AdapterSpec]:
        """The specs of adapters, whose paths are the modules' names in the file, joined by "/".

        Args:
          locations: modules by name, from `locate`.
          adapters: rank and scale of each.
          magnitude: whether they are DoRA's.
        """
        specs = {}
        for name, (rank, scale) in adapters.items():
            module = locations[name]
            if module == "lm_head" and (embedding := self.tied_embedding) is not None:
                raise ValueError(
                    f"{name}: the head of {self.files} is tied to its embedding, {embedding}, and an adapter of "
                    "the head alone would change the embedding too"
                )
            shape = self.shape(f"{module}.weight") if f"{module}.weight" in self.tensors else ()
            if len(shape) != 2:
                raise ValueError(
                    f"{name}: the weight in {self.files} has shape {shape}; only linear layers and embeddings can "
                    "be converted"
                )
            dtype = self.tensors[f"{module}.weight"].get_dtype()
            if re.match(r"[IU]\d|F8", dtype):  # of GGUF's quantized types, views give floats
                raise ValueError(
                    f"{name}: the weight in {self.files} is {dtype}, of a quantized model; use the model that it "
                    "was made from"
                )
            is_embedding = self.is_embedding(module)
            path, leaf = module.replace(".", "/"), "embedding" if is_embedding else "kernel"
            specs[path] = AdapterSpec(
                leaf=f"params/{path}/{leaf}",
                kind="embed" if is_embedding else "dense",
                axes="io",
                shape=shape if is_embedding or self.is_conv1d(module) else shape[::-1],
                rank=rank,
                scale=scale,
                magnitude=magnitude,
            )
        return specs

    def path_map(self, locations: Mapping[str, str]) -> PathMap:
        """The path map from `specs` to the adapter's names; modules that differ only in numbers share a rule."""
        rules: dict[tuple[str, ...], None] = {}
        for name, module in locations.items():
            kind = "Conv1D" if f"{module}.weight" in self.tensors and self.is_conv1d(module) else None
            if self.is_embedding(module):
                kind = "TiedEmbedding" if self.is_tied_embedding(module) else "Embedding"
            ours, theirs = module.replace(".", "/"), name
            numbers = re.findall(r"(?<=[./])\d+(?=[./]|$)", theirs)
            if numbers == re.findall(r"(?<=/)\d+(?=/|$)", ours):
                # The number of each place is a name, so that a rule serves all layers.
                ours, theirs = (_numbered(side) for side in (ours, theirs))
            rules[(ours, theirs, kind) if kind else (ours, theirs)] = None
            if kind == "TiedEmbedding":
                rules[module.replace(".", "/"), "lm_head", "TiedHead"] = None
        return tuple(rules)  # pyright: ignore[reportReturnType]

    def table(self) -> tuple[NameTable, dict[str, jax.ShapeDtypeStruct]]:
        """The name table of all tensors, and their leaves by path, for `CheckpointMerge`."""
        rules, leaves = [], {}
        for name, view in self.tensors.items():
            module, _, end = name.rpartition(".")
            shape, path, transposed = self.shape(name), name.replace(".", "/"), False
            if end == "weight" and len(shape) == 2:
                is_embedding = self.is_embedding(module)
                path = f"{module.replace('.', '/')}/{'embedding' if is_embedding else 'kernel'}"
                transposed = not (is_embedding or self.is_conv1d(module))
            elif end == "weight" and len(shape) == 1:
                path = f"{module.replace('.', '/')}/scale"
            dtype = np.dtype(TYPES.get(view.get_dtype(), np.float32))
            rules.append(Rule(name, path, transposed))
            leaves[path] = jax.ShapeDtypeStruct(shape[::-1] if transposed else shape, dtype)
        copies = ()
        if "lm_head.weight" in self.tensors and (embedding := self.tied_embedding) is not None:
            copies = (("lm_head.weight", f"{embedding}.weight"),)
            rules = [rule for rule in rules if rule.name != "lm_head.weight"]
        return NameTable(rules=tuple(rules), copies=copies), leaves

    def transformers_class(self) -> TransformersClass:
        """The class that loads the checkpoint, by its config."""
        kind = str(self.config.get("model_type"))
        known = KINDS[kind].architecture if kind in KINDS else ""
        name = str((self.config.get("architectures") or [known])[0])
        is_causal = name.endswith(("ForCausalLM", "LMHeadModel"))
        return TransformersClass(name, "", (), "CAUSAL_LM" if is_causal else None)


def _numbered(path: str) -> str:
    parts, count = re.split(r"([./])", path), iter(range(len(path)))
    return "".join(f"{{n{next(count)}}}" if part.isdigit() else part for part in parts)


def named_base(files: ModelFiles) -> NamedBase:
    """The tensors of a checkpoint; raises ValueError if they cannot be read."""
    if not all(math.prod(view.get_shape()) for view in files.tensors.values()):
        raise ValueError(f"{files} has an empty tensor")
    return NamedBase(files, files.config, files.tensors)
