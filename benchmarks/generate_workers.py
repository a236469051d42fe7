"""The processes that `generate.py` starts, like those of `step_time_workers.py`. A step generates twice."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_time_workers import TARGETS, Worker, jax_peak, load_factor, load_llama, main


def timed(generate: Callable[[int], list[list[int]]], new_tokens: int) -> Callable[[], dict[str, Any]]:
    """A step: seconds until the first token of each text and until the last, and the texts."""

    def step() -> dict[str, Any]:
        start = time.perf_counter()
        generate(1)
        middle = time.perf_counter()
        texts = generate(new_tokens)
        return {"prefill_s": middle - start, "all_s": time.perf_counter() - middle, "texts": texts}

    return step


def here(job: dict[str, Any]) -> Worker:
    """This package: `make_generate`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
    from loraplus_jax.adapter.tree import flatten, replace_leaves
    from loraplus_jax.models.decoding.generate import Sampling, make_generate

    model, params, ids = load_llama(job)
    config, variables = model.config, {"params": params}
    if job["adapters"]:
        lora_config = LoRAPlusConfig(target_modules=TARGETS, rank=job["rank"], alpha=job["alpha"])
        model = apply_lora_plus(model, lora_config)
        lora, _ = init_lora(
            model, jax.random.key(0), jax.ShapeDtypeStruct(ids.shape, ids.dtype), base=variables
        )
        variables["lora"] = replace_leaves(lora, {path: load_factor(job, path) for path in flatten(lora)})
    programs = {
        n: make_generate(model, config, new_tokens=n, stop=(), dtype=jnp.dtype(job["dtype"]))
        for n in (1, job["new_tokens"])
    }
    keys = jax.random.split(jax.random.key(0), len(ids))

    def generate(new_tokens: int) -> list[list[int]]:
        tokens = programs[new_tokens](variables, ids, jnp.ones_like(ids), Sampling(), keys)
        return np.asarray(tokens).tolist()

    return Worker(timed(generate, job["new_tokens"]), jax_peak, {"device": jax.devices()[0].device_kind})


def transformers(job: dict[str, Any]) -> Worker:
    """transformers' `generate` with PEFT's adapters; compiled, with a static cache, if the job says `compile`."""
    import torch  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file
    from transformers import CompileConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(job["threads"])
    model: Any = LlamaForCausalLM.from_pretrained(job["directory"], dtype=getattr(torch, job["dtype"]))
    if job["adapters"]:
        model = get_peft_model(
            model, LoraConfig(r=job["rank"], lora_alpha=job["alpha"], target_modules=list(TARGETS))
        )
        set_peft_model_state_dict(model, load_file(Path(job["directory"]) / "adapter.safetensors"))
    model.eval()
    ids = torch.tensor(job["ids"])
    # No token ends a text.
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if job["compile"]:
        compiler = CompileConfig(mode="default")
        compiler._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": compiler}

    def generate(new_tokens: int) -> list[list[int]]:
        tokens = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options
        )
        return tokens[:, ids.shape[1] :].tolist()

    return Worker(timed(generate, job["new_tokens"]), lambda: None, {"threads": torch.get_num_threads()})


if __name__ == "__main__":
    main({"here": here, "transformers": transformers})
