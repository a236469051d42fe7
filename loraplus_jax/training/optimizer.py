"""Builds the optimizer from the section `optimizer` of the settings."""

import functools
from typing import Any

import jax
import optax

from ..adapter.spec import Specs
from ..optim.adalora import adalora
from ..optim.lora_muon import scale_by_lora_muon
from ..optim.lora_plus import LoRAPlusTransform, lora_plus_adamw
from ..optim.lora_rite import scale_by_lora_rite
from ..optim.riemannian import scale_by_riemannian
from ..optim.schedules import make_schedule
from ..settings.schema import OptimizerSettings


def make_optimizer(
    settings: OptimizerSettings,
    lr_ratio: float | jax.Array,
    steps: int,
    specs: Specs,
    *,
    learning_rate: jax.Array | None = None,
) -> LoRAPlusTransform:
    """Makes the optimizer with a rate schedule per parameter group.

    `learning_rate` replaces that of the settings; it and `lr_ratio` may be traced arrays.
    """
    schedule = functools.partial(schedule_for, settings, steps)
    embedding, head = settings.embedding_learning_rate, settings.head_learning_rate
    magnitude = settings.magnitude_learning_rate
    rate = schedule(settings.learning_rate if learning_rate is None else learning_rate)
    tx = lora_plus_adamw(
        rate,
        lr_ratio,
        embedding_learning_rate=None if embedding is None else schedule(embedding),
        head_learning_rate=None if head is None else schedule(head),
        magnitude_learning_rate=None if magnitude is None else schedule(magnitude),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        decay=settings.decay,
        max_grad_norm=settings.max_grad_norm,
        precondition=scale_by_riemannian(specs=specs) if settings.name == "riemannian" else None,
        direction=_direction(settings, specs),
        policy=settings.policy,
        specs=specs,
    )
    return tx if settings.target_rank is None else _adalora(settings, tx, rate, steps, specs)


def _adalora(
    settings: OptimizerSettings, tx: LoRAPlusTransform, rate: Any, steps: int, specs: Specs
) -> LoRAPlusTransform:
    """AdaLoRA around an optimizer; its schedule follows from the number of steps."""
    transform = adalora(
        tx,
        optax.adam(rate, settings.b1, settings.b2, settings.eps),
        steps=steps,
        target_rank=settings.target_rank or 0,
        initial_steps=steps // 10,
        final_steps=3 * steps // 10,
        every=10,
        specs=specs,
    )
    assert isinstance(transform, LoRAPlusTransform)
    return transform


def _direction(settings: OptimizerSettings, specs: Specs) -> optax.GradientTransformation | None:
    """What computes the steps in Adam's place, if anything."""
    if settings.name == "lora_rite":
        return scale_by_lora_rite(settings.b1, settings.b2, settings.eps, specs=specs)
    if settings.name == "lora_muon":
        return scale_by_lora_muon(settings.b1, specs=specs)
    return None


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


def check_rates(settings: OptimizerSettings, tx: LoRAPlusTransform, trainable: Any) -> None:
    """Raises ValueError if a learning rate is set for a parameter group that is empty."""
    roles = set(jax.tree.leaves(tx.labels(trainable)))
    for role, name, group in (
        ("extra", "head_learning_rate", "head or other fully trained parameter"),
        ("embedding", "embedding_learning_rate", "embedding adapter"),
        ("magnitude", "magnitude_learning_rate", "magnitude"),
    ):
        if (rate := getattr(settings, name)) is not None and role not in roles:
            raise ValueError(f"optimizer.{name} is {rate:g}, but the model trains no {group}; remove it")
