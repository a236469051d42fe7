"""Which factor moves the features: the terms of a step's change, layer by layer, from real batches.

LoRA+ rests on one condition (arXiv 2402.12354, section 4): what A's step and what B's step change in a layer's
output, delta1 and delta2, should be of the same order, and neither should vanish or explode.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..adapter.spec import AdapterSpec, Specs, reject_magnitude
from ..adapter.taps import PREVIOUS_FACTORS, TAP, TERMS
from ..adapter.tree import combine, flatten, unflatten
from .train_step import LossFn

MeasureFn = Callable[[Any, Any, Any, Any], dict[str, dict[str, jax.Array]]]
"""`measure(trainable, before, frozen, batch) -> {module path: {term: value}}`."""
BALANCED_RATIO = 3.0
"""Within this factor of each other delta1 and delta2 count as of the same order."""
MIN_LR_RATIO = 1.0
"""No lr_ratio below it is suggested: that is LoRA itself."""


def make_theory(loss_fn: LossFn, specs: Specs) -> MeasureFn:
    """What a step did to every adapted layer's output, as a pure function to compile.

    Args:
      loss_fn: as for `make_step`; called with `rng=None`, only for the inputs that reach the layers.
      specs: the table from `init_lora`. Embeddings, whose factors share one rate, and weights adapted by
        `target_parameters`, which have no inputs of their own, are left out.

    Returns:
      `measure(trainable, before, frozen, batch)`, of the trainable variables after a step, the tree of adapters
      before it, the frozen variables, and a batch of a few rows. It gives for every layer the root mean squares,
      over all elements and positions, padding included, of `delta1` (from A's step), `delta2` (from B's), `delta3`
      (from both), `z_a` and `z_b` (see `taps.update_squares`): float32 scalars, or `(layers,)` where layers are
      stacked. NaN where a layer was not run.

    Raises:
      ValueError: nothing that is adapted can be measured, or an adapter is of variant dora, whose magnitudes change
        the outputs too.

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
    reject_magnitude("the theory measurement", specs)
    measured = {path: s for path, s in specs.items() if s.kind not in ("embed", "parameter")}
    if not measured:
        raise ValueError("nothing to measure: embeddings and target_parameters are left out")
    taps = {path: f"{path}/{TAP}".removeprefix("/") for path in measured}

    def measure(trainable: Any, before: Any, frozen: Any, batch: Any) -> dict[str, dict[str, jax.Array]]:
        variables, old = combine(trainable, frozen), flatten(before)
        previous = {
            f"{path}/{name}".removeprefix("/"): old[factor]
            for path, spec in measured.items()
            for name, factor in zip(PREVIOUS_FACTORS, spec.factor_paths(path), strict=True)
        }

        def total(zeros: dict[str, jax.Array]) -> jax.Array:
            # The old factors are leaves next to the tap, so that loops over layers slice them like the new ones.
            lora = combine(variables["lora"], unflatten(previous | zeros))
            return loss_fn({**variables, "lora": lora}, batch, None)[0][0]  # pyright: ignore[reportArgumentType]

        gradients = jax.grad(total)({taps[path]: _zero_tap(spec) for path, spec in measured.items()})
        return {path: _rms_by_term(gradients[taps[path]], spec) for path, spec in measured.items()}

    return measure


def terms_by_layer(found: Mapping[str, Mapping[str, Any]], specs: Specs) -> dict[str, dict[str, float]]:
    """Converts what `measure` found to plain numbers, with one entry a layer, also for stacked ones.

    Left out is what has no features: layers of a stack without an adapter of their own, and what was not run.

    Returns:
      By the layer's path, with a stacked layer's index last, a dict of its terms `delta1`, `delta2`, `delta3`,
      `z_a` and `z_b`.
    """
    result: dict[str, dict[str, float]] = {}
    for path, terms in found.items():
        values = {name: np.asarray(value, np.float64).reshape(-1) for name, value in terms.items()}
        for n, z_a in enumerate(values["z_a"]):
            if z_a > 0:
                layer = f"{path}/{n}" if specs[path].stacked else path
                result[layer] = {name: float(value[n]) for name, value in values.items()}
    return result


@dataclasses.dataclass(frozen=True)
class Balance:
    """Which factor's steps move the layers' outputs less, and the rates that would even them out; `str()` says it.

    Attributes:
      ratio: the geometric mean of delta1 / delta2 over layers, float; None where a factor has not moved any output
        yet.
      learning_rate_factor: what to multiply `learning_rate` by, float; None where it should not change.
      lr_ratio: the suggested ratio, float; None where no change is suggested.
    """

    ratio: float | None
    learning_rate_factor: float | None = None
    lr_ratio: float | None = None

    def __str__(self) -> str:
        if self.ratio is None:
            return "δ1/δ2 unknown: one factor has not moved any output yet"
        share = f"δ1/δ2 = {self.ratio:.2g}"
        if 1 / BALANCED_RATIO <= self.ratio <= BALANCED_RATIO:
            return f"{share}: A and B are balanced"
        finding = f"{share}: {'A' if self.ratio < 1 else 'B'} is under-updated"
        if self.lr_ratio is None:
            return f"{finding}; no lr_ratio below {MIN_LR_RATIO:g} is suggested"

        def short(value: float) -> str:  # two digits, without an exponent where there are few
            return f"{float(f'{value:.2g}'):g}"

        factor = self.learning_rate_factor
        rate = "" if factor is None else f"learning_rate x {short(factor)} and "
        return f"{finding}. To balance, use {rate}lr_ratio {short(self.lr_ratio)}"


def balance(layers: Mapping[str, Mapping[str, float]], lr_ratio: float, init: str | None) -> Balance:
    """Compares A's and B's steps, and suggests which rate to change.

    With Adam delta1 is proportional to eta_A and B's size, delta2 to eta_B and A's. A factor that starts at zero
    grows with its own rate and the number of steps, so its rate is in both terms: delta1 / delta2 follows
    eta_A * steps where B was zero, 1 / (eta_B * steps) where A was. The rate to change is that of the other factor.
    This holds to first order, and the ratio of a short run is an early one.

    Args:
      layers: from `terms_by_layer`.
      lr_ratio: lambda of the run.
      init: of the run's factors (`LoRAPlusConfig.init`); None if it started from an adapter, neither factor zero.

    Returns:
      A `Balance`. It suggests no change if the ratio is unknown or within `BALANCED_RATIO`, or below 1 while
      `lr_ratio` is at most `MIN_LR_RATIO`.

    >>> print(balance({"q": {"delta1": 0.9, "delta2": 0.1}}, 4.0, "lora_b"))
    δ1/δ2 = 9: B is under-updated. To balance, use lr_ratio 36
    >>> print(balance({"q": {"delta1": 0.25, "delta2": 1.0}}, 4.0, "lora"))
    δ1/δ2 = 0.25: A is under-updated. To balance, use learning_rate x 4 and lr_ratio 1
    """
    ratios = [v["delta1"] / v["delta2"] for v in layers.values() if v["delta1"] > 0 and v["delta2"] > 0]
    if not ratios:
        return Balance(None)
    ratio = math.exp(sum(map(math.log, ratios)) / len(ratios))
    is_balanced = 1 / BALANCED_RATIO <= ratio <= BALANCED_RATIO
    if is_balanced or (ratio < 1 and lr_ratio <= MIN_LR_RATIO):
        return Balance(ratio)
    suggested = max(MIN_LR_RATIO, lr_ratio * ratio)
    # B's rate stays; with A zero at the start A's does.
    return Balance(ratio, None if init == "lora_b" else lr_ratio / suggested, suggested)


def _zero_tap(spec: AdapterSpec) -> jax.Array:
    # As many axes as A, since nn.scan and nn.vmap split a tap along the axes on which they stack A; the terms stand
    # along the rank's axis.
    shape = [*spec.scale_shape]
    shape[spec.factor_letters[0].index("r")] = len(TERMS) + 1
    return jnp.zeros(shape, jnp.float32)


def _rms_by_term(gradient: jax.Array, spec: AdapterSpec) -> dict[str, jax.Array]:
    # The last number is how often the layer was called: JAX sums a tap's gradient over the calls.
    sums = jnp.moveaxis(gradient, spec.factor_letters[0].index("r"), 0).reshape(len(TERMS) + 1, -1)
    roots = jnp.sqrt(sums[:-1] / sums[-1:])
    return dict(zip(TERMS, roots if spec.stacked else roots[:, 0], strict=True))
