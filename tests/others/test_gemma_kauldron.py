"""gemma with its own adapters, trained by kauldron's trainer with our optimizer."""

import math
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loraplus_jax import lora_plus_adamw

from .harness import RATIO, assert_equal, assert_ratio, drawn
from .tiny_gemma import config_of

gm = pytest.importorskip("gemma.gm")
kd = pytest.importorskip("kauldron.kd")
for name in ("mediapy", "tensorboard", "tensorflow_datasets"):  # kauldron's trainer imports them
    pytest.importorskip(name)

pytestmark = pytest.mark.filterwarnings("ignore")

RATE = 1e-3
ROWS = np.arange(8)[:, None] + np.arange(9)


def transformer():
    config = config_of(gm, ("LOCAL_SLIDING",), num_embed=16, embed_dim=256, transpose_gating_einsum=True)
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
    before = jax.tree.map(np.asarray, state.params)
    after, _ = it.trainstep.step(state, batch)
    moved = assert_ratio(before, after.params, 5)
    assert len(moved) == 10
    assert all("lora/" in path for path in moved)


def test_kauldron_learns_and_resumes_from_its_checkpoint(tmp_path):
    straight, last = trainer(tmp_path / "straight", 12, 0.02).train()
    trainer(tmp_path / "resumed", 6, 0.02).train()
    # With another seed only what comes from the checkpoint can be equal.
    resumed, _ = trainer(tmp_path / "resumed", 12, 0.02, seed=1).train()
    assert int(resumed.step) == int(straight.step) == 13
    assert_equal((resumed.params, resumed.opt_state), (straight.params, straight.opt_state))
    # The base is random, so the first loss is about log(16).
    assert last.compute().loss_values["losses/total"] < 0.9 * math.log(16)


def test_the_example_learns():
    before, after = runpy.run_path(str(Path(__file__).parents[2] / "examples/09_gemma.py"))["main"]()
    assert after < 0.9 * before
