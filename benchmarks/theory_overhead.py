"""What do the theory's terms cost? `train.theory_every: 10` against training without.

    python benchmarks/theory_overhead.py

The step of a MiniLM-sized BERT (random weights: values do not matter here), and the measurement of a quarter of its
batch with all that the run does for it: the copy of the adapters, the program, and the numbers on the host. One
process, the two interleaved; the share is the median over rounds of their times' ratio, over ten.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from common import interleaved, median_ratio, report
from overhead import MINILM, TASK

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
from loraplus_jax.models.bert.model import BertForSequence
from loraplus_jax.step import make_theory
from loraplus_jax.training.theory_metrics import copy_adapters, first_rows, to_metrics

EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    shape = (options.batch, options.tokens)
    batch = {
        "input_ids": jnp.asarray(np.random.default_rng(0).integers(1, MINILM.vocab_size, shape), jnp.int32),
        "attention_mask": jnp.ones(shape, jnp.int32),
        "token_type_ids": jnp.zeros(shape, jnp.int32),
        "label": jnp.zeros(options.batch, jnp.int32),
        "weight": jnp.ones(options.batch),
    }
    plain = BertForSequence(MINILM, TASK.num_outputs, unroll=True, head_dropout=0.0)
    tokens = [batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    config = LoRAPlusConfig(target_modules=("query", "value"), rank=8, modules_to_save=("head",))
    model = apply_lora_plus(plain, config)
    lora, specs = init_lora(model, jax.random.key(1), *tokens)
    variables = {**jax.jit(plain.init)(jax.random.key(0), *tokens), "lora": lora}
    trainable, frozen = split_trainable(variables, config)
    tx = lora_plus_adamw(1e-4, lr_ratio=16.0, specs=specs)
    state = init_state(trainable, tx, jax.random.key(2))
    loss_fn = TASK.loss_fn(model)
    rows = first_rows(batch, make_mesh(1), options.batch)
    step = jit_step(loss_fn, tx).lower(state, frozen, batch).compile()
    measure = jax.jit(make_theory(loss_fn, specs)).lower(trainable, lora, frozen, rows).compile()
    states = [state]

    def one_step() -> jax.Array:
        states[0], metrics = step(states[0], frozen, batch)
        return metrics["loss"]

    def one_measurement() -> dict[str, float]:
        before = copy_adapters(states[0].trainable)
        return to_metrics(measure(states[0].trainable, before, frozen, rows), specs)

    seconds = interleaved({"step": one_step, "theory": one_measurement}, options.rounds)
    flops = {"step": step.cost_analysis()["flops"], "theory": measure.cost_analysis()["flops"]}
    shares = {
        "step": ("-", "-"),
        "theory": (
            f"{flops['theory'] / flops['step'] / EVERY:.2%}",
            f"{median_ratio(seconds['theory'], seconds['step']) / EVERY:.2%}",
        ),
    }
    table = [
        {
            "program": name,
            "GFLOP": f"{flops[name] / 1e9:.3f}",
            "seconds": f"{np.median(seconds[name]):.3f}",
            f"FLOPs at every {EVERY}th step": shares[name][0],
            f"time at every {EVERY}th step": shares[name][1],
        }
        for name in ("step", "theory")
    ]
    report("theory_overhead", table, batch=f"{shape[0]} x {shape[1]} tokens", rounds=options.rounds)


if __name__ == "__main__":
    main()
