"""Runs a model whose layers have stacked weights as straight code that reads each layer's weights in place.

XLA's CPU backend has no product that reads a slice: in a loop over layers it first copies each layer's weights out
of the stack, so that every generated token moves them three times; a training step of unrolled layers copies them
too. Arrays on a CPU can share memory, so here each layer gets arrays of its own that are views of the stack. On
other devices, and for sharded variables, the loop stays: it compiles sooner.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal, jaxpr_as_fun

from .equations import run_equation, scan_counts

Layers = tuple[jax.Array, ...]
"""The slices of a stacked array along its first axis; empty for an array that is not unstacked."""


def jit_unstacked(program: Callable[..., Any], layers: int, **options: Any) -> Callable[..., Any]:
    """The jitted `program(variables, layers, *args)` as a function of `variables` and `args`; see `unstack`.

    `options` are those of `jax.jit`.
    """
    jitted = jax.jit(program, **options)

    @functools.wraps(jitted)
    def call(variables: Any, *args: Any) -> Any:
        return jitted(variables, unstack(variables, layers), *args)

    return call


def unstack(variables: Any, layers: int) -> list[Layers]:
    """Views of the leaves of `variables`, in order, along their first axis of size `layers`.

    A leaf that is not stacked, that is traced, or that is not on one CPU device has no views.
    """
    views: list[Layers] = []
    for leaf in jax.tree.leaves(variables):
        views.append(())
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.shape[:1] == (layers,):
            device, *others = leaf.devices()
            if device.platform == "cpu" and not others:
                # Both steps share memory on a CPU where a slice is aligned to 64 bytes; elsewhere each call copies.
                views[-1] = tuple(jax.device_put(view, device) for view in np.asarray(leaf))
    return views


class OnLayers:
    """A compiled program whose second argument, variables, has each layer's arrays instead of stacks."""

    def __init__(self, program: Any, layers: int) -> None:
        """Takes a program whose second argument is like `split_layers` of the variables."""
        self.program, self.layers = program, layers
        self._seen = self._views = None

    def __call__(self, first: Any, variables: Any, *args: Any) -> Any:
        """Calls the program with views of the variables, made anew if these are others than in the last call."""
        if variables is not self._seen:
            self._seen, self._views = variables, split_layers(variables, self.layers)
        return self.program(first, self._views, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)


def split_layers(variables: Any, layers: int) -> Any:
    """The tree with a tuple of each layer's array or shape for every leaf that is stacked; see `unstack`."""
    if not layers:
        return variables
    leaves, structure = jax.tree.flatten(variables)

    def split(leaf: Any, views: Layers) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.shape[:1] == (layers,):
            return layers * (jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),)
        return views or leaf

    return jax.tree.unflatten(structure, map(split, leaves, unstack(variables, layers)))


def join_layers(variables: Any) -> Any:
    """Stacks each layer's arrays again, inside a program, where XLA reads slices of the stack from these arrays."""
    is_split = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda x: jnp.stack(x) if is_split(x) else x, variables, is_leaf=is_split)


def run_unstacked(fn: Callable[..., Any], variables: Any, layers: Sequence[Layers], *args: Any) -> Any:
    """`fn(variables, *args)`; loops over slices of `variables` are straight code on `layers`, made by `unstack`."""
    if not any(layers):
        return fn(variables, *args)
    program, results = jax.make_jaxpr(fn, return_shape=True)(variables, *args)
    jaxpr, inputs = program.jaxpr, jax.tree.leaves((variables, args))
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *inputs), strict=True))
    views = dict(zip(jaxpr.invars, layers, strict=False))  # the variables are the first inputs
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]  # noqa: E731
    for eqn in jaxpr.eqns:
        slices = [() if isinstance(atom, Literal) else views.get(atom, ()) for atom in eqn.invars]
        arrays = [read(atom) for atom in eqn.invars]
        is_forward_loop = eqn.primitive.name == "scan" and not eqn.params["reverse"]
        if is_forward_loop and any(slices[sum(scan_counts(eqn)) :]):
            outputs = _unroll(eqn, arrays, slices)
        else:
            outputs = run_equation(eqn, arrays, jaxpr)
        values |= zip(eqn.outvars, outputs, strict=True)
    return jax.tree.unflatten(jax.tree.structure(results), [read(atom) for atom in jaxpr.outvars])


def _unroll(eqn: Any, inputs: list[Any], slices: list[Layers]) -> list[jax.Array]:
    consts, carried = scan_counts(eqn)
    before, carry, sliced = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]
    body = jax.jit(jaxpr_as_fun(eqn.params["jaxpr"]))  # jit: traced and lowered once for all layers
    stacks = []
    for n in range(eqn.params["length"]):
        own = (
            views[n] if views else x[n] for views, x in zip(slices[consts + carried :], sliced, strict=True)
        )
        results = body(*before, *carry, *own)
        carry = results[:carried]
        stacks.append(results[carried:])
    return [*carry, *map(jnp.stack, zip(*stacks, strict=True))]
