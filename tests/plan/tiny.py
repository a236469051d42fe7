"""Settings of tiny models, and plans of other numbers."""

import dataclasses
import json

import jax

from loraplus_jax import LoRAPlusConfig, make_mesh, pmap_step
from loraplus_jax.data.options import DataOptions
from loraplus_jax.models.files import open_files
from loraplus_jax.models.options import ModelOptions
from loraplus_jax.plan.hlo import Collective
from loraplus_jax.plan.plan import Plan, Work
from loraplus_jax.plan.programs import plan_step
from loraplus_jax.settings.schema import Settings, TrainSettings
from loraplus_jax.training.optimizer import make_optimizer
from loraplus_jax.training.setup import task_class

from .. import tiny

RANK, LAYERS = 3, 3
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None}
WIDE = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 5, "intermediate_size": 64}
LLAMA = tiny.config(**WIDE, **HEADS)
SHORT = LLAMA | {"num_hidden_layers": LAYERS}
GPT2 = tiny.config("gpt2", **WIDE, num_attention_heads=4)
BERT = tiny.config("bert", vocab_size=128, num_hidden_layers=3, intermediate_size=32)


def settings_of(
    directory, config, *, task, model=(), train=(), targets=("q_proj", "v_proj"), layers=None, **others
):
    (directory / "config.json").write_text(json.dumps(config))
    return Settings(
        model=ModelOptions(path=str(directory), **dict(model)),
        data=DataOptions(path="no such file.csv", max_length=32),
        lora=LoRAPlusConfig(target_modules=targets, rank=RANK, layers_to_transform=layers),
        train=TrainSettings(**{"batch_size": 8, "eval_batch_size": 8, **dict(train)}),
        task=task,
        output_dir="never written",
        **others,
    )


def llama(directory, **kwargs):
    return settings_of(directory, SHORT, task="instruction", **kwargs)


def parts_of(settings, directory):
    task = task_class(settings).without_data(settings.task_options)
    return task.make_base(settings.task_options, open_files(directory)), task


def config(directory, **changes):
    (directory / "config.json").write_text(json.dumps(SHORT))
    path = directory / "run.yaml"
    lines = {"model": {"path": str(directory)}, "data": {"path": "none.jsonl", "max_length": 32}}
    lines |= {"task": "instruction", "output_dir": "out", "train": {"batch_size": 8, "eval_batch_size": 8}}
    path.write_text(json.dumps(lines | changes))  # JSON is YAML
    return str(path)


def plan_by_hand(model, **changes):
    """A plan of `SHORT` on eight devices, with these figures of another."""
    adapters, weights = LAYERS * RANK * (2 * 32 + 32 + 16), 62_816
    memory = {"frozen weights": 4 * weights, "trained": 4 * adapters, "optimizer": 8 * adapters}
    sizes = {"devices": 8, "mesh": {"data": 8, "fsdp": 1, "tensor": 1}, "rows": 8, "tokens": 32}
    sizes |= {"accumulate": 1, "layers": LAYERS, "trained": adapters, "total": adapters + weights}
    needs = {"memory": memory | {"batch": 388, "temporaries": 200_000}, "needed": 480_000, "peak": 0}
    needs |= {"evaluation": 300_000, "theory": None, "room": 16_000_000_000, "problem": None}
    reduced = (Collective("all-reduce", 4 * adapters, 8, 1, "f32[32,3]", ""),)
    others = {"device": "cpu", "chip": None, "work": Work(2e7, 1e7), "collectives": reduced}
    return Plan(**{"model": model, "roofline": {}, "compile_seconds": 1.0} | sizes | needs | others | changes)


def fake(plan, **changes):
    return dataclasses.replace(plan, **changes)


def lower_pmap(settings, directory, devices):
    """The pmap step of a model without weights, and its state's shapes on one device."""
    base, task = parts_of(settings, directory)
    step = plan_step(settings, base, task, make_mesh(1, devices=devices[:1]))
    tx = make_optimizer(settings.optimizer, settings.lr_ratio, 10, step.parts.specs)
    losses = task.make_losses(settings.task_options, step.parts)
    run = pmap_step(losses.train, tx, skip_nonfinite=True, devices=devices)
    batch = step.held["batch"][0]
    count = len(devices)
    state, frozen = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), tree)
        for tree in (step.run.state, step.parts.frozen)
    )
    rows = {
        name: jax.ShapeDtypeStruct((count, x.shape[0] // count, *x.shape[1:]), x.dtype)
        for name, x in batch.items()
    }
    return run.lower(state, frozen, rows), step
