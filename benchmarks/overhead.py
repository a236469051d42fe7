"""What lambda and optimizers that see A with B cost: against LoRA, beside training every weight.

    python benchmarks/overhead.py

The step of a MiniLM-sized BERT (random weights: values do not matter here), compiled with straight layers so that
XLA counts them all, save solutions and eigendecompositions, which are calls of LAPACK. One process, steps
interleaved; the ratio is the median over rounds of a method's time over LoRA's in the same round.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import interleaved, median_ratio, report

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
from loraplus_jax.models.bert import BertForSequence
from loraplus_jax.models.bert_config import BertConfig
from loraplus_jax.optim.adalora import adalora
from loraplus_jax.optim.invariant import scale_by_lora_muon, scale_by_lora_rite
from loraplus_jax.optim.pairs import scale_by_riemannian
from loraplus_jax.tasks.classification import EncoderTask
from loraplus_jax.tree import count, leaves_by_path

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


def make(method: str, batch: dict, rank: int) -> tuple:
    """The compiled step of a method, its first state and its frozen variables."""
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
    compiled = jit_step(TASK.loss_fn(model), tx).lower(state, frozen, batch).compile()
    return compiled, state, frozen


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    shape = (options.batch, options.tokens)
    batch = {
        "input_ids": jnp.asarray(np.random.default_rng(0).integers(1, MINILM.vocab_size, shape), jnp.int32),
        "attention_mask": jnp.ones(shape, jnp.int32),
        "token_type_ids": jnp.zeros(shape, jnp.int32),
        # Both labels: a batch of one label is soon learned, and gradients too small for normal floats cost time.
        "label": jnp.arange(options.batch, dtype=jnp.int32) % 2,
        "weight": jnp.ones(options.batch),
    }
    made = {
        method: make(method, batch, options.rank)
        for method in ("lora_plus", "lora", *SEEING_PAIRS, "adalora", "full")
    }
    states: dict[str, TrainState] = {method: state for method, (_, state, _) in made.items()}

    def one_step(method: str) -> TrainState:
        states[method], _ = made[method][0](states[method], made[method][2], batch)
        return states[method]

    seconds = interleaved({m: lambda m=m: one_step(m) for m in made}, options.rounds)
    rows = []
    for method, (compiled, _, frozen) in made.items():
        opt_bytes = sum(x.nbytes for x in jax.tree.leaves(states[method].opt_state))
        memory, flops = compiled.memory_analysis(), compiled.cost_analysis()["flops"]
        ideal = ideal_flops(states[method].trainable, frozen, batch, options.rank)
        rows.append(
            {
                "method": method,
                "trainable": f"{count(states[method].trainable):,}",
                "optimizer state, MB": f"{opt_bytes / 1e6:.2f}",
                "GFLOP": f"{flops / 1e9:.4f}",
                "over ideal": "-" if method == "full" else f"{flops / ideal:.4f}",
                "temporaries, MB": f"{memory.temp_size_in_bytes / 1e6:.2f}",
                "step, s": f"{np.median(seconds[method]):.3f}",
                "time / lora": f"{median_ratio(seconds[method], seconds['lora']):.3f}",
            }
        )
    report("overhead", rows, batch=f"{options.batch} x {options.tokens} tokens", rounds=options.rounds)


if __name__ == "__main__":
    main()
