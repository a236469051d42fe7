"""AdaLoRA's budget and choice are those of PEFT's RankAllocator, and PEFT loads a pruned stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator

from loraplus_jax import LoRAPlusConfig, apply_lora_plus, init_lora
from loraplus_jax.interop.peft_files import load_peft, save_peft
from loraplus_jax.optim.adalora import adalora
from loraplus_jax.optim.trained_ranks import final_ranks

from .families import off, random

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RANK, STEPS = 6, 24
SIZES = {"0": (7, 5), "1": (5, 9)}


def allocator():
    """PEFT's, and its model of two layers."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in SIZES.values()))
    settings = {"init_r": RANK, "target_r": 2, "tinit": 4, "tfinal": 5, "deltaT": 3, "total_step": STEPS}
    config = peft.AdaLoraConfig(target_modules=["0", "1"], beta1=0.8, beta2=0.7, **settings)
    model = peft.get_peft_model(layers, config).base_model
    return model, RankAllocator(model, config, "default")


def test_the_budget_and_the_chosen_triplets_are_pefts():
    """PEFT gets our weights and gradients of every step; both choose among their own importances."""
    model, theirs = allocator()
    draw = np.random.default_rng(0).normal
    params = {
        name: {"lora_a": jnp.asarray(draw(size=(n, RANK))), "lora_b": jnp.asarray(draw(size=(RANK, m)))}
        for name, (n, m) in SIZES.items()
    }
    tx = adalora(
        optax.sgd(0.01),
        optax.sgd(0.01),
        steps=STEPS,
        target_rank=2,
        initial_steps=4,
        final_steps=5,
        every=3,
        beta1=0.8,
        beta2=0.7,
        orthogonality=0.0,
    )
    state, update, chosen, budget, masks = jax.jit(tx.init)(params), jax.jit(tx.update), 0, 0, None
    parameters = dict(model.named_parameters())
    for step in range(1, STEPS + 1):
        grads = jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), x.dtype), params)
        for name in SIZES:
            p, q = state.triplets.p[f"{name}/lora_a"], state.triplets.q[f"{name}/lora_b"]
            values = state.triplets.values[f"{name}/lora_b"]
            g_a, g_b = grads[name].values()
            for letter, weight, grad in (
                ("A", p.T, g_a.T),
                ("E", values[:, None], jnp.sum(g_b * q, 1)[:, None]),
                ("B", q.T, (values[:, None] * g_b).T),
            ):
                parameter = parameters[f"model.{name}.lora_{letter}.default"]
                parameter.data = torch.tensor(np.asarray(weight))
                parameter.grad = torch.tensor(np.asarray(grad))
        last = step == STEPS - 5
        if step <= STEPS - 5:  # later PEFT's model applies the last masks
            budget, masks = theirs.update_and_allocate(model, step, force_mask=last)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        in_use = {name: np.any(pair["lora_b"], -1).tolist() for name, pair in params.items()}
        if not masks:
            assert all(map(all, in_use.values()))
            continue
        chosen += 1
        assert {name: masks[f"model.{name}.lora_E.default"] for name in SIZES} == in_use
        assert sum(map(sum, in_use.values())) == budget
    assert chosen == 5 + 6  # the steps 6, 9, 12, 15, 18, and from 19 on


def test_peft_loads_a_pruned_stack_with_the_same_logits(pairs, tmp_path):
    pair = pairs("qwen3")
    config = LoRAPlusConfig(target_modules=["q_proj", "down_proj"], rank=4, alpha=7.0, use_rslora=True)
    model = apply_lora_plus(pair.model, config)
    lora, specs = init_lora(model, jax.random.key(0), *pair.inputs)
    lora = random(lora, 5)
    zeros = np.random.default_rng(6).random(size=(64, 4)) < 0.5
    zeros[0] = True

    def mask(path, x):
        if path[-1].key != "lora_b":
            return x
        rows = zeros[: len(x)] if "q_proj" in str(path) else zeros[8 : 8 + len(x)]
        return np.where(rows[..., None], 0, x)

    lora = jax.tree_util.tree_map_with_path(mask, lora)
    save_peft(tmp_path / "a", lora, specs, config, pair.path_map, task_type=pair.form.task_type, prune=True)
    loaded = peft.PeftModel.from_pretrained(pair.reference(), tmp_path / "a").eval()
    ranks = {module.r["default"] for module in loaded.modules() if getattr(module, "r", None)}
    assert len(ranks) > 1
    assert max(ranks) <= 4
    given = pair.logits(model, {"params": pair.params, "lora": lora})
    assert off(pair.base_logits, given) > 1e-2
    assert off(given, pair.torch_logits(loaded)) <= 1e-4
    again = load_peft(tmp_path / "a", specs, pair.path_map)
    assert again.config == config
    assert final_ranks(again.lora, specs) == final_ranks(lora, specs)
    assert off(given, pair.logits(model, {"params": pair.params, "lora": again.lora})) <= 1e-4
