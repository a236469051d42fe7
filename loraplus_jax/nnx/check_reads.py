"""Finds weights that a model uses where their adapter has no effect."""

from typing import Any

import jax
from flax import nnx

from ..interpreter.dataflow import trace_dataflow
from ..quantization.packed_array import dense_shapes
from .adapted_module import OMIT_WEIGHTS, adapters_by_path


def check_reads(model: nnx.Module, *args: Any, method: str = "__call__", **kwargs: Any) -> dict[str, str]:
    """Checks how a model uses its adapted weights in a call.

    An adapter acts in its module's public methods. A model that reads `self.embedder.embedding[...]` itself sees
    the bare weight in training, and the adapted one after `merge`. Nothing is computed.

    Args:
      model: a model with adapters.
      args, kwargs: arguments of the call; arrays may be `jax.ShapeDtypeStruct`.
      method: the model's method to check.

    Returns:
      By path, as in the specs, the operations for which a call adds up W + s A B, as JAX calls them, for
      `describe(merged=...)`. All other adapters cost products by rank.

    Raises:
      ValueError: the model uses an adapted weight outside its module's methods.
    """
    adapters = adapters_by_path(model)
    leaves = {adapted.spec.leaf.removeprefix("params/"): path for path, adapted in adapters.items()}
    is_adapted = lambda path, _: "/".join(map(str, path)) in leaves  # noqa: E731
    graph, weights, rest = nnx.split(model, is_adapted, ...)

    def run(weights: nnx.State, rest: nnx.State, args: Any, kwargs: Any) -> list[jax.Array]:
        module = nnx.merge(graph, weights, rest, copy=True)
        # A zero in place of each weight: one that still reaches an output is read outside its module.
        with OMIT_WEIGHTS(True):
            y = getattr(module, method)(*args, **kwargs)
        state = nnx.state(module, nnx.Not(nnx.Param))
        return [leaf for leaf in jax.tree.leaves((y, state)) if isinstance(leaf, jax.Array)]

    is_array = lambda x: hasattr(x, "shape") and hasattr(x, "dtype")  # noqa: E731
    # The rest too, since an abstract model has shapes there.
    inputs, structure = jax.tree.flatten((rest, args, kwargs))
    arrays = [x for x in inputs if is_array(x)]

    def run_arrays(weights: nnx.State, arrays: list[Any]) -> list[jax.Array]:
        given = iter(arrays)
        return run(
            weights, *jax.tree.unflatten(structure, [next(given) if is_array(x) else x for x in inputs])
        )

    flow = trace_dataflow(jax.make_jaxpr(run_arrays)(dense_shapes(weights), arrays))
    for n, (parts, _) in enumerate(nnx.to_flat_state(weights)):
        if n in flow.read | flow.changed:
            leaf = "/".join(map(str, parts))
            raise ValueError(
                f"{leaves[leaf] or 'the model'!r} has an adapter, but the model also uses its weight {leaf} "
                "outside the module's methods, where the adapter has no effect; call a method of the module there, "
                "or leave it out by exclude_modules"
            )
    paths = ["/".join(map(str, parts)) for parts, _ in nnx.to_flat_state(weights)]
    return {leaves[path]: ", ".join(sorted(flow.whole[n])) for n, path in enumerate(paths) if n in flow.whole}
