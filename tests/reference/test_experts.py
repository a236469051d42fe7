"""Experts of transformers' mixtures as a plain function: PEFT's adapters of their parameters, both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from loraplus_jax import LoRAPlusConfig, load_peft, save_peft
from loraplus_jax.functions import apply_lora_plus, init_lora, whole_weights

from .families import off

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts are modules there"),
]
EXPERTS, CHOSEN, WIDTH, HIDDEN = 4, 2, 8, 12
NAMES = [(f"experts/{name}", f"experts.{name}", "Parameter") for name in ("gate_up_proj", "down_proj")]
X = np.random.default_rng(0).normal(size=(1, 10, WIDTH)).astype(np.float32)


def torch_block():
    """The block of Qwen3-MoE with random weights; Mixtral's experts are the same."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

    sizes = {"hidden_size": WIDTH, "moe_intermediate_size": HIDDEN, "num_experts": EXPERTS}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts_per_tok=CHOSEN, norm_topk_prob=True)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    block = qwen3.Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return block


def block(params, x):
    """The same by `ragged_dot`; weights as in PyTorch, (experts, out, in)."""
    rows = x.reshape(-1, WIDTH)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(rows @ params["gate"]["weight"].T), CHOSEN)
    weights = weights / weights.sum(-1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
    up, down = (params["experts"][f"{name}_proj"].swapaxes(1, 2) for name in ("gate_up", "down"))
    gate, up = jnp.split(jax.lax.ragged_dot(jnp.repeat(rows, CHOSEN, 0)[order], up, sizes), 2, -1)
    y = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down, sizes)[jnp.argsort(order)]
    return (y.reshape(*chosen.shape, WIDTH) * weights[..., None]).sum(1).reshape(x.shape)


def test_an_adapter_of_peft_has_its_values_and_gradients_and_comes_back(tmp_path):
    base = torch_block()
    params = {"gate": {}, "experts": {}}
    for path, value in base.named_parameters():
        module, name = path.split(".")
        params[module][name] = value.detach().numpy().copy()
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    made = peft.LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=targets)
    theirs = peft.get_peft_model(base, made).eval()
    trained = {path: p for path, p in theirs.named_parameters() if "lora_" in path}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    theirs.save_pretrained(tmp_path / "a")
    outputs = theirs(torch.from_numpy(X))
    torch.sin(outputs).sum().backward()
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")

    config = LoRAPlusConfig(target_parameters={"experts/.*": "eoi"}, rank=2, alpha=5)
    _, specs = init_lora(jax.random.key(0), params, config)
    assert not whole_weights(block, config, params, X)
    lora, wanted = (load_peft(tmp_path / name, specs, NAMES).lora for name in ("a", "gradients"))
    g = jax.jit(apply_lora_plus(block, config))
    found = g(params, lora, X)
    assert off(block(params, X), outputs.detach().numpy()) > 1e-2, "the adapter does nothing"
    assert off(found, outputs.detach().numpy()) <= 1e-5
    gradients = jax.grad(lambda lora: jnp.sum(jnp.sin(g(params, lora, X))))(lora)
    jax.tree.map(functools.partial(assert_near, limit=1e-5), gradients, wanted)

    save_peft(tmp_path / "b", lora, specs, config, NAMES)
    ours, files = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ba")
    assert ours.keys() == files.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, files[name])
    again = peft.PeftModel.from_pretrained(torch_block(), tmp_path / "b").eval()
    assert off(again(torch.from_numpy(X)).detach().numpy(), outputs.detach().numpy()) <= 1e-6


def assert_near(found, wanted, limit):
    assert off(found, wanted) <= limit
