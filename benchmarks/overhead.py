"""What do lambda, and optimizers that see A with B, cost against LoRA and beside training every weight?

    python benchmarks/overhead.py

The step of a MiniLM-sized BERT (random weights: values do not matter here), compiled with straight layers so that
XLA counts them all, save solutions and eigendecompositions, which are calls of LAPACK. One process, steps
interleaved; the ratio is the median over rounds of a method's time over LoRA's in the same round. Forward pass,
gradient and optimizer step are also compiled apart; backward is the gradient less the forward pass.

`theory` is what `train.theory_every: 10` adds to LoRA+: the measurement of a quarter of the batch with all that the
run does for it (the copy of the adapters, the program, and the numbers on the host), over ten steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import PLANS, Steps, interleaved, median_ratio, parse_options, report

from loraplus_jax import (
    LoRAPlusConfig,
    apply_lora_plus,
    init_lora,
    init_state,
    jit_step,
    lora_plus_adamw,
    make_mesh,
    split_trainable,
)
from loraplus_jax.adapter.tree import combine, count
from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.bert.model import BertForSequence
from loraplus_jax.models.files import open_files
from loraplus_jax.optim import adalora, scale_by_lora_muon, scale_by_lora_rite, scale_by_riemannian
from loraplus_jax.step import make_theory
from loraplus_jax.tasks.encoder import EncoderTask
from loraplus_jax.training.theory_metrics import copy_adapters, first_rows, to_metrics

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MINILM = BertConfig.from_hf(open_files(PLANS / "minilm").config | NO_DROPOUT)
SEEING_PAIRS = {
    "riemannian": {"precondition": scale_by_riemannian},
    "lora_rite": {"direction": scale_by_lora_rite},
    "lora_muon": {"direction": scale_by_lora_muon},
}
"""What each of these optimizers passes to `lora_plus_adamw`."""
TASK = EncoderTask(kind="classification", names=("no", "yes"))
BATCH, TOKENS, RANK = 32, 48, 8


class Made(NamedTuple):
    """A method: its compiled step, and what it is made of."""

    steps: Steps
    frozen: dict[str, Any]
    loss_fn: Any
    tx: Any
    specs: Any


def random_batch() -> dict[str, jax.Array]:
    """Random tokens; of both labels, as a batch of one is soon learned, and then gradients below float32's normal
    numbers take longer to compute.
    """
    shape = (BATCH, TOKENS)
    ids = np.random.default_rng(0).integers(1, MINILM.vocab_size, shape)
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "attention_mask": jnp.ones(shape, jnp.int32),
        "token_type_ids": jnp.zeros(shape, jnp.int32),
        "label": jnp.arange(BATCH, dtype=jnp.int32) % 2,
        "weight": jnp.ones(BATCH),
    }


def make(method: str, batch: dict, rank: int) -> Made:
    """A method before its first step."""
    model = BertForSequence(MINILM, TASK.num_outputs, unroll=True, head_dropout=0.0)
    tokens = [batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    trainable, frozen, specs = jax.jit(model.init)(jax.random.key(0), *tokens), {}, None
    if method == "full":
        tx = optax.adamw(1e-4)
    else:
        config = LoRAPlusConfig(target_modules=("query", "value"), rank=rank, modules_to_save=("head",))
        model = apply_lora_plus(model, config)
        lora, specs = init_lora(model, jax.random.key(1), *tokens)
        trainable, frozen = split_trainable({**trainable, "lora": lora}, config)
        parts = {name: make(specs=specs) for name, make in SEEING_PAIRS.get(method, {}).items()}
        tx = lora_plus_adamw(1e-4, lr_ratio=16.0 if method == "lora_plus" else 1.0, specs=specs, **parts)
        if method == "adalora":
            steps = {"steps": 1000, "initial_steps": 100, "final_steps": 300, "every": 10}
            tx = adalora(tx, optax.adam(1e-4), target_rank=rank / 2, specs=specs, **steps)
    state, loss_fn = init_state(trainable, tx, jax.random.key(2)), TASK.loss_fn(model)
    compiled = jit_step(loss_fn, tx).lower(state, frozen, batch).compile()
    return Made(Steps(compiled, state, frozen, batch), frozen, loss_fn, tx, specs)


def parts_of(made: Made, batch: dict) -> dict[str, Callable[[], Any]]:
    """The parts of a step as calls."""
    # Copies: the step donates its state.
    state = jax.tree.map(jnp.copy, made.steps.state)

    def loss(trainable: Any, key: jax.Array) -> jax.Array:
        (total, weight), _ = made.loss_fn(combine(trainable, made.frozen), batch, key)
        return total / weight

    def update(grads: Any, opt_state: Any, trainable: Any) -> Any:
        updates, opt_state = made.tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    forward, gradient, optimizer = jax.jit(loss), jax.jit(jax.grad(loss)), jax.jit(update)
    key = jax.random.key(3)
    grads = gradient(state.trainable, key)
    return {
        "forward": lambda: forward(state.trainable, key),
        "gradient": lambda: gradient(state.trainable, key),
        "optimizer": lambda: optimizer(grads, state.opt_state, state.trainable),
    }


def make_measurement(made: Made, batch: dict) -> tuple[Any, Callable[[], Any]]:
    """The compiled program of the theory's terms, and a measurement of LoRA+'s current state."""
    rows, state = first_rows(batch, make_mesh(1), BATCH), made.steps.state
    theory = jax.jit(make_theory(made.loss_fn, made.specs))
    program = theory.lower(state.trainable, copy_adapters(state.trainable), made.frozen, rows).compile()

    def measure() -> dict[str, float]:
        trainable = made.steps.state.trainable
        return to_metrics(program(trainable, copy_adapters(trainable), made.frozen, rows), made.specs)

    return program, measure


def main() -> None:
    options, batch = parse_options(__doc__, rounds=31), random_batch()
    made = {name: make(name, batch, RANK) for name in ("lora", "lora_plus", *SEEING_PAIRS, "adalora", "full")}
    calls = {(name, part): call for name in made for part, call in parts_of(made[name], batch).items()}
    calls |= {(name, "step"): one.steps for name, one in made.items()}
    theory, calls["lora_plus", "theory"] = make_measurement(made["lora_plus"], batch)
    seconds, rows = interleaved(calls, options.rounds), []
    for name, one in made.items():
        program, state = one.steps.step, one.steps.state
        memory = program.memory_analysis()
        backward = np.subtract(seconds[name, "gradient"], seconds[name, "forward"])
        rows.append(
            {
                "method": name,
                "trainable": count(state.trainable),
                "optimizer_bytes": sum(x.nbytes for x in jax.tree.leaves(state.opt_state)),
                "peak_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
                "flops": program.cost_analysis()["flops"],
                "forward": float(np.median(seconds[name, "forward"])),
                "backward": float(np.median(backward)),
                "optimizer": float(np.median(seconds[name, "optimizer"])),
                "step_over_lora": median_ratio(seconds[name, "step"], seconds["lora", "step"]),
                "optimizer_over_lora": median_ratio(seconds[name, "optimizer"], seconds["lora", "optimizer"]),
            }
        )
    plus = next(row["flops"] for row in rows if row["method"] == "lora_plus")
    added = {
        "flops": theory.cost_analysis()["flops"] / plus / 10,
        "time": median_ratio(seconds["lora_plus", "theory"], seconds["lora_plus", "step"]) / 10,
    }
    report("tables/overhead", rows, theory=added, batch=[BATCH, TOKENS], rank=RANK, rounds=options.rounds)


if __name__ == "__main__":
    main()
