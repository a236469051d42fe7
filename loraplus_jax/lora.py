"""The maths of an adapter as pure functions: its low-rank term, and merging it into the base weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from .dora import output_scale
from .quantization import is_packed
from .spec import FACTORS, AdapterSpec, Specs
from .tree import flat_factors, flatten, rebox, replace_leaves, unflatten

SCALE = "lora_scale"
"""Name of the optional collection, and of its leaves, that overrides scales."""
TAP = "lora_tap"
"""Name of an optional leaf next to two factors; its gradient is the result of `update_squares`."""
PREVIOUS_FACTORS = tuple(f"{name}_before" for name in FACTORS)
"""Names of the leaves next to a tap that hold the factors of the previous step."""
TERMS = ("delta1", "delta2", "delta3", "z_a", "z_b")
"""The quantities that `update_squares` measures, in order."""


@jax.named_scope("lora")
def low_rank_output(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    equations: tuple[str, str] | None = None,
    precision: Any = None,
    out_shardings: tuple[Any, Any] = (None, None),
) -> jax.Array:
    """The low-rank term s (x A) B of a dense layer, for x `(..., in)`, a `(in, r)`, b `(r, out)` of one dtype.

    The scale multiplies the r-wide product, where it is cheapest; it may be a traced array.

    Args:
      x, a, b: input and factors.
      scale: s.
      equations: for other layers, the two einsums of the term: the first of x and A, the second of its result and
        B.
      precision: as in `jnp.einsum`.
      out_shardings: those of the two products, for a mesh with explicit axis types.
    """
    first, second = ({"precision": precision, "out_sharding": sharding} for sharding in out_shardings)
    if equations is None:  # an einsum would give the same, but takes ten times as long to trace
        # One axis of rows: with more, XLA on CPU copies y's gradient, transposed, for the gradient of B. A reshape
        # of axes that are sharded explicitly would have to tell its sharding.
        rows = x if any(out_shardings) or is_explicit(x) else x.reshape(-1, x.shape[-1])
        h = jnp.matmul(rows, a, **first)
        return jnp.matmul(h * jnp.asarray(scale, h.dtype), b, **second).reshape(*x.shape[:-1], b.shape[-1])
    h = jnp.einsum(equations[0], x, a, **first)
    return jnp.einsum(equations[1], h * jnp.asarray(scale, h.dtype), b, **second)


def is_explicit(*arrays: Any) -> bool:
    """Whether arrays are sharded over a mesh with explicit axis types, where a product must tell its sharding."""
    return any(any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(arrays))


def weight_delta(
    a: jax.Array, b: jax.Array, spec: AdapterSpec, scale: jax.Array | float | None = None
) -> jax.Array:
    """s A B in the shape of the base leaf, with stacked and batch axes, in float32 or wider.

    With magnitudes this is not all that the adapter changes; see `adapted_weight`.
    `scale` overrides the spec's scale.
    """
    left, right = spec.factor_letters
    highest = jax.lax.Precision.HIGHEST
    product = jnp.einsum(
        f"{left},{right}->{spec.base_letters}",
        a.astype(jnp.promote_types(a.dtype, jnp.float32)),
        b.astype(jnp.promote_types(b.dtype, jnp.float32)),
        precision=highest,
    )
    return product * (spec.scale if scale is None else scale)


def adapted_weight(weight: Any, factors: Sequence[jax.Array], spec: AdapterSpec) -> jax.Array:
    """W + s A B, or with magnitudes c (W + s A B), in the shape of the base leaf, in float32 or wider.

    Args:
      weight: W, with stacked and batch axes.
      factors: A, B and with `spec.magnitude` m.
      spec: the spec.
    """
    a, b, *magnitude = factors
    total = weight + weight_delta(a, b, spec)
    if not magnitude:
        return total
    letters, outputs = spec.base_letters, spec.factor_letters[1].replace("r", "")
    c = output_scale(weight, a, b, magnitude[0], spec.scale, letters, spec.factor_letters)
    return jnp.einsum(f"{letters},{outputs}->{letters}", total, c)


def update_squares(
    term: Callable[..., jax.Array],
    x: jax.Array,
    before: tuple[jax.Array, jax.Array],
    after: tuple[jax.Array, jax.Array],
    scale: jax.Array | float,
    batch_axes: int = 0,
) -> jax.Array:
    """Measures how an adapter's last step changed its layer's output for inputs x, and the size of its features.

    With A and B after the step, and the step dA and dB: delta1 = s (x dA) (B - dB), delta2 = s (x (A - dA)) dB,
    delta3 = s (x dA) dB. Their sum is the change of Z_B = s (x A) B; Z_A = x A (arXiv 2402.12354, section 4,
    without s there). x is held fixed: changes made by earlier layers are not counted.

    Args:
      term: `term(x, a, b, scale)`, the layer's low-rank term.
      x: the layer's inputs.
      before, after: A and B before and after the step.
      scale: s.
      batch_axes: number of leading batch axes of B.

    Returns:
      float32 `(6,)`: the mean squares over all elements in the order of `TERMS`, followed by 1, to average sums
      over several calls of a layer.
    """
    (a0, b0), (a, b) = before, after
    da, db = a - a0, b - b0
    rank, *outputs = b.shape[batch_axes:]
    width = math.prod(outputs)
    # With B an identity, padded with zeros to the output width, the term equals Z_A.
    identity = jnp.broadcast_to(jnp.eye(rank, width, dtype=b.dtype).reshape(rank, *outputs), b.shape)

    def mean_square(a: jax.Array, b: jax.Array, scale: jax.Array | float = scale) -> jax.Array:
        return jnp.mean(jnp.square(term(x, a, b, scale).astype(jnp.float32)))

    z_a = mean_square(a, identity, 1.0) * width / rank
    deltas = [mean_square(da, b0), mean_square(a0, db), mean_square(da, db)]
    return jnp.stack([*deltas, z_a, mean_square(a, b), jnp.ones(())])


def measured_term(
    term: Callable[..., jax.Array],
    x: jax.Array,
    factors: tuple[jax.Array, jax.Array],
    scale: jax.Array | float,
    tap: jax.Array | None,
    before: tuple[jax.Array, jax.Array] | None,
    batch_axes: int = 0,
) -> jax.Array:
    """The low-rank term for a layer's input x; with a tap, the tap's gradient becomes `update_squares`.

    Args:
      term, x, scale, batch_axes: as in `update_squares`.
      factors: A and B.
      tap: the leaf `TAP`, or None.
      before: A and B before the step; only used with a tap.
    """
    y = term(x, *factors, scale)
    if tap is None or before is None:
        return y
    inputs = jax.lax.stop_gradient(x)
    squares = update_squares(term, inputs, before, factors, scale, batch_axes)
    return inject_gradient(y, tap, squares.reshape(tap.shape))


@jax.custom_vjp
def inject_gradient(y: jax.Array, tap: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `y`; in the backward pass the gradient of `tap` is `value`, which has the shape of `tap`.

    This passes numbers out of a model through the one channel that every transform preserves, including loops over
    layers, shared weights and rematerialization: the gradient of a parameter, summed over its uses.
    """
    return y


def _tapped_forward(y: jax.Array, tap: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, value


def _tapped_backward(value: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return gradient, value, jnp.zeros_like(value)


inject_gradient.defvjp(_tapped_forward, _tapped_backward)


def scale_variables(specs: Specs, scale: jax.Array | float | Mapping[str, Any]) -> dict[str, Any]:
    """The optional read-only collection `"lora_scale"`, which overrides the scale s of every adapter at apply time.

    With a traced `s`, `model.apply({"params": base, "lora": lora, "lora_scale": scale_variables(specs, s)}, x)`
    runs many scales in one compiled program.

    Args:
      specs: the table from `init_lora`.
      scale: s (alpha / rank, not alpha), a scalar or broadcastable to the stacked layers; or a mapping from module
        path to s.
    """
    flat = {}
    for module, spec in specs.items():
        size = dict(zip(spec.base_letters, spec.shape, strict=True))
        shape = tuple(size[c] if c.isupper() else 1 for c in spec.factor_letters[0])
        value = scale[module] if isinstance(scale, Mapping) else scale
        flat[f"{module}/{SCALE}".removeprefix("/")] = jnp.broadcast_to(jnp.asarray(value), shape)
    return unflatten(flat)


def merge(
    base: Mapping[str, Any],
    lora: Mapping[str, Any],
    specs: Specs,
    *,
    dtype: Any = None,
    dequantize: bool = False,
) -> dict[str, Any]:
    """Puts every adapter into its base weight; returns base variables that need no adapter.

    Sums in float32. `base` stays unchanged; `unmerge` restores its weights bitwise.

    Args:
      base: variables without adapters, `{"params": ...}`.
      lora: the tree of adapters, or `{"lora": tree}`; pass fully trained parameters in `base`.
      specs: the table from `init_lora` or `load_adapter`.
      dtype: dtype of the merged leaves; by default each keeps its dtype.
      dequantize: whether to merge into the values that a packed weight stands for, which differ from the original
        ones by the rounding. By default pass the original weights.

    Raises:
      ValueError: `base`, `lora` and `specs` do not match, or a weight is packed; the message names the path.
    """
    if "params" not in base:
        raise ValueError(f'base must be variables {{"params": ...}}, got the keys {list(base)[:5]}')
    flat = flatten(base)
    factors = flat_factors(lora, specs)
    _check_fit(flat, factors, specs)
    for module, spec in specs.items():
        leaf = meta.unbox(flat[spec.leaf])
        if is_packed(leaf):
            leaf = check_dequantize(leaf, spec.leaf, allowed=dequantize)
        merged = adapted_weight(leaf, [factors[path] for path in spec.factor_paths(module)], spec)
        flat[spec.leaf] = rebox(flat[spec.leaf], merged.astype(leaf.dtype if dtype is None else dtype))
    return replace_leaves(base, flat)


def check_dequantize(weight: Any, path: str, *, allowed: bool) -> jax.Array:
    """The values of a packed weight for a merge; raises ValueError unless they were asked for."""
    if not allowed:
        raise ValueError(
            f"{path} is packed in {weight.kind}: merge into the original weights, which differ from it by the "
            "rounding, or pass dequantize=True to merge into the packed ones"
        )
    return weight.dequantize()


def unmerge(merged: Mapping[str, Any], base: Mapping[str, Any], specs: Specs) -> dict[str, Any]:
    """Replaces the adapted weights in merged variables with those of `base`, so they are bit-identical.

    Subtracting s A B would leave rounding errors. All other leaves come from `merged`, even if they have changed.

    Args:
      merged: from `merge`.
      base: the base variables that were merged, or any part of them with the adapted leaves.
      specs: the specs that were merged.

    Raises:
      ValueError: an adapted leaf is missing in `merged` or `base`, or has another shape.
    """
    flat, kept = flatten(merged), flatten(base)
    for spec in specs.values():
        for name, tree in (("merged", flat), ("base", kept)):
            shape = tuple(meta.unbox(tree[spec.leaf]).shape) if spec.leaf in tree else None
            if shape != spec.shape:
                raise ValueError(f"{spec.leaf} in {name} must have shape {spec.shape}, got {shape}")
    return replace_leaves(merged, {spec.leaf: kept[spec.leaf] for spec in specs.values()})


def disabled(lora: Any) -> Any:
    """Returns adapters without effect: zeros of the same shapes, so a compiled model does not recompile.

    >>> disabled({"fc": {"lora_a": jnp.ones(2)}})["fc"]["lora_a"].tolist()
    [0.0, 0.0]
    """
    return jax.tree.map(jnp.zeros_like, lora)


def _check_fit(flat: Mapping[str, Any], factors: Mapping[str, Any], specs: Specs) -> None:
    known = {path for module, spec in specs.items() for path in spec.factor_paths(module)}
    if differing := sorted(known ^ factors.keys()):
        raise ValueError(f"the adapters and the specs differ at {', '.join(differing)}")
    for module, spec in specs.items():
        shape = tuple(meta.unbox(flat[spec.leaf]).shape) if spec.leaf in flat else None
        if shape != spec.shape:
            raise ValueError(f"{spec.leaf} in the base must have shape {spec.shape}, got {shape}")
        shapes = tuple(tuple(factors[path].shape) for path in spec.factor_paths(module))
        if shapes != spec.factor_shapes:
            raise ValueError(
                f"{module}: factors must have the specs' shapes {spec.factor_shapes}, got {shapes}"
            )
