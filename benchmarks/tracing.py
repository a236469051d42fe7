"""How long it takes to trace: the adapted model against others, and whether its program is the same.

    python benchmarks/tracing.py

CPU time of `jit(...).trace`, a fresh function each time and no caches, in turns; medians. First the step of a BERT
of MiniLM's size against training every weight of the plain model, then the gradient of a stack of dense layers
against the same stack written with our layers, with both programs' FLOPs.
"""

import argparse
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import optax
from common import report
from overhead import MINILM, TASK

from loraplus_jax import (
    LoRAPlusConfig,
    LoRAPlusDense,
    apply_lora_plus,
    init_lora,
    init_state,
    jit_step,
    lora_plus_adamw,
    split_trainable,
)
from loraplus_jax.models.bert.model import BertForSequence


def make(target: object, unroll: bool, batch: dict) -> Callable[[], float]:
    """A function that traces a fresh step."""
    plain = BertForSequence(MINILM, TASK.num_outputs, unroll=unroll, head_dropout=0.0)
    tokens = [batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    variables = jax.eval_shape(plain.init, jax.random.key(0), *tokens)
    if target is None:
        model, trainable, frozen, tx = plain, variables, {}, optax.adamw(1e-4)
    else:
        config = LoRAPlusConfig(target_modules=target, modules_to_save=("head",))
        model = apply_lora_plus(plain, config)
        lora, specs = init_lora(model, jax.random.key(1), *tokens)
        trainable, frozen = split_trainable({**variables, "lora": lora}, config)
        tx = lora_plus_adamw(1e-4, 4.0, specs=specs)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), trainable)
    state = jax.eval_shape(lambda: init_state(zeros, tx, jax.random.key(0)))

    def trace() -> float:
        jax.clear_caches()
        start = time.process_time()
        jit_step(TASK.loss_fn(model), tx).trace(state, frozen, batch)
        return time.process_time() - start

    return trace


class Stack(nn.Module):
    """A model written with a layer given by name: Flax's or ours."""

    ours: bool
    depth: int = 24

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for n in range(self.depth):
            name = f"layers_{n}"
            x = nn.tanh(LoRAPlusDense(256, name=name)(x) if self.ours else nn.Dense(256, name=name)(x))
        return x


def stack(ours: bool) -> tuple[Callable[[], float], float]:
    """A function that traces the gradient of a stack of layers with adapters, and its compiled FLOPs."""
    model = (
        Stack(True) if ours else apply_lora_plus(Stack(False), LoRAPlusConfig(target_modules="all-linear"))
    )
    x = jax.ShapeDtypeStruct((64, 256), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(lora: dict, params: dict, x: jax.Array) -> jax.Array:
        return model.apply({"params": params, "lora": lora}, x).sum()

    def trace() -> float:
        jax.clear_caches()
        start = time.process_time()
        jax.jit(lambda *args: jax.grad(loss)(*args)).trace(variables["lora"], variables["params"], x)
        return time.process_time() - start

    compiled = jax.jit(jax.grad(loss)).lower(variables["lora"], variables["params"], x).compile()
    return trace, compiled.cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    tokens = np.zeros((8, 48), np.int32)
    batch = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens)
    batch |= {"label": np.zeros(8, np.int32), "weight": np.ones(8, np.float32)}
    rows = []
    for unroll in (False, True):
        targets = {"plain": None, "query, value": ("query", "value"), "all-linear": "all-linear"}
        traces = {name: make(target, unroll, batch) for name, target in targets.items()}
        seconds = {name: [] for name in traces}
        for _ in range(options.rounds):
            for name, trace in traces.items():
                seconds[name].append(trace())
        for name, values in seconds.items():
            ratio = float(np.median(np.divide(values, seconds["plain"])))
            rows.append(
                {
                    "layers": "straight" if unroll else "scanned",
                    "adapted": name,
                    "trace, s": f"{np.median(values):.3f}",
                    "over plain": f"{ratio:.2f}",
                }
            )
    (ours, flops_ours), (adapted, flops_adapted) = stack(True), stack(False)
    pairs = [(ours(), adapted()) for _ in range(options.rounds)]
    report(
        "tracing",
        rows,
        adapted_over_our_layers=round(float(np.median([b / a for a, b in pairs])), 2),
        flops_adapted_over_our_layers=flops_adapted / flops_ours,
    )


if __name__ == "__main__":
    main()
