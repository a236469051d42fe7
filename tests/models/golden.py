"""Small models of every family with the weights and values of transformers' models, from `tests/golden`."""

import functools
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplus_jax.data.fetch import cache_dir
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.decoding.generate import Sampling, make_generate
from loraplus_jax.models.families import family_of
from loraplus_jax.models.files import open_files

GOLDEN = Path(__file__).parents[1] / "golden"
LLAMAS = (
    *("llama2", "llama3", "linear", "yarn", "biases", "smollm2"),
    *("mistral", "mistral_full", "qwen2", "qwen2_tied", "qwen3"),
    *("gemma2", "gemma3", "olmo2", "olmo3", "smollm3", "phi3", "phi3_long"),
    *("qwen3_moe", "mixtral"),
)
GPT2S = ("tied", "scaled", "untied")
CASES = (*(f"llama_{name}" for name in LLAMAS), *(f"gpt2_{name}" for name in GPT2S))
IDS = jax.ShapeDtypeStruct((1, 2), jnp.int32)
# Every input is padded to one shape, so that each model compiles once, and more padding than the file's is tested.
ROWS, WIDTH = 3, 40
# Most of the time goes into compiling; test_live.py does it in full.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def write_golden(name, folder):
    """The golden file, with its weights and config written to a directory as transformers does."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    weights = {key.removeprefix("weights/"): golden[key] for key in golden if key.startswith("weights/")}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(str(golden["config"]))
    return golden


def load(path, **fields):
    """A causal language model and its parameters, from a directory or a GGUF file."""
    config = open_files(path).config
    family = family_of(config["model_type"])
    model = family.model(family.config.from_hf(config), **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    return model, load_params(open_files(path), family.name_table(model.config), shapes)


def maker(name):
    """The script that makes golden files, as a module."""
    spec = importlib.util.spec_from_file_location(f"make_{name}", GOLDEN / f"make_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.partial(jax.jit, static_argnums=0, static_argnames="method", compiler_options=QUICKLY)
def run(model, variables, *inputs, method=None):
    """Compiled once for each model and shape, over all tests."""
    return model.apply(variables, *inputs, method=method)


def logits(model, params, ids, segments):
    """Logits (B, T, V) as float32 NumPy, zero at padding."""
    room = [(0, ROWS - len(ids)), (0, WIDTH - ids.shape[1])]
    out = run(model, {"params": params}, np.pad(ids, room), np.pad(segments, room))
    assert np.isfinite(out).all()
    return np.where(segments[:, :, None] != 0, np.asarray(out)[: len(ids), : ids.shape[1]], 0)


def error(given, wanted):
    """The largest difference, relative to the largest value."""
    return float(np.abs(given - wanted).max() / np.abs(wanted).max())


def real_smollm2():
    """What `loraplus fetch smollm2-135m` put into the cache, or the file that the environment names."""
    found = sorted(cache_dir().rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    file = Path(os.environ.get("LORAPLUS_SMOLLM2") or (found[0] if found else "absent"))
    return file if file.exists() else pytest.skip("no SmolLM2: loraplus fetch smollm2-135m")


def generated(model, params, prompts, new_tokens, segments=None):
    """What the largest logits go on with from left-padded prompts (B, T)."""
    segments = (prompts != 0).astype(np.int32) if segments is None else segments
    generate = make_generate(model, model.config, new_tokens=new_tokens, stop=())
    keys = jax.random.split(jax.random.key(0), len(prompts))
    return generate({"params": params}, prompts, segments, Sampling(), keys)
