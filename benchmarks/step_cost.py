"""What changes the cost of a LoRA+ step: depth, length, rank, DoRA, a quantized base, the kind of attention.

    python benchmarks/step_cost.py                                     # 2 CPU cores, float32
    python benchmarks/step_cost.py --tiny --rounds 1 --name quick      # a quick look, in a file of its own

A Llama of SmolLM2-135M's shape with random weights, adapters on q, k, v and o, full rows of random tokens. One
thing is varied at a time, and its cases take turns in this process. Measured is the CPU time of all threads, which
other programs on the machine hardly change; a ratio is the median over rounds of a case's time over that of its
group's first. Depth, length and rank are varied on a few layers and a small vocabulary, so that the layers are what
is measured; the rest on the whole model. Temporaries are the compiler's. With a quantized base, the weights of all
products of the layers are quantized; the tied embedding is not.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from common import ATTENTION, PLANS, Steps, median_ratio, parse_options, report, take_turns, timed, use_cpu

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, init_state, jit_step, lora_plus_adamw
from loraplus_jax.linen import quantize_base
from loraplus_jax.models.files import open_files
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama
from loraplus_jax.tasks.causal_lm import LanguageTask


class Case(NamedTuple):
    """A step of the whole model, 8 x 64 tokens."""

    layers: int = 30
    vocabulary: int = 49152
    batch: int = 8
    tokens: int = 64
    rank: int = 8
    variant: str = "lora"
    base: str = "float32"
    attention: str = "blocked"


SMALL = Case(layers=4, vocabulary=4096, batch=4, tokens=128)
VARIED: dict[str, tuple[Case, tuple[Any, ...]]] = {
    "layers": (SMALL, (2, 4, 8)),
    "tokens": (SMALL, (64, 128, 256, 512)),
    "rank": (SMALL, (1, 8, 32, 128)),
    "variant": (Case(), ("lora", "dora")),
    "base": (Case(), ("float32", "nf4", "int8")),
    "attention": (Case(), ("xla", "blocked")),
}


def make(case: Case) -> tuple[Callable[[], Any], dict[str, str]]:
    """A call that does a step of a case on random weights and tokens; bytes of the base and of temporaries."""
    sizes = {"num_hidden_layers": case.layers, "vocab_size": case.vocabulary}
    config: Any = LlamaConfig.from_hf(open_files(PLANS / "smollm2_135m").config | sizes)
    net = Llama(config, remat="dots", attention=case.attention)  # type: ignore[arg-type]
    lora_config = LoRAPlusConfig(target_modules=ATTENTION, rank=case.rank, alpha=16, variant=case.variant)  # type: ignore[arg-type]
    ids = jax.random.randint(jax.random.key(1), (case.batch, case.tokens), 0, case.vocabulary)
    base = {"params": jax.jit(net.init)(jax.random.key(0), ids)["params"]}
    model = apply_lora_plus(net, lora_config)
    lora, specs = init_lora(model, jax.random.key(2), ids, base=base)
    if case.base != "float32":
        base = quantize_base(base, case.base, {".*_proj/kernel": "io"})  # type: ignore[arg-type]
    ones = np.ones((case.batch, case.tokens))
    batch = {"input_ids": ids, "segment_ids": ones.astype(np.int32), "loss_mask": ones.astype(np.float32)}
    batch["weight"] = np.ones(case.batch, np.float32)
    tx = lora_plus_adamw(5e-4, lr_ratio=4.0, specs=specs)
    # Logits of 128 tokens stay in a core's cache.
    loss = LanguageTask(kind="instruction").loss_fn(model, chunk=128)
    state = init_state({"lora": lora}, tx, jax.random.key(3))
    program: Any = jit_step(loss, tx).lower(state, base, batch).compile()
    weights, memory = sum(x.nbytes for x in jax.tree.leaves(base)), program.memory_analysis()
    sizes = {"base": weights, "temporaries": memory.temp_size_in_bytes}
    sizes = {f"{name}, MB": f"{size / 1e6:.0f}" for name, size in sizes.items()}
    return Steps(program, state, base, batch), sizes


def main() -> None:
    options = parse_options(__doc__, rounds=7, tiny=False, name="step_cost")
    use_cpu()
    rows: list[dict[str, Any]] = []
    for varied, (first, values) in VARIED.items():
        if options.tiny:
            first = first._replace(layers=2, vocabulary=256, batch=1, tokens=64)
        made = {value: make(first._replace(**{varied: value})) for value in values}
        runs = {value: timed(step, time.process_time) for value, (step, _) in made.items()}
        seconds = take_turns(runs, options.rounds)
        for value, (_, sizes) in made.items():
            times = {
                "CPU time of a step, s": f"{np.median(seconds[value]):.3f}",
                "CPU time / the first's": f"{median_ratio(seconds[value], seconds[values[0]]):.2f}",
            }
            rows.append({"varied": varied, "value": value, **times, **sizes})
    report(options.name, rows, rounds=options.rounds)


if __name__ == "__main__":
    main()
