"""Which factor moves the features: the terms of a step's change, layer by layer, from real batches.

LoRA+ rests on one condition (arXiv 2402.12354, section 4): what A's step and what B's step change in a layer's
output, delta1 and delta2, should be of the same order, and neither should vanish or explode.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .lora import PREVIOUS_FACTORS, TAP, TERMS
from .spec import AdapterSpec, Specs
from .train_step import LossFn
from .tree import combine, flatten, unflatten

MeasureFn = Callable[[Any, Any, Any, Any], dict[str, dict[str, jax.Array]]]
"""`measure(trainable, before, frozen, batch) -> {module path: {term: value}}`."""
BALANCED_RATIO = 3.0
"""Within this factor of each other delta1 and delta2 count as of the same order."""
CAVEAT = "arXiv 2402.12354 asks for the same order; whether the loss gains by it, only a run can tell"
MIN_LR_RATIO = 1.0
"""No lr_ratio below it is advised: that is LoRA itself."""
SHARE_TREND = {
    "B": "with B zero at the start the share follows A's rate and rises with the steps: "
    "a short run's is an early one",
    "A": "with A zero at the start the share follows B's rate and falls with the steps: "
    "a short run's is an early one",
    None: "with neither factor zero at the start the share follows lr_ratio and the factors' sizes",
}
"""How the share goes with the rates and the steps, by the factor that is zero at the start."""


def make_theory(loss_fn: LossFn, specs: Specs) -> MeasureFn:
    """What a step did to every adapted layer's output, as a pure function to be compiled.

    Args:
      loss_fn: as for `make_step`; called with `rng=None`, and only for the inputs that reach the layers. Nothing of
        its value or gradient is used.
      specs: the table from `init_lora`. Embeddings, whose factors share one rate, and weights adapted by
        `target_parameters`, which have no inputs of their own, are left out.

    Returns:
      `measure(trainable, before, frozen, batch)` takes the trainable variables after a step, the tree of adapters
      (the collection `"lora"`) before it, the frozen variables, and a batch: a few of its rows will do. It gives
      for every layer the root mean squares, over all elements and positions, padding included, of `delta1` (from
      A's step), `delta2` (from B's), `delta3` (from both), `z_a` and `z_b` (see `lora.update_squares`): float32
      scalars, or `(layers,)` where layers are stacked. NaN where a layer was not run.

    Raises:
      ValueError: nothing that is adapted can be measured.

    Example:
      >>> import flax.linen as nn
      >>> from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
      >>> model = apply_lora_plus(nn.Dense(1), LoRAPlusConfig(target_modules=".*", rank=1, alpha=1.0))
      >>> x, one = jnp.array([[2.0]]), jnp.ones((1, 1))
      >>> _, specs = init_lora(model, jax.random.key(0), x)
      >>> measure = make_theory(lambda v, x, rng: ((jnp.sum(model.apply(v, x)), 1.0), {}), specs)
      >>> base = {"params": {"kernel": one, "bias": jnp.zeros(1)}}
      >>> found = measure({"lora": {"lora_a": 3 * one, "lora_b": 4 * one}}, {"lora_a": one, "lora_b": one}, base, x)
      >>> {name: float(value) for name, value in found[""].items()}
      {'delta1': 4.0, 'delta2': 6.0, 'delta3': 12.0, 'z_a': 6.0, 'z_b': 24.0}
    """
    measured = {path: s for path, s in specs.items() if s.kind not in ("embed", "parameter")}
    if not measured:
        raise ValueError(
            "no layer that is adapted can be measured: embeddings and target_parameters are left out, and the "
            f"specs hold {', '.join(specs) or 'nothing'}"
        )
    taps = {path: f"{path}/{TAP}".removeprefix("/") for path in measured}

    def measure(trainable: Any, before: Any, frozen: Any, batch: Any) -> dict[str, dict[str, jax.Array]]:
        variables, old = combine(trainable, frozen), flatten(before)
        previous = {
            f"{path}/{name}".removeprefix("/"): old[factor]
            for path, spec in measured.items()
            for name, factor in zip(PREVIOUS_FACTORS, spec.factor_paths(path), strict=True)
        }

        def total(zeros: dict[str, jax.Array]) -> jax.Array:
            lora = combine(variables["lora"], unflatten(previous | zeros))
            return loss_fn({**variables, "lora": lora}, batch, None)[0][0]  # pyright: ignore[reportArgumentType]

        gradients = jax.grad(total)({taps[path]: _zero_tap(spec) for path, spec in measured.items()})
        return {path: _rms_by_term(gradients[taps[path]], spec) for path, spec in measured.items()}

    return measure


def terms_by_layer(found: Mapping[str, Mapping[str, Any]], specs: Specs) -> dict[str, dict[str, float]]:
    """What `measure` found as plain numbers, one entry a layer: stacked layers apart, their index last in the path.

    Left out is what has no features: layers of a stack without an adapter of their own, and what was not run.
    """
    result: dict[str, dict[str, float]] = {}
    for path, terms in found.items():
        values = {name: np.asarray(value, np.float64).reshape(-1) for name, value in terms.items()}
        for n, z_a in enumerate(values["z_a"]):
            if z_a > 0:
                layer = f"{path}/{n}" if specs[path].stacked else path
                result[layer] = {name: float(value[n]) for name, value in values.items()}
    return result


def reading(layers: Mapping[str, Mapping[str, float]], lr_ratio: float, init: str | None) -> str:
    """One line on which factor moves the output less, and which rate to move; it states its basis.

    With Adam delta1 goes with eta_A and B's size, delta2 with eta_B and A's. A factor that starts at zero grows
    with its own rate and with the steps. So its rate is in both, and delta1 / delta2 goes with eta_A * steps where
    B was zero, with 1 / (eta_B * steps) where A was: the rate to move is that of the other factor, which was drawn.
    That is to first order: once that factor has outgrown its first values too, the share hardly moves any more, so
    the factor that is named is the one that would even the two out if it went on as it began.

    Args:
      layers: from `terms_by_layer`.
      lr_ratio: lambda of the run.
      init: of the run's factors (`LoRAPlusConfig.init`); None if it started from an adapter, neither factor zero.

    >>> print(reading({"q": {"delta1": 0.9, "delta2": 0.1}}, 4.0, "lora_b").partition(": ")[2].partition(" (")[0])
    B starves; lr_ratio 4 -> 36, which keeps A's rate, would bring them closer
    """
    ratios = [v["delta1"] / v["delta2"] for v in layers.values() if v["delta1"] > 0 and v["delta2"] > 0]
    if not ratios:
        return "one of the factors has not moved any layer's output yet: nothing can be said of the rates"
    share = math.exp(sum(map(math.log, ratios)) / len(ratios))
    zero = None if init is None else "A" if init == "lora_b" else "B"
    conclusion = "of the same order, no reason in this to change a rate"
    if not 1 / BALANCED_RATIO <= share <= BALANCED_RATIO:
        conclusion = f"{'A' if share < 1 else 'B'} starves; {_advice(share, lr_ratio, zero)}"
    return f"A moves the output {share:.2g} x as much as B: {conclusion} ({SHARE_TREND[zero]}; {CAVEAT})"


def _advice(share: float, lr_ratio: float, zero: str | None) -> str:
    """Which rate to move how far, the other kept: A's, unless A started at zero."""
    if share < 1 and lr_ratio <= MIN_LR_RATIO:
        return "no lr_ratio below 1 is advised"
    even = lr_ratio * share
    ratio = max(MIN_LR_RATIO, even)
    move = f"lr_ratio {lr_ratio:g} -> {_short(ratio)}"
    if zero == "A":
        move = f"{move}, which keeps A's rate,"
    else:
        move = f"learning_rate x {_short(lr_ratio / ratio)} with {move}, which keeps B's rate,"
    floor = "" if ratio == even else "; no lr_ratio below 1 is advised"
    return f"{move} would bring them closer{floor}"


def _short(value: float) -> str:
    """Two digits, without an exponent where there are few.

    >>> _short(144.4), _short(0.126), _short(1.0)
    ('140', '0.13', '1')
    """
    return f"{float(f'{value:.2g}'):g}"


def _zero_tap(spec: AdapterSpec) -> jax.Array:
    """A tap: as many axes as A, so that stacked axes find their places; the terms stand along the rank's."""
    size = dict(zip(spec.base_letters, spec.shape, strict=True)) | {"r": len(TERMS) + 1}
    return jnp.zeros([size[c] if c.isupper() or c == "r" else 1 for c in spec.factor_letters[0]], jnp.float32)


def _rms_by_term(gradient: jax.Array, spec: AdapterSpec) -> dict[str, jax.Array]:
    """Root mean squares by term, from the sums over the calls of a layer."""
    letters = spec.factor_letters[0]
    stacked = [n for n, c in enumerate(letters) if c.isupper()]
    sums = jnp.moveaxis(gradient, letters.index("r"), 0).reshape(
        len(TERMS) + 1, *(gradient.shape[n] for n in stacked)
    )
    roots = jnp.sqrt(sums[:-1] / sums[-1:])
    return {name: root.reshape(-1) if stacked else root for name, root in zip(TERMS, roots, strict=True)}
