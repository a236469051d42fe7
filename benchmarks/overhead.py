"""What lambda and optimizers that see A with B cost: against LoRA, beside training every weight.

    python benchmarks/tables.py overhead

The step of a MiniLM-sized BERT (random weights: values do not matter here), compiled with straight layers so that
XLA counts them all, save solutions and eigendecompositions, which are calls of LAPACK. One process, steps
interleaved; the ratio is the median over rounds of a method's time over LoRA's in the same round. Forward pass,
gradient and optimizer step are also compiled apart; backward is the gradient less the forward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import interleaved, median_ratio

from loraplus_jax import (
    LoRAPlusConfig,
    TrainState,
    apply_lora_plus,
    init_lora,
    init_state,
    jit_step,
    lora_plus_adamw,
    split_trainable,
)
from loraplus_jax.adapter.tree import combine, count, leaves_by_path
from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.bert.model import BertForSequence
from loraplus_jax.optim import adalora, scale_by_lora_muon, scale_by_lora_rite, scale_by_riemannian
from loraplus_jax.tasks.classification import EncoderTask

MINILM = BertConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
    type_vocab_size=2,
    pad_token_id=0,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
SEEING_PAIRS = {
    "riemannian": {"precondition": scale_by_riemannian},
    "lora_rite": {"direction": scale_by_lora_rite},
    "lora_muon": {"direction": scale_by_lora_muon},
}
"""What each of these optimizers passes to `lora_plus_adamw`."""
TASK = EncoderTask(kind="classification", names=("no", "yes"))
ROUNDS, BATCH, TOKENS, RANK = 31, 32, 48, 8
PARTS = ("forward", "gradient", "optimizer")


class Made(NamedTuple):
    """A method: the compiled step, its first state, its frozen variables, and calls of the step's parts."""

    step: Any
    state: TrainState
    frozen: dict[str, Any]
    parts: dict[str, Callable[[], Any]]


def make(method: str, batch: dict, rank: int) -> Made:
    """A method with its first state."""
    plain = BertForSequence(MINILM, TASK.num_outputs, unroll=True, head_dropout=0.0)
    tokens = [batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    variables = jax.jit(plain.init)(jax.random.key(0), *tokens)
    if method == "full":
        model, trainable, frozen = plain, variables, {}
        tx = optax.adamw(1e-4)
    else:
        config = LoRAPlusConfig(target_modules=("query", "value"), rank=rank, modules_to_save=("head",))
        model = apply_lora_plus(plain, config)
        lora, specs = init_lora(model, jax.random.key(1), *tokens)
        trainable, frozen = split_trainable({**variables, "lora": lora}, config)
        parts = {name: make(specs=specs) for name, make in SEEING_PAIRS.get(method, {}).items()}
        tx = lora_plus_adamw(1e-4, lr_ratio=16.0 if method == "lora_plus" else 1.0, specs=specs, **parts)
        if method == "adalora":
            steps = {"steps": 1000, "initial_steps": 100, "final_steps": 300, "every": 10}
            tx = adalora(tx, optax.adam(1e-4), target_rank=rank / 2, specs=specs, **steps)
    state = init_state(trainable, tx, jax.random.key(2))
    loss_fn = TASK.loss_fn(model)
    compiled = jit_step(loss_fn, tx).lower(state, frozen, batch).compile()

    def loss(trainable: Any, key: jax.Array | None) -> jax.Array:
        (total, weight), _ = loss_fn(combine(trainable, frozen), batch, key)  # pyright: ignore[reportArgumentType]
        return total / weight

    # Copies: the step donates its state.
    own = jax.tree.map(jnp.copy, (state.trainable, state.opt_state))
    forward, gradient = jax.jit(loss), jax.jit(jax.grad(loss))
    key = jax.random.key(3)
    grads = gradient(own[0], key)

    def update(grads: Any, opt_state: Any, trainable: Any) -> Any:
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    optimizer = jax.jit(update)
    parts = (
        lambda: forward(own[0], key),
        lambda: gradient(own[0], key),
        lambda: optimizer(grads, own[1], own[0]),
    )
    return Made(compiled, state, frozen, dict(zip(PARTS, parts, strict=True)))


def ideal_flops(trainable: dict, frozen: dict, batch: dict, rank: int) -> float:
    """4 N T for frozen matrices (forward, and backward to the input), attention, adapters and head.

    A multiplication and an addition count as two.
    """
    size, length = batch["input_ids"].shape
    tokens, width, layers = size * length, MINILM.hidden_size, MINILM.num_hidden_layers
    kernels = [leaf.size for path, leaf in leaves_by_path(frozen).items() if path.endswith("kernel")]
    dense = 4 * sum(kernels) * tokens
    attention = layers * 3 * 4 * size * length**2 * width
    adapters = layers * 2 * 6 * tokens * rank * 2 * width
    head = 6 * size * width * TASK.num_outputs
    return dense + attention + adapters + head


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """Times and counts of every method; seconds are medians over the rounds."""
    shape = (BATCH, TOKENS)
    batch = {
        "input_ids": jnp.asarray(np.random.default_rng(0).integers(1, MINILM.vocab_size, shape), jnp.int32),
        "attention_mask": jnp.ones(shape, jnp.int32),
        "token_type_ids": jnp.zeros(shape, jnp.int32),
        # Both labels: a batch of one label is soon learned, and gradients too small for normal floats cost time.
        "label": jnp.arange(BATCH, dtype=jnp.int32) % 2,
        "weight": jnp.ones(BATCH),
    }
    made = {name: make(name, batch, RANK) for name in ("lora", "lora_plus", *SEEING_PAIRS, "adalora", "full")}
    states = {name: one.state for name, one in made.items()}

    def one_step(method: str) -> TrainState:
        states[method], _ = made[method].step(states[method], made[method].frozen, batch)
        return states[method]

    steps = {(name, "step"): lambda name=name: one_step(name) for name in made}
    parts = {(name, part): call for name in made for part, call in made[name].parts.items()}
    seconds = interleaved(steps | parts, rounds)
    rows = []
    for name, one in made.items():
        opt_bytes = sum(x.nbytes for x in jax.tree.leaves(states[name].opt_state))
        memory, flops = one.step.memory_analysis(), one.step.cost_analysis()["flops"]
        backward = np.subtract(seconds[name, "gradient"], seconds[name, "forward"])
        rows.append(
            {
                "method": name,
                "trainable": count(states[name].trainable),
                "optimizer_bytes": opt_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                "peak_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
                "flops": flops,
                "over_ideal": None
                if name == "full"
                else flops / ideal_flops(states[name].trainable, one.frozen, batch, RANK),
                "forward": float(np.median(seconds[name, "forward"])),
                "backward": float(np.median(backward)),
                "optimizer": float(np.median(seconds[name, "optimizer"])),
                "step": float(np.median(seconds[name, "step"])),
                "step_over_lora": median_ratio(seconds[name, "step"], seconds["lora", "step"]),
                "optimizer_over_lora": median_ratio(seconds[name, "optimizer"], seconds["lora", "optimizer"]),
            }
        )
    return {"rows": rows, "batch": [BATCH, TOKENS], "rank": RANK, "rounds": rounds}
