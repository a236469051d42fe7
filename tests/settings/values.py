"""Every field of the settings away from its default, and settings parsed from a file with some of them."""

import json

import yaml

from loraplus_jax.settings.parsing import parse_settings

LEAST = {"model": {"path": "m"}, "data": {"path": "d"}, "output_dir": "o"}


# Every field of the sections, away from its default, as it stands in YAML.
OTHER = {
    "model.path": "elsewhere",
    "model.pooling": "cls",
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.quantize": "nf4",
    "model.dropout": 0.2,
    "model.head_dropout": 0.3,
    "model.unroll": True,
    "data.path": "other.csv",
    "data.text": "sentence",
    "data.text_pair": "second",
    "data.label": "class",
    "data.delimiter": ";",
    "data.quoting": "none",
    "data.header": ["text", "label", "sentence", "second", "class"],
    "data.max_length": 32,
    "data.validation_fraction": 0.2,
    "data.test_fraction": 0.1,
    "data.split_seed": 3,
    "data.limit": 50,
    "data.duplicates": "drop",
    "lora.target_modules": ["key"],
    "lora.rank": 3,
    "lora.alpha": 7.0,
    "lora.dropout": 0.1,
    "lora.lr_ratio": 2.0,
    "lora.init": "lora_b",
    "lora.modules_to_save": ["pooler"],
    "lora.exclude_modules": ["key"],
    "lora.target_parameters": {"word/embedding": "io"},
    "lora.layers_to_transform": [0],
    "lora.rank_pattern": {"query": 2},
    "lora.alpha_pattern": {"query": 2.0},
    "lora.use_rslora": True,
    "lora.variant": "dora",
    "lora.bias": "all",
    "optimizer.embedding_learning_rate": 1e-3,
    "optimizer.policy": "peft",
    "optimizer.name": "riemannian",
    "optimizer.learning_rate": 2e-3,
    "optimizer.head_learning_rate": 1e-2,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 4,
    "optimizer.final_fraction": 0.1,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.99,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.max_grad_norm": 1.0,
    "train.steps": 5,
    "train.epochs": 1.5,
    "train.batch_size": 8,
    "train.accumulate": 2,
    "train.eval_batch_size": 16,
    "train.eval_every": 7,
    "train.log_every": 3,
    "train.early_stopping": 2,
    "train.select": "last",
    "train.keep": 1,
    "train.max_skipped": 2,
    "train.compilation_cache": False,
    "train.theory_every": 4,
    "train.report_to": ["wandb"],
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 4,
    "task": "regression",
    "method": "lora",
    "init_adapter": "old_run",
    "seed": 9,
    "output_dir": "there",
}


# Fields of language models, with task instruction.
LANGUAGE = {
    "model.split_fused": True,
    "model.remat": "dots",
    "model.attention": "xla",
    "model.loss_chunk": 64,
    "data.template": "plain",
    "data.answers": "last",
    "data.packing": True,
    "data.column_names": {"prompt": "question"},
    "train.prompt": "Why?",
    "train.label_smoothing": 0.1,
}


# Fields of task generation.
GENERATION = {
    "generation.beams": 7,
    "generation.length_penalty": 0.5,
    "generation.no_repeat_ngram": 3,
    "generation.early_stopping": "never",
    "generation.max_new_tokens": 9,
    "generation.inputs": 5,
    "generation.batch_size": 2,
}


# Set together.
PROCESSES = {
    "distributed.coordinator": "host:1234",
    "distributed.processes": 4,
    "distributed.process_id": 3,
}


# These replace data.path.
FILES = {"data.train": "a.csv", "data.validation": "b.csv", "data.test": "c.csv"}


OTHER_PROCESSES = {
    "distributed.coordinator": "host:1",
    "distributed.processes": 8,
    "distributed.process_id": 0,
}
# Every field: a value away from its default, and the settings without which this value is rejected.
FIELDS = {
    **{name: (given, {}) for name, given in OTHER.items()},
    **{name: (given, {"task": "instruction"}) for name, given in LANGUAGE.items()},
    **{name: (given, {"task": "generation"}) for name, given in GENERATION.items()},
    **{name: (given, OTHER_PROCESSES) for name, given in PROCESSES.items()},
    **{name: (given, {"data.path": None, "data.train": "d.csv"}) for name, given in FILES.items()},
    "model.quantize_exclude": (["head"], {"model.quantize": "nf4"}),
    "data.root": ("r", {"data.path": "glue/rte"}),
    "lora.init_iterations": (4, {"lora.init": "pissa"}),
    "optimizer.magnitude_learning_rate": (1e-3, {"lora.variant": "dora"}),
    "optimizer.decay": ("equal", {"optimizer.weight_decay": 0.1}),
    "optimizer.decay_steps": (5, {"optimizer.schedule": "wsd"}),
    "optimizer.reg": (1e-3, {"optimizer.name": "riemannian"}),
    "optimizer.target_rank": (2.0, {"train.select": "last"}),
    "train.prompt_tokens": (9, {"task": "instruction", "train.prompt": "Why?"}),
    "generation.no_repeat_in": ("all", {"task": "generation", "generation.no_repeat_ngram": 3}),
    "distributed.start_timeout": (20, OTHER_PROCESSES),
    "distributed.lost_timeout": (20, OTHER_PROCESSES),
    "init_adapter_rates": ("new", {"init_adapter": "old"}),
}


def write(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def parsed(tmp_path, *overrides, content=None):
    return parse_settings(write(tmp_path, LEAST if content is None else content), overrides)


def parsing(*overrides, content=None):
    """`parsed` as a row of `refusals` has it."""
    return lambda tmp_path: parsed(tmp_path, *overrides, content=content)


def value(settings, name):
    for part in name.split("."):
        settings = getattr(settings, part)
    return list(settings) if isinstance(settings, tuple) else settings


def nested(values):
    """The least settings with these, which are named with their sections."""
    tree = json.loads(json.dumps(LEAST))
    for name, given in values.items():
        section, _, field = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[field] = given
    return tree
