"""Builds the optimizer from the section `optimizer` of the settings."""

import functools
from typing import Any

import jax
import optax

from ..adapter.spec import Specs
from ..optim.adalora import adalora
from ..optim.lora_muon import scale_by_lora_muon
from ..optim.lora_plus import PEFT_EMBEDDING_RATE, lora_plus_adamw
from ..optim.lora_rite import scale_by_lora_rite
from ..optim.riemannian import scale_by_riemannian
from ..optim.roles import label_params
from ..optim.schedules import make_schedule
from ..settings.schema import OptimizerSettings

GROUP_RATES = {
    "head_learning_rate": ("extra", "head or other fully trained parameter"),
    "embedding_learning_rate": ("embedding", "embedding adapter"),
    "magnitude_learning_rate": ("magnitude", "magnitude"),
}
"""Settings that replace the rate of a role, with the role and what it is called in an error."""


def make_optimizer(
    settings: OptimizerSettings,
    lr_ratio: float | jax.Array,
    steps: int,
    specs: Specs,
    *,
    learning_rate: jax.Array | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Makes the optimizer with a rate schedule per parameter group.

    `learning_rate` replaces that of the settings; it and `lr_ratio` may be traced arrays. `seed`
    draws AdaLoRA's initial values.
    """
    schedule = functools.partial(schedule_for, settings, steps)
    rate = schedule(settings.learning_rate if learning_rate is None else learning_rate)
    peaks = {name: getattr(settings, name) for name in GROUP_RATES}
    if settings.policy == "peft" and settings.embedding_learning_rate is None:
        peaks["embedding_learning_rate"] = PEFT_EMBEDDING_RATE  # here, so that it has the schedule too
    rates: dict[str, Any] = {name: None if peak is None else schedule(peak) for name, peak in peaks.items()}
    precondition = direction = None
    if settings.name == "riemannian":
        precondition = scale_by_riemannian(settings.reg, specs=specs)
    elif settings.name == "lora_rite":
        direction = scale_by_lora_rite(settings.b1, settings.b2, settings.eps, specs=specs)
    elif settings.name == "lora_muon":
        direction = scale_by_lora_muon(settings.b1, specs=specs)
    tx = lora_plus_adamw(
        rate,
        lr_ratio,
        **rates,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        decay=settings.decay,
        max_grad_norm=settings.max_grad_norm,
        precondition=precondition,
        direction=direction,
        policy=settings.policy,
        specs=specs,
    )
    if settings.target_rank is None:
        return tx
    return adalora(
        tx,
        optax.adam(rate, settings.b1, settings.b2, settings.eps),
        steps=steps,
        target_rank=settings.target_rank,
        initial_steps=steps // 10,
        final_steps=3 * steps // 10,
        every=10,
        seed=seed,
        specs=specs,
    )


def schedule_for(settings: OptimizerSettings, steps: int, peak: float | jax.Array) -> optax.Schedule:
    """Makes the learning rate schedule of the settings with a peak rate."""
    return make_schedule(
        settings.schedule,
        peak,
        steps,
        warmup_steps=settings.warmup_steps,
        final_fraction=settings.final_fraction,
        decay_steps=settings.decay_steps,
    )


def check_rates(settings: OptimizerSettings, trainable: Any) -> None:
    """Raises ValueError if a learning rate is set for a parameter group that is empty."""
    roles = set(jax.tree.leaves(label_params(trainable, policy=settings.policy)))
    for name, (role, group) in GROUP_RATES.items():
        if (rate := getattr(settings, name)) is not None and role not in roles:
            raise ValueError(f"optimizer.{name} is {rate:g}, but the model trains no {group}; remove it")
