"""Greedy generation: tokens per second here and in transformers, with the same weights on the same cores.

    python benchmarks/generate.py                     # 2 CPU cores, float32, batch 1 and 8
    python benchmarks/generate.py --cases 1 --rounds 1 --layers 2 --new 8 --name quick

SmolLM2-135M's shape with random weights; adapters (q, k, v, o; rank 8) are not merged, and beside transformers'
weights are PEFT's. A case is a batch size, with `+lora` for adapters, and with `+int8` or `+nf4` for adapters on a
base that here is quantized, and in transformers is not. Both generate one token for each prompt, which is the
prefill, and then all tokens anew, in turns; the decode rate is the tokens after the first over the time after the
prefill. The texts are compared token for token.

Each token of a batch reads all weights once. The limit is what the memory's bandwidth allows: that of NumPy's
product of a matrix of 1 GB and a vector, measured after each case, the best of five.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import ATTENTION, PLANS, median_ratio, parse_options, report, take_turns, timed, use_cpu

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora, save_peft
from loraplus_jax.linen import quantize_base
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.checkpoints.transformers_class import causal_lm_class, path_map
from loraplus_jax.models.decoding.generate import Sampling, make_generate
from loraplus_jax.models.files import open_files
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama, name_table

Generate = Callable[[int], list[list[int]]]
"""The texts of so many new tokens."""


def ours(directory: Path, ids: np.ndarray, tokens: int, variant: str) -> tuple[Generate, int]:
    """This package's `make_generate`, and the bytes of its weights.

    Random adapters go to a directory in it, in PEFT's format.
    """
    config: Any = LlamaConfig.from_hf(open_files(directory).config)
    model, table, prompts = Llama(config), name_table(config), jnp.asarray(ids)
    expected = jax.eval_shape(model.init, jax.random.key(0), prompts)["params"]
    variables = {"params": load_params(open_files(directory), table, expected)}
    if variant:
        lora_config = LoRAPlusConfig(target_modules=ATTENTION, rank=8, alpha=16)
        model = apply_lora_plus(model, lora_config)
        lora, specs = init_lora(model, jax.random.key(1), prompts, base=variables)
        lora = jax.tree.map(lambda x: 0.04 * jax.random.normal(jax.random.key(x.size), x.shape), lora)
        if variant != "lora":
            variables = quantize_base(variables, variant, {".*_proj/kernel": "io"})
        variables = {**variables, "lora": lora}
        save_peft(
            directory / f"{len(ids)}+{variant}",
            lora,
            specs,
            lora_config,
            path_map(table, causal_lm_class(config)),
        )
    programs = {n: make_generate(model, config, new_tokens=n, stop=()) for n in (1, tokens)}
    mask, keys = jnp.ones_like(prompts), jax.random.split(jax.random.key(0), len(ids))
    generate = lambda new: np.asarray(programs[new](variables, prompts, mask, Sampling(), keys)).tolist()  # noqa: E731
    return generate, sum(x.nbytes for x in jax.tree.leaves(variables))


def read_bandwidth() -> float:
    """Bytes a second that all cores read."""
    matrix, vector = np.ones((2**14, 2**14), np.float32), np.ones(2**14, np.float32)
    return matrix.nbytes / min(timed(lambda: matrix @ vector)() for _ in range(5))


def theirs(directory: Path, ids: np.ndarray, variant: str) -> Generate:
    """transformers' `generate`, with PEFT's adapters."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(2)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if variant:
        from peft import PeftModel  # pyright: ignore[reportMissingImports]

        model = PeftModel.from_pretrained(model, directory / f"{len(ids)}+{variant}")
    model.eval()
    prompts = torch.tensor(ids)
    # No token ends a text.
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    return lambda new: model.generate(max_new_tokens=new, **options)[:, ids.shape[1] :].tolist()


def timed_texts(generate: Generate, tokens: int) -> Callable[[], dict[str, Any]]:
    """Seconds until the first token of each text, seconds of all others, and the texts."""

    def run() -> dict[str, Any]:
        prefill = timed(lambda: generate(1))()
        start = time.perf_counter()
        texts = generate(tokens)
        return {"prefill": prefill, "decode": time.perf_counter() - start - prefill, "texts": texts}

    return run


def rows_of(case: str, runs: Mapping[str, list[dict[str, Any]]], limit: float) -> list[dict[str, str]]:
    """The table's lines of one case, from what each round of its runs measured; `limit` is ours, in tokens/s."""
    rows, (batch, _, variant) = [], case.partition("+")
    decode = {name: [one["decode"] for one in rounds] for name, rounds in runs.items()}
    for name, rounds in runs.items():
        texts, others = rounds[-1]["texts"], runs["here"][-1]["texts"]
        rate = len(texts) * (len(texts[0]) - 1) / np.array(decode[name])
        low, high = np.quantile(rate, [0.25, 0.75])
        rows.append(
            {
                "batch": batch,
                "adapters": "unmerged" if variant else "none",
                "run": f"{name}, {variant}" if variant in ("int8", "nf4") and name == "here" else name,
                "tokens/s": f"{np.median(rate):.1f}",
                "quartiles": f"{low:.1f} to {high:.1f}",
                "limit, %": f"{100 * np.median(rate) / limit:.0f}" if name == "here" else "",
                "ours / its": f"{median_ratio(decode[name], decode['here']):.2f}",
                "prefill, s": f"{np.median([one['prefill'] for one in rounds]):.3f}",
                "equal tokens": f"{np.mean(np.equal(texts, others)):.3f}",
            }
        )
    return rows


def main() -> None:
    options = parse_options(
        __doc__,
        cases="1,8,1+lora,8+lora,1+int8,1+nf4",
        prompt=64,
        new=64,
        rounds=7,
        layers=30,
        name="generate",
    )
    use_cpu()
    from transformers import LlamaConfig as Config  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM

    content = open_files(PLANS / "smollm2_135m").config | {"num_hidden_layers": options.layers}
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        LlamaForCausalLM(Config(**content, initializer_range=0.04)).save_pretrained(directory)
        for case in options.cases.split(","):
            batch, _, variant = case.partition("+")
            shape = (int(batch), options.prompt)
            ids = np.random.default_rng(1).integers(0, content["vocab_size"], shape)
            here, size = ours(directory, ids, options.new, variant)
            made = {"here": here, "transformers": theirs(directory, ids, variant)}
            runs = {who: timed_texts(generate, options.new) for who, generate in made.items()}
            measured = take_turns(runs, options.rounds)
            rows += rows_of(case, measured, int(batch) * read_bandwidth() / size)
            report(options.name, rows, settings=vars(options))


if __name__ == "__main__":
    main()
