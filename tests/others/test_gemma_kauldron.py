"""gemma with its own adapters, trained by kauldron's trainer with our optimizer, and written for PEFT."""

import functools
import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import apply_lora_plus, init_lora, lora_plus_adamw, save_peft
from loraplus_jax.adapter import flatten
from loraplus_jax.interop import GEMMA, load_peft
from loraplus_jax.nnx import specs_of

from .tiny_gemma import config_of
from .trees import assert_equal, drawn, size

gm = pytest.importorskip("gemma.gm")
kd = pytest.importorskip("kauldron.kd")
for name in ("mediapy", "tensorboard", "tensorflow_datasets"):  # kauldron's trainer imports them
    pytest.importorskip(name)

pytestmark = pytest.mark.filterwarnings("ignore")

RATE, RATIO = 1e-3, 8.0
ROWS = np.arange(8)[:, None] + np.arange(9)


def transformer(kv_heads=2, transposed=True, layers=1):
    sizes = {"num_embed": 16, "embed_dim": 256, "num_kv_heads": kv_heads}
    kinds = ("LOCAL_SLIDING",) * layers
    config = config_of(gm, kinds, **sizes, transpose_gating_einsum=transposed)
    return gm.nn.Transformer(config=config, dtype=jnp.float32, tokens="batch.tokens")


def trainer(directory, steps, rate=RATE, seed=0):
    return kd.train.Trainer(
        seed=seed,
        workdir=directory,
        train_ds=kd.data.InMemoryPipeline(
            loader=lambda: {"tokens": ROWS[:, :-1], "next": ROWS[:, 1:, None]}, batch_size=8
        ),
        model=gm.nn.LoRA(rank=2, model=transformer(), dtype=jnp.float32),
        optimizer=kd.optim.partial_updates(
            lora_plus_adamw(rate, lr_ratio=RATIO), mask=kd.optim.select("lora")
        ),
        train_losses={
            "next": kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds.logits", labels="batch.next")
        },
        checkpointer=kd.ckpts.Checkpointer(save_interval_steps=2),
        writer=None,
        log_metrics_every=1,
        num_train_steps=steps,
    )


def test_kauldron_moves_b_faster_and_nothing_but_factors(tmp_path):
    it = trainer(tmp_path, 1)
    batch = next(iter(it.train_ds))
    state = it.init_state()
    state = state.replace(params=drawn(state.params))  # while B is zero A does not move
    before = flatten(jax.tree.map(np.asarray, state.params))
    after, _ = it.trainstep.step(state, batch)
    moved = {path: size(x - before[path]) for path, x in flatten(after.params).items()}
    ratios = {
        path: moved[f"{path}b"] / moved[f"{path}a"]
        for path in (p.removesuffix("a") for p in moved if p.endswith("lora/a"))
    }
    assert len(ratios) == 5
    assert list(ratios.values()) == pytest.approx([RATIO] * 5, rel=0.01)
    assert {path for path, change in moved.items() if change} == {
        f"{p}{side}" for p in ratios for side in "ab"
    }


def test_kauldron_learns_and_resumes_from_its_checkpoint(tmp_path):
    straight, last = trainer(tmp_path / "straight", 12, 0.02).train()
    trainer(tmp_path / "resumed", 6, 0.02).train()
    # With another seed only what comes from the checkpoint can be equal.
    resumed, _ = trainer(tmp_path / "resumed", 12, 0.02, seed=1).train()
    assert int(resumed.step) == int(straight.step) == 13
    assert_equal((resumed.params, resumed.opt_state), (straight.params, straight.opt_state))
    # The base is random, so the first loss is about log(16).
    assert last.compute().loss_values["losses/total"] < 0.9 * math.log(16)


@functools.cache
def random_params(kv_heads, transposed):
    model = gm.nn.LoRA(rank=2, model=transformer(kv_heads, transposed, layers=2), dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(ROWS[:, :-1]))
    return drawn(shapes["params"])


def deltas(layer, transposed):
    """Each PEFT module of a layer and its (out, in) update, from gemma's own factors and einsums."""
    attn, mlp = layer["attn"], layer["mlp"]

    def product(factors, equation):
        a, b = (np.asarray(factors["lora"][side], np.float64) for side in "ab")
        return np.einsum(equation, a, b)

    def out_of(factors, names):  # (parts, heads, size, in)
        parts = product(factors["_LoRAEinsum_0"], "dr,rcnh->cnhd")
        return {f"self_attn.{name}": parts[n].reshape(-1, 256) for n, name in enumerate(names)}

    found = out_of(attn["kv_einsum"], ("k_proj", "v_proj")) if "kv_einsum" in attn else {}
    if "qkv_einsum" in attn:
        found |= out_of(attn["qkv_einsum"], ("q_proj", "k_proj", "v_proj"))
    else:
        query = product(attn["q_einsum"]["_LoRAEinsum_0"], "dr,rnh->nhd")
        found["self_attn.q_proj"] = query.reshape(-1, 256)
    out = product(attn["attn_vec_einsum"]["_LoRAEinsum_0"], "nhr,rd->dnh")
    found["self_attn.o_proj"] = out.reshape(256, -1)
    gate, up = product(mlp["_LoRAEinsum_gating_einsum"], "fr,rnh->nhf")
    down = product(mlp["_LoRAEinsum_linear"], "hr,rf->fh")
    return found | {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down}


@pytest.mark.parametrize(("kv_heads", "transposed"), [(2, True), (4, False)])
def test_peft_gets_the_updates_of_gemma_s_factors(kv_heads, transposed, tmp_path):
    params = random_params(kv_heads, transposed)
    lora, specs, config = specs_of(params, scale=1.0)
    save_peft(tmp_path / "peft", lora, specs, config, GEMMA)
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    expected = {
        f"base_model.model.model.layers.{n}.{name}": delta
        for n in range(2)
        for name, delta in deltas(params[f"layer_{n}"], transposed).items()
    }
    assert tensors.keys() == {f"{name}.lora_{side}.weight" for name in expected for side in "AB"}
    for name, delta in expected.items():
        a, b = (tensors[f"{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        np.testing.assert_allclose(b @ a, delta, rtol=0, atol=1e-12)
    loaded = load_peft(tmp_path / "peft", specs, GEMMA)
    assert_equal(loaded.lora, lora)
    assert loaded.config == config


def test_the_config_gives_the_plain_model_the_same_adapters():
    _, specs, config = specs_of(random_params(2, True), scale=1.0)
    model = apply_lora_plus(transformer(layers=2), config)
    assert init_lora(model, jax.random.key(0), jnp.asarray(ROWS[:, :-1]))[1] == specs


def test_the_example_learns():
    before, after = runpy.run_path(str(Path(__file__).parents[2] / "examples/09_gemma.py"))["main"]()
    assert after < 0.9 * before
