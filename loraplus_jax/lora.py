"""The maths of an adapter as pure functions: its forward term, and merging it into plain weights."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from .spec import FACTORS, AdapterSpec, Specs
from .tree import flat_factors, flatten, replace_leaves, unflatten

SCALE = "lora_scale"
"""Name of the optional collection, and of its leaves, that overrides scales."""
TAP = "lora_tap"
"""Name of the optional leaf beside two factors whose gradient is what `update_squares` finds."""
PREVIOUS_FACTORS = tuple(f"{name}_before" for name in FACTORS)
"""Names of the leaves, beside a tap, with the factors of one step earlier."""
TERMS = ("delta1", "delta2", "delta3", "z_a", "z_b")
"""What is measured of a step, in the order of `update_squares`."""


def low_rank_output(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    equations: tuple[str, str] | None = None,
    precision: Any = None,
) -> jax.Array:
    """The adapter's term s (x A) B, for a dense layer's x `(..., in)`, a `(in, r)`, b `(r, out)`, all of one dtype.

    The scale acts on the r-wide product: the cheapest place, and it may be a traced array.

    Args:
      x, a, b: input and factors.
      scale: s.
      equations: for another layer, the two einsums that make the term: the first from x and A, the second from its
        result and B.
      precision: as `jnp.einsum` has it.
    """
    if equations is None:  # as einsums too, but einsum takes ten times as long to trace
        h = jnp.matmul(x, a, precision=precision)
        return jnp.matmul(h * jnp.asarray(scale, h.dtype), b, precision=precision)
    h = jnp.einsum(equations[0], x, a, precision=precision)
    return jnp.einsum(equations[1], h * jnp.asarray(scale, h.dtype), b, precision=precision)


def weight_delta(
    a: jax.Array, b: jax.Array, spec: AdapterSpec, scale: jax.Array | float | None = None
) -> jax.Array:
    """s A B in the shape of the base leaf, in float32 or wider, stacked layers and batch axes included.

    `scale` replaces the spec's s.
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


def update_squares(
    term: Callable[..., jax.Array],
    x: jax.Array,
    before: tuple[jax.Array, jax.Array],
    after: tuple[jax.Array, jax.Array],
    scale: jax.Array | float,
    batch_axes: int = 0,
) -> jax.Array:
    """What a step of an adapter did to its layer's output, and the size of its features, for the layer's inputs x.

    With A, B after the step, dA and dB the step: delta1 = s (x dA) (B - dB), delta2 = s (x (A - dA)) dB,
    delta3 = s (x dA) dB, whose sum is the change of Z_B = s (x A) B; and Z_A = x A (arXiv 2402.12354, section 4,
    there without s). x is held fixed: what earlier layers changed in it is theirs.

    Args:
      term: `term(x, a, b, scale)`, the layer's low-rank term.
      x: the layer's inputs.
      before, after: A and B one step apart.
      scale: s.
      batch_axes: how many leading axes of B are batch axes.

    Returns:
      float32 `(6,)`: the mean squares over all elements in the order of `TERMS`, and 1, so that sums over several
      calls of a layer can be divided.
    """
    (a0, b0), (a, b) = before, after
    da, db = a - a0, b - b0
    rank, *outputs = b.shape[batch_axes:]
    width = math.prod(outputs)
    # With an identity for B, and zeros where the outputs are more than the rank, the term is Z_A itself.
    identity = jnp.broadcast_to(jnp.eye(rank, width, dtype=b.dtype).reshape(rank, *outputs), b.shape)

    def mean_square(a: jax.Array, b: jax.Array, scale: jax.Array | float = scale) -> jax.Array:
        return jnp.mean(jnp.square(term(x, a, b, scale).astype(jnp.float32)))

    z_a = mean_square(a, identity, 1.0) * width / rank
    deltas = [mean_square(da, b0), mean_square(a0, db), mean_square(da, db)]
    return jnp.stack([*deltas, z_a, mean_square(a, b), jnp.ones(())])


@jax.custom_vjp
def inject_gradient(y: jax.Array, tap: jax.Array, found: jax.Array) -> jax.Array:
    """`y`; but the gradient of anything that depends on it, taken for `tap`, is `found`, of the shape of `tap`.

    So numbers leave a model by the one way that every transform keeps open, loops over layers, shared weights and
    recomputation included: the gradient of a parameter, summed over the uses.
    """
    return y


def _tapped_forward(y: jax.Array, tap: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, found


def _tapped_backward(found: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return gradient, found, jnp.zeros_like(found)


inject_gradient.defvjp(_tapped_forward, _tapped_backward)


def scale_variables(specs: Specs, scale: jax.Array | float | Mapping[str, Any]) -> dict[str, Any]:
    """The optional read-only collection `"lora_scale"`, which overrides the scale s of every adapter at apply time.

    `model.apply({"params": base, "lora": lora, "lora_scale": scale_variables(specs, s)}, x)` with a traced `s`
    runs a whole population of scales in one compiled program.

    Args:
      specs: the table from `init_lora`.
      scale: s (alpha / rank, not alpha), a scalar or broadcastable to the stacked layers; or module path to s.
    """
    flat = {}
    for module, spec in specs.items():
        size = dict(zip(spec.base_letters, spec.shape, strict=True))
        shape = tuple(size[c] if c.isupper() else 1 for c in spec.factor_letters[0])
        value = scale[module] if isinstance(scale, Mapping) else scale
        flat[f"{module}/{SCALE}".removeprefix("/")] = jnp.broadcast_to(jnp.asarray(value), shape)
    return unflatten(flat)


def merge(
    base: Mapping[str, Any], lora: Mapping[str, Any], specs: Specs, *, dtype: Any = None
) -> dict[str, Any]:
    """Base variables with every adapter added into its weight; no adapter is needed afterwards.

    The sum is made in float32. `base` itself is left as it was; `unmerge` gives its weights back to the bit.

    Args:
      base: variables without adapters, `{"params": ...}`.
      lora: the tree of adapters, or `{"lora": ...}` with it; what is trained in full belongs into `base`.
      specs: the table from `init_lora` or `load_adapter`.
      dtype: what merged leaves are stored in; by default what each was stored in.

    Raises:
      ValueError: the three do not fit each other; the message names the path.
    """
    if "params" not in base:
        raise ValueError(
            f'the base needs its collection: pass {{"params": ...}}, got the keys {list(base)[:5]}'
        )
    flat = flatten(base)
    factors = flat_factors(lora, specs)
    _check_fit(flat, factors, specs)
    for module, spec in specs.items():
        a, b = (factors[path] for path in spec.factor_paths(module))
        leaf = meta.unbox(flat[spec.leaf])
        merged = leaf + weight_delta(a, b, spec)
        flat[spec.leaf] = rebox(flat[spec.leaf], merged.astype(leaf.dtype if dtype is None else dtype))
    return replace_leaves(base, flat)


def unmerge(merged: Mapping[str, Any], base: Mapping[str, Any], specs: Specs) -> dict[str, Any]:
    """Merged variables with the adapted weights of `base` back in place, to the bit.

    Subtracting s A B would leave rounding behind. All other leaves are those of `merged`, whatever became of them.

    Args:
      merged: from `merge`.
      base: what was merged into, or any part of it that holds the adapted leaves.
      specs: the table that was merged.

    Raises:
      ValueError: an adapted leaf is missing in one of them, or differs in shape.
    """
    flat, kept = flatten(merged), flatten(base)
    for spec in specs.values():
        for name, tree in (("merged", flat), ("base", kept)):
            shape = tuple(meta.unbox(tree[spec.leaf]).shape) if spec.leaf in tree else None
            if shape != spec.shape:
                raise ValueError(f"{spec.leaf} has shape {shape} in {name}, the adapter is for {spec.shape}")
    return replace_leaves(merged, {spec.leaf: kept[spec.leaf] for spec in specs.values()})


def disabled(lora: Any) -> Any:
    """Adapters that do nothing: zeros of the same shapes, which a compiled model takes without compiling again.

    >>> disabled({"fc": {"lora_a": jnp.ones(2)}})["fc"]["lora_a"].tolist()
    [0.0, 0.0]
    """
    return jax.tree.map(jnp.zeros_like, lora)


def rebox(box: Any, value: jax.Array) -> Any:
    """The value in the metadata that the old one had, if any."""
    return box.replace_boxed(value) if isinstance(box, meta.AxisMetadata) else value


def _check_fit(flat: Mapping[str, Any], factors: Mapping[str, Any], specs: Specs) -> None:
    known = {path for module, spec in specs.items() for path in spec.factor_paths(module)}
    if odd := sorted(known ^ factors.keys()):
        raise ValueError(f"the adapters and the specs differ at {', '.join(odd)}")
    for module, spec in specs.items():
        shape = tuple(meta.unbox(flat[spec.leaf]).shape) if spec.leaf in flat else None
        if shape != spec.shape:
            raise ValueError(f"{spec.leaf}: the adapter is for shape {spec.shape}, the base has {shape}")
        shapes = tuple(tuple(factors[path].shape) for path in spec.factor_paths(module))
        if shapes != spec.factor_shapes:
            raise ValueError(f"{module}: factors {shapes} do not fit the specs' {spec.factor_shapes}")
