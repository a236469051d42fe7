"""Recipes: how the LoRA factors of other JAX libraries are named and laid out, one row a library.

A recipe says which names the library gives its factors, which module of transformers each weight is, the axes of A
and B, and where the scale of A B comes from. `read_factors` applies one to a tree of arrays, and `dense_changes`
computes the same changes of the weights from the recipe alone, without the low-rank form, as a check.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .._utils.validation import suggest
from ..optim.find_pairs import Pair, factor_pairs
from .path_map import PathMap, TorchModule, torch_module_of

LAYER, PART, HEAD, SHARED = "L", "p", "n", "s"


class Row(NamedTuple):
    """A kind of adapted weight.

    The axes of a factor are letters: `i` input, `o` output, `r` rank, `L` stacked layers, `p` the parts that
    `{a|b}` in `theirs` names, `n` heads with a term of their own, whose outputs follow each other, `s` an axis that
    the library sums over. A single `i` or `o` stands for all axes of its side, in order. Parts without a `p` share
    the outputs evenly.

    Attributes:
      ours: path of the factors' owner, as in a path map.
      theirs: module of transformers, as in a path map.
      a, b: axes of A and B.
      scale: scale of A B where the library ignores its own setting; None for the recipe's.
      models: `model_type` of the bases that the row is for; empty for all.
      rotary: whether the outputs are heads with rotary positions, which Llama 3.1 of maxtext has interleaved.
      divided: whether the library's weight is transformers' divided by the root of the head size.
    """

    ours: str
    theirs: str
    a: str = "ir"
    b: str = "ro"
    scale: float | None = None
    models: tuple[str, ...] = ()
    rotary: bool = False
    divided: bool = False


class Recipe(NamedTuple):
    """How a library stores its adapters.

    Attributes:
      name: its name, for `--from`.
      version: the version of the library's code that the recipe was read from.
      factors: regular expression that the paths of all factors match.
      rows: its weights; the first row that fits applies.
      scale: its scale of A B; None if it is alpha / rank with an alpha that the files lack.
      prefix: regular expression of what may precede the paths in `rows`.
      leaf: regular expression of what may follow them.
      leaves_out: what the recipe does not read, for the documentation.
    """

    name: str
    version: str
    factors: str
    rows: tuple[Row, ...]
    scale: float | None
    prefix: str = ""
    leaf: str = ""
    leaves_out: str = ""


class Factors(NamedTuple):
    """The adapter of one PyTorch module.

    Attributes:
      a: A, float (r, in).
      b: B, float (out, r).
      scale: the scale s of B A.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


def _named(blocks: str, layers: str, theirs: str = "model.layers.{layer}") -> tuple[Row, ...]:
    """Rows for a library with transformers' own names of modules."""
    return (
        *(Row(f"{layers}/{block}/{{name}}", f"{theirs}.{to}.{{name}}") for block, to in _BLOCKS[blocks]),
        Row("lm_head", "lm_head"),
    )


_BLOCKS = {
    "attn": (("attn", "self_attn"), ("mlp", "mlp")),
    "self_attn": (("self_attn", "self_attn"), ("mlp", "mlp")),
}


def _gemma_rows(layer: str) -> tuple[Row, ...]:
    """Rows for attention in the names of Gemma's reference code, with factors that all heads share."""
    theirs = "model.layers.{layer}.self_attn"
    return (
        Row(f"{layer}/attn/q_einsum", f"{theirs}.q_proj"),
        Row(f"{layer}/attn/kv_einsum", f"{theirs}.{{k_proj|v_proj}}"),
        Row(f"{layer}/attn/qkv_einsum", f"{theirs}.{{q_proj|k_proj|v_proj}}"),
        Row(f"{layer}/attn/attn_vec_einsum", f"{theirs}.o_proj"),
    )


def _openpi_rows(suffix: str, theirs: str) -> tuple[Row, ...]:
    """Rows for one of openpi's experts, whose weights are stacked by layer.

    Its Einsum keeps the heads in both factors. For the output projection its two equations sum over them
    separately: in A with the inputs, in B alone. Its feed-forward layers ignore alpha.
    """
    layer = theirs + ".layers.{layer}"
    mlp: Any = {"a": "Lpir", "b": "Lpro", "scale": 1.0}
    return (
        Row(f"layers/attn/q_einsum{suffix}", f"{layer}.self_attn.q_proj", "Lnir", "Lnro"),
        Row(f"layers/attn/kv_einsum{suffix}", f"{layer}.self_attn.{{k_proj|v_proj}}", "Lpnir", "Lpnro"),
        Row(
            f"layers/attn/qkv_einsum{suffix}", f"{layer}.self_attn.{{q_proj|k_proj|v_proj}}", "Lpnir", "Lpnro"
        ),
        Row(f"layers/attn/attn_vec_einsum{suffix}", f"{layer}.self_attn.o_proj", "Liir", "Lsro"),
        Row(f"layers/mlp{suffix}/gating_einsum", f"{layer}.mlp.{{gate_proj|up_proj}}", **mlp),
        Row(f"layers/mlp{suffix}/linear", f"{layer}.mlp.down_proj", "Lir", "Lro", 1.0),
    )


def _maxtext_rows(stacked: bool) -> tuple[Row, ...]:
    """Rows for maxtext's decoder, unscanned or with its layers on the second axis (`param_scan_axis` 1)."""
    layers, a, b = ("layers", "iLr", "rLo") if stacked else ("layers_{layer}", "ir", "ro")
    attention, mlp = f"decoder/{layers}/self_attention", f"decoder/{layers}/mlp"
    theirs, rotary, plain = "model.layers.{layer}", ("llama", "mistral"), ("qwen2", "qwen3")
    names = {"query": "q_proj", "key": "k_proj"}
    known: Any = {"models": (*rotary, *plain)}
    return (
        *(
            Row(
                f"{attention}/{ours}", f"{theirs}.self_attn.{name}", a, b, None, models, is_rotary, is_divided
            )
            for ours, name in names.items()
            for models, is_rotary, is_divided in ((rotary, True, ours == "query"), (plain, False, False))
        ),
        Row(f"{attention}/value", f"{theirs}.self_attn.v_proj", a, b, **known),
        # The older form of its own, (heads, layers, size, r); then qwix's, which makes one axis of the inputs.
        Row(f"{attention}/out", f"{theirs}.self_attn.o_proj", a.replace("L", "Li"), b, **known),
        Row(f"{attention}/out/kernel", f"{theirs}.self_attn.o_proj", a, b, **known),
        Row(f"{mlp}/wi_0", f"{theirs}.mlp.gate_proj", a, b, **known),
        Row(f"{mlp}/wi_1", f"{theirs}.mlp.up_proj", a, b, **known),
        Row(f"{mlp}/wo", f"{theirs}.mlp.down_proj", a, b, **known),
    )


_KERAS_LAYER, _HF_LAYER = "transformer_layer_{layer}", "model.layers.{layer}"

RECIPES = (
    Recipe(
        "qwix",
        "qwix 0.1.8, tunix 0.1.7",
        r".*_lora_[ab]",
        (
            *_gemma_rows("layers/{layer}"),
            *_named("attn", "layers/{layer}"),
        ),
        scale=None,
        leaf=r"/(w|kernel)",
        leaves_out="embeddings and convolutions; MoE layers",
    ),
    Recipe(
        "gemma",
        "gemma 3.3.0",
        r".*/lora/[ab]",
        (
            *_gemma_rows("layer_{layer}"),
            Row("layer_{layer}/mlp/gating_einsum", "model.layers.{layer}.mlp.{gate_proj|up_proj}"),
            Row("layer_{layer}/mlp/linear", "model.layers.{layer}.mlp.down_proj"),
        ),
        scale=1.0,
        leaves_out="the vision encoder; Gemma 3n and 4",
    ),
    Recipe(
        "openpi",
        "openpi 15a9616a0",
        r".*(_einsum(_\d+)?/|(gating_einsum|linear)_)lora_[ab]",
        (
            *_openpi_rows("", "paligemma_with_expert.paligemma.model.language_model"),
            *_openpi_rows("_1", "paligemma_with_expert.gemma_expert.model"),
        ),
        scale=None,
        prefix=r"(PaliGemma/)?llm/",
        leaves_out="vision encoder and action layers, which it trains in full: BASE must be the PyTorch form of "
        "the same checkpoint (its examples/convert_jax_model_to_pytorch.py)",
    ),
    Recipe(
        "maxtext",
        "maxtext e591f30cb",
        r"(base/)?decoder/.*lora_[ab](\.kernel)?",
        (*_maxtext_rows(stacked=True), *_maxtext_rows(stacked=False)),
        scale=None,
        prefix=r"(base/)?",
        leaf=r"/kernel",
        leaves_out="models other than Llama, Mistral, Qwen 2 and Qwen 3; MoE; `param_scan_axis` other than 1",
    ),
    Recipe(
        "easydel",
        "EasyDeL 0.2.0.2 (090a03b2)",
        r"(model/layers/.*|lm_head)/lora_[ab]",
        _named("self_attn", "model/layers/{layer}"),
        scale=1.0,
        leaves_out="models whose modules are not named as in transformers; MoE",
    ),
    Recipe(
        "nnx",
        "flax 0.12.8",
        r"(?!(model/|decoder/|.*_einsum/)).*lora_[ab]",
        (*_named("self_attn", "layers/{layer}"), *_named("attn", "layers/{layer}")[:-1]),
        scale=1.0,
        leaf=r"/lora",
        leaves_out="models with other names than bonsai's, tunix's or transformers': pass `--path_map`",
    ),
    Recipe(
        "keras",
        "keras 3.15, keras-hub 71453d08f (Llama, Mistral)",
        r".*lora_(kernel|embeddings)_[ab]",
        (
            # keras puts the heads of queries, keys and values into A, and shares B.
            *(
                Row(f"{_KERAS_LAYER}/self_attention/{ours}", f"{_HF_LAYER}.self_attn.{name}", "inr", "ro")
                for ours, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
            ),
            Row(f"{_KERAS_LAYER}/self_attention/attention_output", f"{_HF_LAYER}.self_attn.o_proj"),
            *(
                Row(f"{_KERAS_LAYER}/feedforward_{ours}_dense", f"{_HF_LAYER}.mlp.{name}")
                for ours, name in (
                    ("gate", "gate_proj"),
                    ("intermediate", "up_proj"),
                    ("output", "down_proj"),
                )
            ),
        ),
        scale=None,
        prefix=r"([^/]*backbone[^/]*/)?",
        leaves_out="`.lora.h5` files, which name no layer; models other than Llama and Mistral: pass `--path_map`",
    ),
)
"""The recipes. levanter writes PEFT's files, which `PeftSource` reads."""
NAMES = tuple(recipe.name for recipe in RECIPES)


def clean_paths(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves without the levels that containers add to paths: `params/` in front, `/value` at the end.

    >>> clean_paths({"params/layer/lora_a/value": 1})
    {'layer/lora_a': 1}
    """
    cleaned = {re.sub(r"^(params/)+|(/(value|raw_value))+$", "", path): leaf for path, leaf in tree.items()}
    if len(cleaned) < len(tree):
        raise ValueError("several tensors have the same path without `params/` and `/value`")
    return cleaned


def find_recipe(pairs: Mapping[str, Pair], name: str | None = None) -> Recipe:
    """Finds the recipe whose names the factors have.

    Args:
      pairs: the result of `factor_pairs`.
      name: one of `NAMES`, to choose it.

    Returns:
      A `Recipe` of `RECIPES`.

    Raises:
      ValueError: no recipe fits, or several do; the message names a factor and the recipes.
    """
    if name is not None:
        return next(recipe for recipe in RECIPES if recipe.name == name)
    if not pairs:
        raise ValueError("there are no LoRA factors")
    paths = [path for pair in pairs.values() for path in pair]
    found = [
        recipe
        for recipe in RECIPES
        if all(re.fullmatch(recipe.factors, path) for path in paths)
        and all(_rows_of(recipe, owner) for owner in pairs)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        fitting = ", ".join(recipe.name for recipe in found)
        raise ValueError(
            f"the names of the factors fit several libraries ({fitting}); choose one with --from"
        )
    raise ValueError(
        f"no known library names a factor {paths[0]}; pass --from ({', '.join(NAMES)}) for the layout, and "
        "--path_map for names of your own"
    )


def read_factors(
    tree: Mapping[str, Any],
    recipe: Recipe,
    *,
    scale: float | None = None,
    alpha: float | None = None,
    path_map: PathMap = (),
    config: Mapping[str, Any] | None = None,
    check: Callable[[str, int, int], None] = lambda name, inputs, outputs: None,
) -> tuple[dict[str, Factors], dict[str, np.ndarray]]:
    """Reads the factors of a library in the layout of PyTorch.

    Args:
      tree: its arrays by path, see `clean_paths`; factors and anything else.
      recipe: the recipe.
      scale, alpha: the scale of A B, or alpha of a scale alpha / rank, where the files lack it.
      path_map: rules `(ours, theirs)` that come before the recipe's.
      config: the base's `config.json`, for rows that depend on the model.
      check: called with each PyTorch module's name, inputs and outputs before its factors are computed, which with
        a term for each head are larger than the library's.

    Returns:
      A dict from the PyTorch module's name to its `Factors`, and one from path to the arrays that are no factors.

    Raises:
      ValueError: a factor has no row, no partner or another shape; two have one module; or the scale is missing.
        The message names the path.
    """
    factors: dict[str, Factors] = {}
    for owner, row, module, a, b, s in _adapted(tree, recipe, scale, alpha, path_map, config or {}):
        for name, layer, part in _slices(owner, row, module, a, b):
            if name in factors:
                raise ValueError(f"{owner}: another factor is for {name}, too")
            pair = _low_rank(owner, row, module, a, b, layer, part, config or {}, partial(check, name))
            factors[name] = Factors(*pair, s)
    known = {path for pair in factor_pairs(tree).values() for path in pair}
    return factors, {path: leaf for path, leaf in tree.items() if path not in known}


def dense_changes(
    tree: Mapping[str, Any],
    recipe: Recipe,
    *,
    scale: float | None = None,
    alpha: float | None = None,
    path_map: PathMap = (),
    config: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields what a library adds to each weight, float32 (out, in), as one product; see `read_factors`."""
    for owner, row, module, a, b, s in _adapted(tree, recipe, scale, alpha, path_map, config or {}):
        letters = (_letters(owner, row.a, a), _letters(owner, row.b, b))
        for name, layer, part in _slices(owner, row, module, a, b):
            yield name, _product(letters, (a, b), row, module, layer, part, config or {}) * np.float32(s)


def _adapted(
    tree: Mapping[str, Any],
    recipe: Recipe,
    scale: float | None,
    alpha: float | None,
    path_map: PathMap,
    config: Mapping[str, Any],
) -> Iterator[tuple[str, Row, TorchModule, np.ndarray, np.ndarray, float]]:
    """Yields each pair of factors: its owner's path, row, PyTorch module, A, B and scale."""
    if scale is not None and alpha is not None:
        raise ValueError("pass --scale or --alpha, not both")
    is_used, matched = False, set[tuple[str, str]]()
    for owner, pair in factor_pairs(tree).items():
        rows = _rows_of(recipe, owner, path_map)
        fitting = [row for row in rows if not row[0].models or config.get("model_type") in row[0].models]
        if rows and not fitting:
            models = ", ".join(sorted({model for row, _ in rows for model in row.models}))
            raise ValueError(
                f"{owner}: the layout of {recipe.name} is known for a base of model_type {models}, got "
                f"{config.get('model_type')!r:.80}"
            )
        if not fitting:
            raise ValueError(
                f"{owner}: no rule of {recipe.name} has a place for these factors"
                f"{suggest(owner, [row.ours for row in recipe.rows])}; pass --path_map with one"
            )
        row, module = fitting[0]
        matched.add((row.ours, row.theirs))
        for path in pair:
            if not (np.can_cast(tree[path].dtype, np.float64, "same_kind") and tree[path].size):
                raise ValueError(
                    f"{path} must be real numbers and have no axis of size 0, got {tree[path].dtype} of shape "
                    f"{tree[path].shape}"
                )
        a, b = (np.asarray(tree[path], np.float32) for path in pair)
        for path, factor in zip(pair, (a, b), strict=True):
            if not np.isfinite(factor).all():
                raise ValueError(f"{path} has values that are not finite")
        rank = a.shape[-1]
        s = recipe.scale if row.scale is None else row.scale
        if s is None:
            if scale is None and alpha is None:
                raise ValueError(
                    f"{recipe.name} does not store the scale of A B: pass --scale, or --alpha for alpha / rank"
                )
            s = scale if scale is not None else (alpha or 0.0) / rank
            is_used = True
        yield owner, row, module, a, b, s
    if unused := [rule for rule in path_map if tuple(rule[:2]) not in matched]:
        raise ValueError(f"--path_map: {list(unused[0])} has the path of no factors")
    if not is_used and (scale, alpha) != (None, None):
        raise ValueError(f"{recipe.name} does not scale these factors; remove --scale and --alpha")


def _rows_of(recipe: Recipe, owner: str, path_map: PathMap = ()) -> list[tuple[Row, TorchModule]]:
    """The rows for a weight's path, each with its PyTorch module."""
    bare = re.sub(rf"^({recipe.prefix})", "", owner) if recipe.prefix else owner
    if recipe.name == "gemma":  # its Einsum has the factors in _LoRAEinsum_NAME/lora, or with a number for w
        bare = re.sub(r"/_LoRA[A-Za-z]+_(?!\d+/)(\w+)/lora$", r"/\1", bare)
        bare = re.sub(r"(/_LoRA[A-Za-z]+_\d+)?/lora$", "", bare)
    paths = dict.fromkeys((owner, bare, re.sub(rf"({recipe.leaf})$", "", bare) if recipe.leaf else bare))
    found = []
    for path in paths:
        for rule in path_map:
            if (module := torch_module_of([rule], path)) is not None:
                found.append((Row(rule[0], rule[1]), module))
        for row in recipe.rows:
            if (module := torch_module_of([(row.ours, row.theirs)], path)) is not None:
                found.append((row, module))
    return found


def _letters(owner: str, axes: str, factor: np.ndarray) -> str:
    """One letter an axis: of a side with one letter, as many as the factor has axes for it."""
    extra = factor.ndim - len(axes)
    for side in "io":
        if extra > 0 and axes.count(side) == 1:
            return axes.replace(side, side * (1 + extra))
    if extra:
        raise ValueError(f"{owner}: a factor of shape {factor.shape} must have the axes {axes}")
    return axes


def _slices(
    owner: str, row: Row, module: TorchModule, a: np.ndarray, b: np.ndarray
) -> Iterator[tuple[str, int | None, int | None]]:
    """Yields the name of each PyTorch module of a pair, with its layer and part."""
    letters = (_letters(owner, row.a, a), _letters(owner, row.b, b))
    sizes: dict[str, int] = {}
    for axes, factor in zip(letters, (a, b), strict=True):
        for letter, size in zip(axes, factor.shape, strict=True):
            if letter in "rLpn" and sizes.setdefault(letter, size) != size:
                raise ValueError(f"{owner}: A {a.shape} and B {b.shape} differ along {letter} of {letters}")
    parts = len(module.parts) or 1
    if sizes.get(PART, parts) != parts:
        raise ValueError(f"{owner}: A {a.shape} must have {parts} parts for {module.name}, got {sizes[PART]}")
    indices = [hole for hole in module.holes if "|" not in hole]
    if len(indices) != (LAYER in sizes):
        raise ValueError(f"{owner}: A {a.shape} and B {b.shape} do not say which layer of {module.name}")
    for layer in range(sizes.get(LAYER, 1)):
        for part in range(parts):
            index = tuple(part if "|" in hole else layer for hole in module.holes)
            yield module.at(index), layer if LAYER in sizes else None, part if module.parts else None


def _low_rank(
    owner: str,
    row: Row,
    module: TorchModule,
    a: np.ndarray,
    b: np.ndarray,
    layer: int | None,
    part: int | None,
    config: Mapping[str, Any],
    check: Callable[[int, int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """A (r, in) and B (out, r) of one PyTorch module, whose inputs and outputs `check` gets first.

    Heads with a term of their own become components of their own: A's are stacked, and B's are in the rows of their
    outputs.
    """
    views = []
    for axes, factor in ((row.a, a), (row.b, b)):
        letters = _letters(owner, axes, factor)
        for letter, index in ((LAYER, layer), (PART, part)):
            if letter in letters:
                factor = np.take(factor, index or 0, letters.index(letter))
                letters = letters.replace(letter, "")
        if SHARED in letters:
            factor = factor.sum(letters.index(SHARED))
            letters = letters.replace(SHARED, "")
        # Heads, then rank, then the side's axes as one.
        order = [*_where(letters, HEAD), letters.index("r"), *_where(letters, "i"), *_where(letters, "o")]
        view = factor.transpose(order)
        heads = view.shape[0] if HEAD in letters else 0
        rank = view.shape[1 if heads else 0]
        views.append((heads, view.reshape(max(heads, 1), rank, -1)))
    (a_heads, a), (b_heads, b) = views
    heads, shared = max(a_heads, b_heads), part is not None and PART not in row.b
    rank, inner, outer = a.shape[1], a.shape[2], b.shape[2]
    check(inner, max(heads, 1) * outer // (len(module.parts) if shared else 1))
    if heads:
        a, b = np.broadcast_to(a, (heads, rank, inner)), np.broadcast_to(b, (heads, rank, outer))
        blocks = np.zeros((heads, outer, heads, rank), b.dtype)
        for head in range(heads):
            blocks[head, :, head] = b[head].T
        a, b = a.reshape(heads * rank, inner), blocks.reshape(heads * outer, heads * rank)
    else:
        a, b = a[0], b[0].T
    if part is not None and PART not in row.b:
        b = np.split(b, len(module.parts))[part]
    return np.ascontiguousarray(a), np.ascontiguousarray(_output_order(row, b, config))


def _product(
    letters: tuple[str, str],
    factors: tuple[np.ndarray, np.ndarray],
    row: Row,
    module: TorchModule,
    layer: int | None,
    part: int | None,
    config: Mapping[str, Any],
) -> np.ndarray:
    """A B (out, in) of one PyTorch module by one einsum: every axis of a side is a letter of its own."""
    sides, inputs, outputs, heads = [], "", "", ""
    arrays = []
    for axes, factor in zip(letters, factors, strict=True):
        names = ""
        for axis, letter in enumerate(axes):
            if letter == "i":
                names += (new := "abcd"[len(inputs)])
                inputs += new
            elif letter == "o":
                names += (new := "uvwx"[len(outputs)])
                outputs += new
            elif letter == LAYER:
                factor, names = factor[(slice(None),) * axis + (slice(layer, (layer or 0) + 1),)], names + "L"
            elif letter == PART:
                factor, names = factor[(slice(None),) * axis + (slice(part, (part or 0) + 1),)], names + "p"
            else:
                names += letter
                heads = heads or (HEAD if letter == HEAD else "")
        sides.append(names)
        arrays.append(factor)
    product = np.einsum(f"{sides[0]},{sides[1]}->{heads}{outputs}{inputs}", *arrays, optimize=True)
    size = math.prod(product.shape[: len(heads + outputs)])
    change = product.reshape(size, -1).astype(np.float32)
    if part is not None and PART not in letters[1]:
        rows = size // len(module.parts)
        change = change[part * rows : (part + 1) * rows]
    return _output_order(row, change, config)


def _where(letters: str, letter: str) -> list[int]:
    return [axis for axis, each in enumerate(letters) if each == letter]


def _output_order(row: Row, values: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Values by output (out, ...) in transformers' order of rotary positions, and without a library's factor."""
    if not row.rotary:
        return values
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(rope, Mapping) and "llama3" in (
        rope.get("rope_type"),
        rope.get("type"),
    ):  # maxtext's layer for Llama 3.1 alone
        pairs = values.reshape(-1, size // 2, 2, values.shape[-1])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return values * np.float32(math.sqrt(size)) if row.divided else values
