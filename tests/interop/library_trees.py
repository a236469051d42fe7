"""Adapters of other libraries for one tiny Llama: their trees, and what they add to each weight.

The trees have the names and shapes that each library writes. What they add comes from the library's own equations,
applied to unit vectors, and its own conversions of weights: nothing here knows of recipes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

HIDDEN, LAYERS, INNER, HEADS, KEY_HEADS, HEAD = 32, 2, 48, 4, 2, 8
RANK, SCALE = 3, 1.5
NAME = "model.layers.{}.{}_proj"


class Library(NamedTuple):
    """A library's adapter.

    Attributes:
      make: returns the tree, and the changes (out, in) by module.
      options: what the user must say about the scale.
      by: what wrote the format: `"code"` of the library in other tests, or its `"format"` only here.
    """

    make: Callable[[np.random.Generator], tuple[dict, dict]]
    options: dict
    by: str


def draw(rng, *shape):
    return (0.3 * rng.normal(size=shape)).astype(np.float32)


def unit(*axes):
    """Unit vectors (1, n, *axes) as the inputs of an einsum, with n = prod(axes)."""
    size = int(np.prod(axes))
    return np.eye(size, dtype=np.float32).reshape(1, size, *axes)


def matrix(outputs):
    """(out, in) of the outputs (1, in, ...) of unit vectors."""
    return outputs.reshape(outputs.shape[1], -1).T


def einsums(x, *steps):
    for equation, factor in steps:
        x = np.einsum(equation, x, factor)
    return matrix(x)


def qwix(rng):
    """qwix on tunix's Llama: Einsum keeps the heads' axes, a Linear has two axes. Scale alpha / rank."""
    tree, changes = {}, {}
    for n in range(LAYERS):
        for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            a, b = draw(rng, HIDDEN, RANK), draw(rng, RANK, heads, HEAD)
            tree |= {f"layers/{n}/attn/{name}_proj/w_lora_{s}/value": x for s, x in (("a", a), ("b", b))}
            steps = (("BTD,Dr->BTr", a), ("BTr,rNH->BTNH", b))
            changes[NAME.format(n, f"self_attn.{name}")] = SCALE * einsums(unit(HIDDEN), *steps)
        a, b = draw(rng, HEADS, HEAD, RANK), draw(rng, RANK, HIDDEN)
        tree |= {f"layers/{n}/attn/o_proj/w_lora_{s}/value": x for s, x in (("a", a), ("b", b))}
        steps = (("BTNH,NHr->BTr", a), ("BTr,rD->BTD", b))
        changes[NAME.format(n, "self_attn.o")] = SCALE * einsums(unit(HEADS, HEAD), *steps)
        a, b = draw(rng, HIDDEN, RANK), draw(rng, RANK, INNER)
        tree |= {f"layers/{n}/mlp/gate_proj/kernel_lora_{s}/value": x for s, x in (("a", a), ("b", b))}
        changes[NAME.format(n, "mlp.gate")] = SCALE * (a @ b).T
    return tree, changes


def gemma(rng):
    """gm.nn.LoRA of the package gemma: no scale; keys and values, gate and up are one weight each."""
    tree, changes = {}, {}
    for n in range(LAYERS):

        def add(owner, names, a, b, x, *equations, n=n):
            tree.update({f"layer_{n}/{owner}/lora/{s}": value for s, value in (("a", a), ("b", b))})
            y = np.einsum(equations[1], np.einsum(equations[0], x, a), b)
            for name, part in zip(names, y if len(names) > 1 else [y], strict=True):
                changes[NAME.format(n, name)] = matrix(part)

        attn, mlp = "attn/{}/_LoRAEinsum_0", "mlp/_LoRAEinsum_{}"
        a, b = draw(rng, HIDDEN, RANK), draw(rng, RANK, HEADS, HEAD)
        add(attn.format("q_einsum"), ["self_attn.q"], a, b, unit(HIDDEN), "BTD,Dr->BTr", "BTr,rNH->BTNH")
        a, b = draw(rng, HIDDEN, RANK), draw(rng, RANK, 2, KEY_HEADS, HEAD)
        names = ["self_attn.k", "self_attn.v"]
        add(attn.format("kv_einsum"), names, a, b, unit(HIDDEN), "BTD,Dr->BTr", "BTr,rCKH->CBTKH")
        a, b = draw(rng, HEADS, HEAD, RANK), draw(rng, RANK, HIDDEN)
        add(
            attn.format("attn_vec_einsum"),
            ["self_attn.o"],
            a,
            b,
            unit(HEADS, HEAD),
            "BTNH,NHr->BTr",
            "BTr,rD->BTD",
        )
        a, b = draw(rng, HIDDEN, RANK), draw(rng, RANK, 2, INNER)
        names = ["mlp.gate", "mlp.up"]
        add(mlp.format("gating_einsum"), names, a, b, unit(HIDDEN), "BTD,Dr->BTr", "BTr,rCF->CBTF")
        a, b = draw(rng, INNER, RANK), draw(rng, RANK, HIDDEN)
        add(mlp.format("linear"), ["mlp.down"], a, b, unit(INNER), "BTF,Fr->BTr", "BTr,rD->BTD")
    return tree, changes


OPENPI = ("paligemma_with_expert.paligemma.model.language_model", "paligemma_with_expert.gemma_expert.model")


def openpi(rng):
    """Both experts: heads keep factors of their own, the output projection sums them, mlp ignores alpha.

    The equations are those that its Einsum derives from NDH, 2KDH and NHD for the axes -2 and -1.
    """
    tree, changes = {}, {}
    for suffix, model in zip(("", "_1"), OPENPI, strict=True):
        shapes = {
            f"attn/q_einsum{suffix}/lora": ((HEADS, HIDDEN, RANK), (HEADS, RANK, HEAD)),
            f"attn/kv_einsum{suffix}/lora": ((2, KEY_HEADS, HIDDEN, RANK), (2, KEY_HEADS, RANK, HEAD)),
            f"attn/attn_vec_einsum{suffix}/lora": ((HEADS, HEAD, RANK), (HEADS, RANK, HIDDEN)),
            f"mlp{suffix}/gating_einsum_lora": ((2, HIDDEN, RANK), (2, RANK, INNER)),
            f"mlp{suffix}/linear_lora": ((INNER, RANK), (RANK, HIDDEN)),
        }
        found = {}
        for name, pair in shapes.items():
            found[name] = [draw(rng, LAYERS, *shape) for shape in pair]
            for side, value in zip("ab", found[name], strict=True):
                tree[f"params/PaliGemma/llm/layers/{name}_{side}/value"] = value
        for n in range(LAYERS):
            q, kv, out, gating, linear = ([x[n] for x in pair] for pair in found.values())
            name = f"{model}.layers.{n}.{{}}_proj"
            steps = (("BTD,NDL->BTNL", q[0]), ("BTNL,NLH->BTNH", q[1]))
            changes[name.format("self_attn.q")] = SCALE * einsums(unit(HIDDEN), *steps)
            y = np.einsum("BSD,CKDL->CBSKL", unit(HIDDEN), kv[0])
            for part, value in zip("kv", np.einsum("CBSKL,CKLH->CBSKH", y, kv[1]), strict=True):
                changes[name.format(f"self_attn.{part}")] = SCALE * matrix(value)
            steps = (("BTNH,NHL->BTL", out[0]), ("BTL,NLD->BTD", out[1]))
            changes[name.format("self_attn.o")] = SCALE * einsums(unit(HEADS, HEAD), *steps)
            for part, a, b in zip(("gate", "up"), *gating, strict=True):
                changes[name.format(f"mlp.{part}")] = (a @ b).T
            changes[name.format("mlp.down")] = (linear[0] @ linear[1]).T
    return tree, changes


def openpi_base(rng):
    """The tensors of openpi's PyTorch form of the same model, as far as factors have a place."""
    tensors = {}
    for model in OPENPI:
        for n in range(LAYERS):
            layer = f"{model}.layers.{n}"
            sizes = {"q": HEADS * HEAD, "k": KEY_HEADS * HEAD, "v": KEY_HEADS * HEAD}
            tensors |= {
                f"{layer}.self_attn.{x}_proj.weight": draw(rng, size, HIDDEN) for x, size in sizes.items()
            }
            tensors[f"{layer}.self_attn.o_proj.weight"] = draw(rng, HIDDEN, HEADS * HEAD)
            tensors |= {f"{layer}.mlp.{x}_proj.weight": draw(rng, INNER, HIDDEN) for x in ("gate", "up")}
            tensors[f"{layer}.mlp.down_proj.weight"] = draw(rng, HIDDEN, INNER)
            tensors[f"{layer}.input_layernorm.weight"] = draw(rng, HIDDEN)
    return tensors


def to_hf(delta, heads, *, divided, interleaved):
    """maxtext's own hooks for Llama, from its layout (..., heads, size) to transformers'."""
    values = delta.reshape(-1, heads, HEAD)
    if interleaved:
        values = np.concatenate((values[..., ::2], values[..., 1::2]), axis=-1)
    return (values * (np.sqrt(HEAD) if divided else 1)).reshape(len(values), -1).T


def maxtext(rng, *, interleaved=False):
    """qwix on maxtext's scanned Llama: layers on the second axis; queries divided, in Llama 3.1 interleaved."""
    tree, changes = {}, {}
    sizes = {
        "self_attention/query": (HIDDEN, HEADS * HEAD, "self_attn.q"),
        "self_attention/key": (HIDDEN, KEY_HEADS * HEAD, "self_attn.k"),
        "self_attention/value": (HIDDEN, KEY_HEADS * HEAD, "self_attn.v"),
        "self_attention/out": (HEADS * HEAD, HIDDEN, "self_attn.o"),
        "mlp/wi_0": (HIDDEN, INNER, "mlp.gate"),
        "mlp/wi_1": (HIDDEN, INNER, "mlp.up"),
        "mlp/wo": (INNER, HIDDEN, "mlp.down"),
    }
    for owner, (inner, outer, name) in sizes.items():
        a, b = draw(rng, inner, LAYERS, RANK), draw(rng, RANK, LAYERS, outer)
        if name == "self_attn.q":
            b = (b / np.sqrt(HEAD)).astype(np.float32)  # as large as elsewhere once the factor is back
        tree |= {f"decoder/layers/{owner}/kernel_lora_{s}/value": x for s, x in (("a", a), ("b", b))}
        for n in range(LAYERS):
            delta = SCALE * a[:, n] @ b[:, n]
            if name in ("self_attn.q", "self_attn.k"):
                is_query = name == "self_attn.q"
                heads = HEADS if is_query else KEY_HEADS
                changes[NAME.format(n, name)] = to_hf(delta, heads, divided=is_query, interleaved=interleaved)
            else:
                changes[NAME.format(n, name)] = delta.T
    return tree, changes


def old_maxtext(rng):
    """maxtext's own factors, before it used qwix: `lora_a.kernel` next to the kernel, heads as axes."""
    tree, changes = {}, {}
    a, b = draw(rng, HIDDEN, LAYERS, RANK), draw(rng, RANK, LAYERS, KEY_HEADS, HEAD)
    path = "params/decoder/layers/self_attention/{}/lora_{}.kernel"
    tree |= {path.format("value", s): x for s, x in (("a", a), ("b", b))}
    for n in range(LAYERS):
        steps = (("BTD,Dr->BTr", a[:, n]), ("BTr,rNH->BTNH", b[:, n]))
        changes[NAME.format(n, "self_attn.v")] = SCALE * einsums(unit(HIDDEN), *steps)
    a, b = draw(rng, HEADS, LAYERS, HEAD, RANK), draw(rng, RANK, LAYERS, HIDDEN)
    tree |= {path.format("out", s): x for s, x in (("a", a), ("b", b))}
    for n in range(LAYERS):
        steps = (("BTNH,NHr->BTr", a[:, n]), ("BTr,rD->BTD", b[:, n]))
        changes[NAME.format(n, "self_attn.o")] = SCALE * einsums(unit(HEADS, HEAD), *steps)
    return tree, changes


def easydel(rng):
    """EasyDeL's eLoRA, a subclass of `nnx.LoRA`: x A B, without a scale."""
    tree, changes = {}, {}
    for n in range(LAYERS):
        for name, inner, outer in (("self_attn.q", HIDDEN, HEADS * HEAD), ("mlp.down", INNER, HIDDEN)):
            a, b = draw(rng, inner, RANK), draw(rng, RANK, outer)
            owner = NAME.format(n, name).replace(".", "/")
            tree |= {f"{owner}/lora_{s}": x for s, x in (("a", a), ("b", b))}
            changes[NAME.format(n, name)] = (a @ b).T
    return tree, changes


def keras(rng):
    """keras's EinsumDense and Dense in keras-hub's Llama: A has all axes of the kernel but the last."""
    tree, changes = {}, {}
    for n in range(LAYERS):

        def add(owner, name, a, b, x, *equations, n=n):
            path = f"transformer_layer_{n}/{owner}/lora_kernel_{{}}"
            tree.update({path.format(s): value for s, value in (("a", a), ("b", b))})
            # keras multiplies A and B to a kernel of the layer's own shape.
            changes[NAME.format(n, name)] = SCALE * matrix(np.einsum(equations[0], x, a @ b))

        a, b = draw(rng, HIDDEN, HEADS, RANK), draw(rng, RANK, HEAD)
        add("self_attention/query", "self_attn.q", a, b, unit(HIDDEN), "bqm,muh->bquh")
        a, b = draw(rng, HIDDEN, KEY_HEADS, RANK), draw(rng, RANK, HEAD)
        add("self_attention/value", "self_attn.v", a, b, unit(HIDDEN), "bkm,mvh->bkvh")
        a, b = draw(rng, HEADS, HEAD, RANK), draw(rng, RANK, HIDDEN)
        add("self_attention/attention_output", "self_attn.o", a, b, unit(HEADS, HEAD), "bquh,uhm->bqm")
        a, b = draw(rng, HIDDEN, RANK), draw(rng, RANK, INNER)
        add("feedforward_gate_dense", "mlp.gate", a, b, unit(HIDDEN), "bqm,mn->bqn")
    return tree, changes


def nnx_lora(rng):
    """`nnx.LoRA` and `nnx.LoRALinear` in a model with bonsai's names."""
    tree, changes = {}, {}
    for n in range(LAYERS):
        for name, end, inner, outer in (
            ("self_attn.q", "", HIDDEN, HEADS * HEAD),
            ("mlp.up", "/lora", HIDDEN, INNER),
        ):
            a, b = draw(rng, inner, RANK), draw(rng, RANK, outer)
            owner = NAME.format(n, name).replace(".", "/").removeprefix("model/")
            tree |= {f"{owner}{end}/lora_{s}/value": x for s, x in (("a", a), ("b", b))}
            changes[NAME.format(n, name)] = (a @ b).T
    return tree, changes


ALPHA = {"alpha": SCALE * RANK}
LIBRARIES = {
    "qwix": Library(qwix, ALPHA, "code"),
    "gemma": Library(gemma, {}, "code"),
    "openpi": Library(openpi, {"scale": SCALE}, "format"),
    "maxtext": Library(maxtext, ALPHA, "format"),
    "old maxtext": Library(old_maxtext, ALPHA, "format"),
    "easydel": Library(easydel, {}, "format"),
    "nnx": Library(nnx_lora, {}, "code"),
    "keras": Library(keras, ALPHA, "code"),
}
