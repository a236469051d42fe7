"""Checks a converted adapter: outputs with the adapter at its source and at its target, on the same inputs."""

import contextlib
import dataclasses
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..models.checkpoints.gguf.load import interleaved_heads
from ..models.checkpoints.name_table import expand
from ..models.checkpoints.params import load_params
from ..models.families import MODEL_TYPES, PREFIXES, family_of
from ..tasks.causal_lm import model_config
from ..tasks.interface import AdaptedModel
from .named_base import NamedBase
from .tuned_model import TunedModel, describe_language, load, look_model

SEED, ROWS, LENGTH = 0, 2, 16
Weights = Mapping[str, np.ndarray]


class Verified(NamedTuple):
    """Result of a verification.

    Attributes:
      what: what was compared, such as `"logits"`.
      by: what computed it.
      difference: largest absolute difference between source and target.
      size: largest absolute value at the source.
      effect: largest absolute difference between the source and the base without the adapter.
      tolerance: largest allowed difference relative to `size`.
      of_effect: what is allowed on top, relative to `effect`.
    """

    what: str
    by: str
    difference: float
    size: float
    effect: float
    tolerance: float
    of_effect: float

    @property
    def passed(self) -> bool:
        """Whether the difference is rounding."""
        allowed = self.tolerance * self.size + self.of_effect * self.effect
        return self.difference <= max(allowed, float(np.finfo(np.float32).tiny))


class ConversionFailed(ValueError):
    """The converted adapter computes something else than its source."""


def compare(
    what: str, by: str, plain: Any, source: Any, target: Any, tolerance: float, of_effect: float = 0.0
) -> Verified:
    """Compares arrays of one shape.

    Raises:
      ConversionFailed: they differ by more than rounding.
    """
    plain, source, target = (np.asarray(x, np.float64) for x in (plain, source, target))
    if source.shape != target.shape:
        raise ConversionFailed(
            f"{what} at the target have shape {target.shape}, at the source {source.shape}"
        )
    largest = lambda x: float(np.abs(x).max(initial=0.0))  # noqa: E731
    verified = Verified(
        what, by, largest(source - target), largest(source), largest(source - plain), tolerance, of_effect
    )
    if not verified.passed:
        raise ConversionFailed(
            f"{what} at the target differ by {verified.difference:.3g} from the source's, which are up to "
            f"{verified.size:.3g} and which the adapter changes by up to {verified.effect:.3g}: nothing was written"
        )
    return verified


def token_ids(vocabulary: int) -> np.ndarray:
    """Random token ids (2, 16), always the same, int32."""
    return np.random.default_rng(SEED).integers(0, vocabulary, (ROWS, LENGTH)).astype(np.int32)


def is_known(base: NamedBase) -> bool:
    """Whether the base is a language model of this package, and not a classifier with its layers."""
    names = base.config.get("architectures") or [""]
    return base.config.get("model_type") in MODEL_TYPES and not names[0].endswith("Classification")


def has_peft() -> bool:
    """Whether torch, transformers and PEFT are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))


def our_logits(base: NamedBase, changed: Weights = {}) -> np.ndarray:  # noqa: B006
    """Logits of a language model in float32 with some tensors of its file replaced."""
    config = model_config(base.files)
    family = family_of(config.model_type)
    model, table = family.model(config), family.name_table(config)
    ids = jnp.asarray(token_ids(config.vocab_size))
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    by_name = {table.canonical(name): value for name, value in changed.items()}
    names = {table.canonical(name): name for name in changed}
    head = by_name.pop("lm_head.weight", None) if base.is_untied else None
    rules, unused = {rule.path: rule for rule in table.rules}, set(by_name)

    def replace(path: str, leaf: np.ndarray) -> jax.Array:
        rule, leaf = rules[path], np.array(leaf, np.float32)
        for name, place in expand(rule, leaf).items():  # pyright: ignore[reportArgumentType]
            if name in by_name:
                unused.discard(name)
                value = by_name[name][rule.index]
                value = value.T if rule.transposed else value
                leaf[place.in_leaf] = value
        return jnp.asarray(leaf)

    params = load_params(base.files, table, shapes, param_dtype=np.float32, place=replace)
    if unused := unused - {name for name, _ in table.copies}:
        raise ValueError(
            f"{base.files}: the model does not use {names[min(unused)]}, which the adapter changes"
        )
    if base.is_untied:
        head = base.tensors["lm_head.weight"][:] if head is None else head
        params = {**params, "lm_head": {"kernel": jnp.asarray(np.asarray(head, np.float32).T)}}
        model = family.model(dataclasses.replace(config, tie_word_embeddings=False))
    return np.asarray(jax.jit(model.apply)({"params": params}, ids))


def opened_logits(place: Path) -> np.ndarray:
    """Logits of an adapter directory of either format, or of a model, read as `loraplus generate` does."""
    tuned = load(describe_language(look_model(str(place))))
    ids = jnp.asarray(token_ids(tuned.parts.model.config.vocab_size))  # pyright: ignore
    return np.asarray(jax.jit(tuned.parts.model.apply)(tuned.variables, ids))


def tuned_outputs(tuned: TunedModel) -> np.ndarray:
    """Outputs of a run's model: logits of a language model, the head's outputs of an encoder."""
    parts: AdaptedModel = tuned.parts
    config: Any = parts.model.config  # pyright: ignore[reportAttributeAccessIssue]
    length = LENGTH if tuned.settings.is_language else parts.base.inputs[0].shape[1]
    ids = jnp.asarray(token_ids(config.vocab_size)[:, :length])
    others = [jnp.ones_like(ids), jnp.zeros_like(ids)][: len(parts.base.inputs) - 1]
    return np.asarray(jax.jit(parts.model.apply)(tuned.variables, ids, *others), np.float32)


def torch_logits(base: NamedBase, *, changed: Weights = {}, adapter: Path | None = None) -> np.ndarray:  # noqa: B006
    """Logits by transformers in float32, with tensors replaced or an adapter loaded by PEFT."""
    # Their warnings are about deprecated calls of each other; what PEFT does not load shows in the logits.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        model = transformers.AutoModelForCausalLM.from_pretrained(base.files.path, dtype=torch.float32).eval()
        if base.is_untied and adapter is None:
            head: Any = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        parameters = dict(model.named_parameters())
        for name, value in changed.items():
            spelled = [n for prefix in ("", *PREFIXES) if (n := prefix + name) in parameters]
            if not spelled:
                raise ValueError(
                    f"{base.files}: transformers' {type(model).__name__} has no parameter {name}"
                )
            parameters[spelled[0]].data = torch.tensor(np.ascontiguousarray(value))
        if adapter is not None:
            import peft  # pyright: ignore[reportMissingImports]

            model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
        with torch.no_grad():
            ids = torch.tensor(token_ids(model.config.vocab_size), dtype=torch.long)
            return model(ids).logits.numpy()


def gguf_changes(
    file: Path, config: Mapping[str, Any], modules: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """What llama.cpp adds to the weights of modules for a GGUF adapter, with its own names, by its Python package.

    Args:
      file: the adapter.
      config: the base's `config.json`.
      modules: names of modules of the base.

    Yields:
      Each adapted module and the change of its weight, float32 (out, in), of an embedding (vocab, dim).

    Raises:
      ConversionFailed: a tensor of the file belongs to none of the modules.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    kind = reader.fields["general.architecture"].contents()
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    sizes: Any = family_of(config["model_type"]).config.from_hf(config)
    names = gguf.get_tensor_name_map(architecture, sizes.num_hidden_layers)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    for module in modules:
        name = names.get_name(module)
        if (a := tensors.pop(f"{name}.weight.lora_a", None)) is None:
            continue
        b = tensors.pop(f"{name}.weight.lora_b")
        # Of the embedding, A is (vocab, r).
        change = alpha / b.shape[1] * (a @ b.T if name == "token_embd" else b @ a)
        if heads := interleaved_heads(f"{name}.weight", kind, vars(sizes)):
            # Back from the order of its converter, which interleaves the halves of a head.
            change = change.reshape(heads, -1, 2, change.shape[1]).swapaxes(1, 2).reshape(change.shape)
        yield module, change
    if tensors:
        raise ConversionFailed(f"{file}: {min(tensors)} belongs to no module of the base")


def layer_outputs(weights: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Outputs of single layers on random inputs, by name; no more than one weight is in memory at a time."""
    outputs = {}
    for name, value in weights:
        matrix = value.reshape(-1, value.shape[-1] if value.ndim else 1)
        x = np.random.default_rng(SEED).normal(size=(matrix.shape[1], 2)) / np.sqrt(matrix.shape[1])
        outputs[name] = (matrix @ x.astype(np.float32)).reshape(-1)
    return outputs


def compare_layers(
    base: NamedBase,
    source: Iterable[tuple[str, np.ndarray]],
    target: Iterable[tuple[str, np.ndarray]],
    tolerance: Callable[[str], float],
    of_effect: float,
) -> Verified:
    """Compares the outputs of each layer on its own, for bases that cannot be run here or do not fit into memory.

    Args:
      base: the weights without the adapter; a layer that source or target lacks has its own.
      source, target: weights by name, in any order.
      tolerance: of a name, as `of_effect` for `compare`.

    Raises:
      ConversionFailed: a layer differs by more than rounding.
    """
    at_source, at_target = layer_outputs(source), layer_outputs(target)
    names = sorted({*at_source, *at_target})
    plain = layer_outputs((name, np.asarray(base.tensors[name][:], np.float32)) for name in names)
    layers = []
    for name, base_outputs in plain.items():
        expected, found = (each.get(name, base_outputs) for each in (at_source, at_target))
        what = f"outputs of {name}"
        layers.append(compare(what, "loraplus", base_outputs, expected, found, tolerance(name), of_effect))
    largest = {field: max(getattr(layer, field) for layer in layers) for field in Verified._fields[2:]}
    return layers[0]._replace(what="outputs of the layers", **largest)
