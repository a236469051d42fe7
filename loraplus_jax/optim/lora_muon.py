"""LoRA-Muon: a step of A and B that makes the largest change of the weight with bounded singular values."""

import jax
import jax.numpy as jnp
import optax

from .._utils.validation import check_number
from ..adapter.spec import Specs
from .pair_state import corrected_average, inverse_root, transform_pairs


def scale_by_lora_muon(b1: float = 0.95, *, specs: Specs | None = None) -> optax.GradientTransformation:
    """LoRA-Muon's direction for pairs (arXiv 2606.12921), and Adam's for other leaves.

    ½ R msign(R m), where m is the momentum of a factor's gradients and msign sets all singular values to 1: the
    steepest descent of A B in the spectral norm, one half of it by each factor. Keeps one factor's size a factor.

    Args:
      b1: decay of the momentum.
      specs: the table from `init_lora`, as for `scale_by_riemannian`.

    Returns:
      An `optax.GradientTransformation` with the state `PairState`. It applies no learning rate, and its `update`
      requires `params`.

    Raises:
      ValueError: as `scale_by_lora_rite`.
    """
    check_number("b1", b1, at_least=0, below=1)

    def update(
        grad: jax.Array, other: jax.Array, old: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        root, moment = inverse_root(other @ other.mT), corrected_average(old, grad, b1, count)
        step = root @ moment
        return root @ (inverse_root(step @ step.mT) @ step) / 2, moment

    return transform_pairs(lambda own, _: jnp.zeros_like(own), update, optax.scale_by_adam(b1), specs)


def lora_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.95,
    weight_decay: float = 0.0,
    *,
    specs: Specs | None = None,
) -> optax.GradientTransformation:
    """The optimizer LoRA-Muon: `scale_by_lora_muon` with one rate of A and B, and decay.

    To first order the rate is the spectral norm of a step of A B. Each parameter decays by the rate times
    `weight_decay`, so A B by twice that. `b1` decays the momentum; `specs` as for `scale_by_lora_muon`.

    Returns:
      An `optax.GradientTransformation`, whose `update` requires `params`.
    """
    return optax.chain(
        scale_by_lora_muon(b1, specs=specs),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
