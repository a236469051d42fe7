"""The processes that benchmarks start: one implementation each, a step whenever a line asks for it.

The first line on stdin is the job, as JSON; it and each further line are answered by a line of JSON on stdout, and
all that libraries print goes to stderr. Every worker imports what it needs and no more: imports count to the memory
of its process and to the time to its first step.
"""

import functools
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "qwix", "google-tunix", "torch", "transformers", "peft")


class Worker(NamedTuple):
    """What a worker is made of.

    Attributes:
      step: does one step to its end and returns what to report of it, such as the loss before it.
      about: what else to report, once.
      device_memory: the peak in bytes on the accelerator, None on a CPU.
    """

    step: Callable[[], dict[str, Any]]
    about: dict[str, Any]
    device_memory: Callable[[], int | None] = lambda: None


# Training steps.


def here(job: dict[str, Any]) -> Worker:
    """This package: `apply_lora_plus`, `lora_plus_adamw`, `jit_step`."""
    import jax

    from loraplus_jax import init_state, jit_step, lora_plus_adamw

    model, variables, specs, batch = adapted(job)

    def loss_fn(variables: Any, ids: jax.Array, rng: jax.Array) -> tuple:
        hidden = model.apply(variables, ids, method="hidden")
        return _loss_sum(job, hidden, variables["params"], ids), {}

    # PEFT's optimizer gives magnitudes B's rate.
    rates = {"lr_ratio": job["lr_ratio"], "magnitude_learning_rate": job["lr"] * job["lr_ratio"]}
    tx = lora_plus_adamw(job["lr"], **rates, specs=specs)
    lora, frozen = {"lora": variables["lora"]}, {"params": variables["params"]}
    return _jax_worker(jit_step(loss_fn, tx), init_state(lora, tx, jax.random.key(0)), frozen, batch)


def qwix(job: dict[str, Any]) -> Worker:
    """The same Linen model, loss and remat with the adapters of google/qwix and a step by hand."""
    import jax
    import optax
    from flax import traverse_util
    from qwix import (  # pyright: ignore[reportMissingImports]
        LoraProvider,
        LoraRule,
        QuantizationRule,
        apply_lora_to_model,
    )
    from qwix._src.core.qarray import quantize  # pyright: ignore[reportMissingImports]

    kind = job.get("quantize", "none")
    base, params, batch = load_llama(job | {"quantize": "none"})
    packed: dict[str, Any] = {} if kind == "none" else {"weight_qtype": kind}
    packed |= {"tile_size": 64} if kind == "nf4" else {}
    adapted = {"module_path": f".*({'|'.join(TARGETS)})", "rank": job["rank"], "alpha": float(job["alpha"])}
    rules = [LoraRule(**adapted, **packed)]
    if packed:  # all products of the layers, as here
        rules.append(QuantizationRule(module_path=".*_proj", **packed))
    provider = LoraProvider(rules)
    model = apply_lora_to_model(base, provider, methods=("hidden",))
    shapes = jax.eval_shape(lambda key: model.init(key, batch, method="hidden"), jax.random.key(0))["params"]
    if packed:
        # Layer by layer: its `quantize_params` takes the scan's axis for one of the weight.
        pack = lambda leaf, how: jax.vmap(lambda w: quantize(w, how))(leaf)  # noqa: E731
        flat, kinds = traverse_util.flatten_dict(params), traverse_util.flatten_dict(shapes)
        params = traverse_util.unflatten_dict(
            {
                path: kinds[path].replace(array=pack(leaf, kinds[path].how))
                if hasattr(kinds[path], "how")
                else leaf
                for path, leaf in flat.items()
            }
        )
    paths = [p for p in traverse_util.flatten_dict(shapes, sep="/") if re.search("_lora_[ab]$", p)]
    if not paths:
        raise ValueError("qwix found no layer to adapt")
    lora = {path: load_factor(job, path).astype(params["norm"]["scale"].dtype) for path in paths}
    frozen = traverse_util.flatten_dict(params, sep="/")
    sides = {side: optax.adamw(rate, weight_decay=0.0) for side, rate in _rates(job).items()}
    tx = optax.multi_transform(sides, {path: path[-1] for path in paths})

    def loss_fn(lora: dict, frozen: dict, ids: jax.Array) -> jax.Array:
        variables = {"params": traverse_util.unflatten_dict({**frozen, **lora}, sep="/")}
        hidden = model.apply(variables, ids, method="hidden")
        total, count = _loss_sum(job, hidden, variables["params"], ids)
        return total / count

    def step(state: tuple, frozen: dict, ids: jax.Array) -> tuple:
        lora, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(lora, frozen, ids)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return (optax.apply_updates(lora, updates), opt_state), {"loss": loss}

    return _jax_worker(jax.jit(step, donate_argnums=0), (lora, tx.init(lora)), frozen, batch)


def tunix(job: dict[str, Any]) -> Worker:
    """google/tunix: its own Llama, loss and trainer step, with adapters from qwix as its CLI adds them.

    The optimizer is optax.adamw for A and for B, as for qwix. Remat is off, tunix's default.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from qwix import LoraProvider, apply_lora_to_model  # pyright: ignore[reportMissingImports]
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]
    from tunix.models.llama3.params import (  # pyright: ignore[reportMissingImports]
        create_model_from_safe_tensors,
    )
    from tunix.sft import utils  # pyright: ignore[reportMissingImports]
    from tunix.sft.peft_trainer import (  # pyright: ignore[reportMissingImports]
        PeftTrainer,
        TrainingConfig,
        TrainingInput,
    )

    c, ids = (
        json.loads((Path(job["directory"]) / "config.json").read_text()),
        jnp.asarray(job["ids"], jnp.int32),
    )
    config = llama3.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=int(c["rope_theta"]),
        norm_eps=c["rms_norm_eps"],
        weight_tying=c["tie_word_embeddings"],
    )
    # Its attention leaves out the config's theta (0.1.7), so that losses would differ.
    llama3.apply_rope = functools.partial(llama3.apply_rope, rope_theta=config.rope_theta)
    # The directory holds the adapter's file too, which its loader would take for the model's.
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "model.safetensors").symlink_to(Path(job["directory"]) / "model.safetensors")
        model = create_model_from_safe_tensors(directory, config, dtype=jnp.dtype(job["dtype"]))
    provider = LoraProvider(
        module_path=f".*({'|'.join(TARGETS)})", rank=job["rank"], alpha=float(job["alpha"])
    )
    model = apply_lora_to_model(model, provider, **model.get_model_input())
    state = nnx.state(model, nnx.LoRAParam)
    flat = [(path, variable) for path, variable in nnx.to_flat_state(state)]
    if not flat:
        raise ValueError("qwix found no layer to adapt")
    for path, variable in flat:
        _, layer, _, module, leaf = path
        factor = _factor_of_layer(job, int(layer), module, leaf[-1])
        variable.set_value(factor.reshape(variable.get_value().shape))
    nnx.update(model, state)

    sides = {side: optax.adamw(rate, weight_decay=0.0) for side, rate in _rates(job).items()}
    label = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "a" if "lora_a" in jax.tree_util.keystr(path) else "b", tree
    )
    trainer = PeftTrainer(
        model, optax.multi_transform(sides, label), TrainingConfig(eval_every_n_steps=10**9)
    )

    def inputs(batch: Any) -> dict[str, jax.Array]:
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": utils.build_positions_from_mask(batch.input_mask),
            "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
        }

    trainer.with_gen_model_input_fn(inputs)
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    batch = TrainingInput(input_tokens=ids, input_mask=jnp.ones(ids.shape, bool))

    def step() -> dict[str, float]:
        loss, _, norm = train_step(batch)
        jax.block_until_ready((norm, nnx.state(model, nnx.LoRAParam)))
        return {"loss": float(loss)}

    return Worker(step, {"device": jax.devices()[0].device_kind}, jax_peak)


def peft(job: dict[str, Any]) -> Worker:
    """PEFT on transformers' model, with its own LoRA+ optimizer; compiled where `compile` says how."""
    import torch  # pyright: ignore[reportMissingImports]
    from peft.optimizers import create_loraplus_optimizer  # pyright: ignore[reportMissingImports]

    model, ids = torch_model(job, adapters=True)
    model.train()
    # Fused, which transformers' Trainer takes by default.
    tx = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=job["lr"], loraplus_lr_ratio=job["lr_ratio"], fused=True
    )
    forward = model if job["compile"] == "none" else torch.compile(model, mode=job["compile"])
    autocast = torch.autocast(ids.device.type, model.dtype, enabled=model.dtype != torch.float32)

    def step() -> dict[str, float]:
        with autocast:
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        tx.step()
        tx.zero_grad(set_to_none=True)
        value = loss.item()
        if ids.is_cuda:
            torch.cuda.synchronize()
        return {"loss": value}

    about = {"attention": model.config._attn_implementation, "threads": torch.get_num_threads()}
    return Worker(step, about, lambda: torch.cuda.max_memory_allocated() if ids.is_cuda else None)


# Generation: a step generates one token for each prompt, which is the prefill, and then all tokens anew.


def generate_here(job: dict[str, Any]) -> Worker:
    """This package: `make_generate`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from loraplus_jax.models.decoding.generate import Sampling, make_generate

    model, params, ids = load_llama(job)
    config, variables = model.config, {"params": params}
    if job["adapters"]:
        model, variables, _, _ = adapted(job)
    keys = jax.random.split(jax.random.key(0), len(ids))
    programs = {
        n: make_generate(model, config, new_tokens=n, stop=(), dtype=jnp.dtype(job["dtype"]))
        for n in (1, job["new_tokens"])
    }

    def generate(new_tokens: int) -> list[list[int]]:
        tokens = programs[new_tokens](variables, ids, jnp.ones_like(ids), Sampling(), keys)
        return np.asarray(tokens).tolist()

    return _generator(generate, job)


def generate_transformers(job: dict[str, Any]) -> Worker:
    """transformers' `generate`, with PEFT's adapters."""
    import torch  # pyright: ignore[reportMissingImports]

    model, ids = torch_model(job, adapters=job["adapters"])
    model.eval()
    # No token ends a text.
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(new_tokens: int) -> list[list[int]]:
        mask = torch.ones_like(ids)
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
        return tokens[:, ids.shape[1] :].tolist()

    return _generator(generate, job)


def _generator(generate: Callable[[int], list[list[int]]], job: dict[str, Any]) -> Worker:
    """A step: seconds until the first token of each text, seconds of all others, and the texts."""

    def step() -> dict[str, Any]:
        start = time.perf_counter()
        generate(1)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        texts = generate(job["new_tokens"])
        return {"prefill_s": prefill, "decode_s": time.perf_counter() - start - prefill, "texts": texts}

    return Worker(step, {})


# Loading: a step loads the model of a GGUF file or a Hugging Face directory as float32.


def load_here(job: dict[str, Any]) -> Worker:
    """This package's `load_params`."""
    import gguf  # noqa: F401  # as the others below: what loads is imported before the step
    import jax
    import jax.numpy as jnp
    import numpy as np
    import safetensors  # noqa: F401

    from loraplus_jax.models.checkpoints.hf import load_config, load_params
    from loraplus_jax.models.llama.config import LlamaConfig
    from loraplus_jax.models.llama.model import Llama, name_table

    jax.devices()

    def load() -> list[Any]:
        path = Path(job["directory"])
        config = LlamaConfig.from_hf(load_config(path))
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        expected = jax.eval_shape(lambda ids: Llama(config).init(jax.random.key(0), ids), ids)["params"]
        return [np.asarray(leaf) for leaf in jax.tree.leaves(load_params(path, name_table(config), expected))]

    return _loader(load)


def load_transformers(job: dict[str, Any]) -> Worker:
    """transformers' `from_pretrained`."""
    import gguf  # noqa: F401
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(job["threads"])

    def load() -> list[Any]:
        path = Path(job["directory"])
        directory, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
        return [x.detach().numpy() for x in model.parameters()]

    return _loader(load)


def _loader(load: Callable[[], list[Any]]) -> Worker:
    """A step loads, and reads a value of every page: a file that is only mapped into memory is not loaded yet."""

    def step() -> dict[str, float]:
        return {
            "sum": sum(float(x.reshape(-1)[:: 4096 // x.itemsize].astype("float64").sum()) for x in load())
        }

    return Worker(step, {})


# Models, factors and losses from the files that `step_time_model.py` writes.


def load_llama(job: dict[str, Any]) -> tuple[Any, dict, Any]:
    """Our Linen model, its parameters from the file, and the batch."""
    import jax
    import jax.numpy as jnp

    from loraplus_jax.adapter import flatten, unflatten
    from loraplus_jax.models.checkpoints.hf import load_config, load_params
    from loraplus_jax.models.checkpoints.quantized import choose_formats, pack_shapes
    from loraplus_jax.models.llama.config import LlamaConfig
    from loraplus_jax.models.llama.model import Llama, name_table

    config = LlamaConfig.from_hf(load_config(job["directory"]))
    dtype = jnp.dtype(job["dtype"])
    model = Llama(
        config,
        dtype=dtype,
        param_dtype=dtype,
        unroll=job["unroll"],
        remat=job["remat"],
        attention=job["attention"],
    )
    batch = jnp.asarray(job["ids"], jnp.int32)
    expected = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    table = name_table(config)
    formats = choose_formats(table, job.get("quantize", "none"), None, Path(job["directory"]))
    expected = unflatten(pack_shapes(flatten(expected), formats, table))
    return model, load_params(job["directory"], table, expected), batch


def adapted(job: dict[str, Any]) -> tuple[Any, dict, dict, Any]:
    """Our model with adapters, its variables from the files, the factors' specs, and the batch."""
    import jax

    from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
    from loraplus_jax.adapter.tree import flatten, replace_leaves

    base, params, batch = load_llama(job)
    variant = job.get("variant", "lora")
    config = LoRAPlusConfig(target_modules=TARGETS, rank=job["rank"], alpha=job["alpha"], variant=variant)
    model = apply_lora_plus(base, config)
    shape = jax.ShapeDtypeStruct(batch.shape, batch.dtype)
    lora, specs = init_lora(model, jax.random.key(0), shape, base={"params": params})
    paths = [path for path in flatten(lora) if not path.endswith("magnitude")]
    lora = replace_leaves(lora, {path: load_factor(job, path) for path in paths})
    return model, {"params": params, "lora": lora}, specs, batch


def torch_model(job: dict[str, Any], *, adapters: bool) -> tuple[Any, Any]:
    """transformers' model, with PEFT's adapters from the file if wanted, and the batch."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    device, dtype = "cuda" if job["backend"] == "gpu" else "cpu", getattr(torch, job["dtype"])
    if device == "cpu":
        torch.set_num_threads(job["threads"])
    model: Any = LlamaForCausalLM.from_pretrained(job["directory"], dtype=dtype).to(device)
    if adapters:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict  # pyright: ignore[reportMissingImports]
        from safetensors.torch import load_file

        sizes = {"r": job["rank"], "lora_alpha": job["alpha"], "lora_dropout": 0.0}
        config = LoraConfig(**sizes, target_modules=list(TARGETS), use_dora=job.get("variant") == "dora")
        model = get_peft_model(model, config)
        set_peft_model_state_dict(model, load_file(Path(job["directory"]) / "adapter.safetensors"))
    return model, torch.tensor(job["ids"], device=device)


def _loss_sum(job: dict[str, Any], hidden: Any, params: dict, ids: Any) -> tuple[Any, int]:
    """The next tokens' cross-entropy summed, and their number. The last position has none and counts nothing."""
    import jax.numpy as jnp

    from loraplus_jax.models.decoder import head_kernel
    from loraplus_jax.step import chunked_cross_entropy

    (kernel, transposed), labels = head_kernel(params), jnp.roll(ids, -1, axis=1)
    losses = chunked_cross_entropy(hidden, kernel, labels, transposed=transposed, chunk=job["chunk"])
    return jnp.sum(losses[:, :-1]), losses[:, :-1].size


def load_factor(job: dict[str, Any], path: str) -> Any:
    """One stacked factor from the file, by a path such as `layers/self_attn/q_proj/lora_a`."""
    import jax.numpy as jnp

    *_, module, leaf = path.removeprefix("lora/").split("/")
    return jnp.stack([_factor_of_layer(job, layer, module, leaf[-1]) for layer in range(job["layers"])])


def _factor_of_layer(job: dict[str, Any], layer: int, module: str, side: str) -> Any:
    """A (in, rank) or B (rank, out) of one layer from the file in PEFT's names."""
    import jax.numpy as jnp
    from safetensors import safe_open

    name = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{side.upper()}.weight"
    with safe_open(Path(job["directory"]) / "adapter.safetensors", "numpy") as file:
        return jnp.asarray(file.get_tensor(name).T)


def _rates(job: dict[str, Any]) -> dict[str, float]:
    """LoRA+'s learning rates by side."""
    return {"a": job["lr"], "b": job["lr"] * job["lr_ratio"]}


def _jax_worker(step: Any, state: Any, frozen: Any, batch: Any) -> Worker:
    """Compiles a step and keeps its state."""
    import jax

    start = time.perf_counter()
    lowered = step.lower(state, frozen, batch)
    between = time.perf_counter()
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    about = {
        "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(frozen)),
        "trace_s": between - start,
        "compile_s": time.perf_counter() - between,
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": cost["flops"],
        "device": jax.devices()[0].device_kind,
    }
    held = {"state": state}

    def one() -> dict[str, float]:
        held["state"], metrics = compiled(held["state"], frozen, batch)
        jax.block_until_ready(held["state"])
        return {"loss": float(metrics["loss"])}

    return Worker(one, about, jax_peak)


def jax_peak() -> int | None:
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


WORKERS: dict[str, Callable[[dict[str, Any]], Worker]] = {
    "here": here,
    "peft": peft,
    "qwix": qwix,
    "tunix": tunix,
    "generate_here": generate_here,
    "generate_transformers": generate_transformers,
    "load_here": load_here,
    "load_transformers": load_transformers,
}


def versions() -> dict[str, str]:
    """What of PACKAGES is installed."""
    return {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}


def peak_bytes() -> int:
    """The highest resident memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def main() -> None:
    """Serves the steps of the implementation that the job names."""
    # The checkout, before another copy of this package that may be installed.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")

    def timed_step() -> dict[str, Any]:
        start = time.perf_counter()
        values = worker.step()
        return {"seconds": time.perf_counter() - start, **values}

    job = json.loads(sys.stdin.readline())
    try:
        worker = WORKERS[job["implementation"]](job)
        reply(first=timed_step(), about=worker.about, versions=versions())
    except ModuleNotFoundError as error:
        return reply(failed=f"{error.name} is not installed")
    except Exception as error:  # whatever it is, the others' runs are worth having
        traceback.print_exc()
        return reply(failed=f"{type(error).__name__}: {str(error).strip():.300}")
    for line in sys.stdin:
        if line.strip() == "memory":
            reply(device_peak_bytes=worker.device_memory(), peak_bytes=peak_bytes())
        else:
            reply(**timed_step())
    return None


if __name__ == "__main__":
    main()
