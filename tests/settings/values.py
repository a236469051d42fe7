"""Every field of the settings away from its default, and settings parsed from a file with some of them."""

import json

import yaml

from loraplus_jax.settings.parsing import parse_settings

LEAST = {"model": {"path": "m"}, "data": {"path": "d"}, "output_dir": "o"}


def flat(text):
    """Settings by their names with sections, from YAML by section."""
    return {
        f"{section}.{field}".removeprefix("."): given
        for section, fields in yaml.safe_load(text).items()
        for field, given in fields.items()
    }


# Every field of the sections, away from its default.
OTHER = flat("""
model:
  {path: elsewhere, pooling: cls, dtype: bfloat16, param_dtype: bfloat16, quantize: nf4, dropout: 0.2,
   head_dropout: 0.3, unroll: true}
data:
  {path: other.csv, text: sentence, text_pair: second, label: class, delimiter: ";", quoting: none,
   header: [text, label, sentence, second, class], max_length: 32, validation_fraction: 0.2, test_fraction: 0.1,
   split_seed: 3, limit: 50, duplicates: drop}
lora:
  {target_modules: [key], rank: 3, alpha: 7.0, dropout: 0.1, lr_ratio: 2.0, init: lora_b, modules_to_save: [pooler],
   exclude_modules: [key], target_parameters: {word/embedding: io}, layers_to_transform: [0],
   rank_pattern: {query: 2}, alpha_pattern: {query: 2.0}, use_rslora: true, variant: dora, bias: all}
optimizer:
  {embedding_learning_rate: 1.0e-3, policy: peft, name: riemannian, learning_rate: 2.0e-3,
   head_learning_rate: 1.0e-2, schedule: cosine, warmup_steps: 4, final_fraction: 0.1, b1: 0.8, b2: 0.99,
   eps: 1.0e-6, weight_decay: 0.01, max_grad_norm: 1.0}
train:
  {steps: 5, epochs: 1.5, batch_size: 8, accumulate: 2, eval_batch_size: 16, eval_every: 7, log_every: 3,
   early_stopping: 2, select: last, keep: 1, max_skipped: 2, compilation_cache: false, theory_every: 4,
   report_to: [wandb]}
mesh: {data: 2, fsdp: 2, tensor: 4}
"": {task: regression, method: lora, init_adapter: old_run, seed: 9, output_dir: there}
""")
# Fields of language models, with task instruction.
LANGUAGE = flat("""
model: {split_fused: true, remat: dots, attention: xla, loss_chunk: 64}
data: {template: plain, answers: last, packing: true, column_names: {prompt: question}}
train: {prompt: "Why?", label_smoothing: 0.1}
""")
# Fields of task generation.
GENERATION = flat("""
generation: {beams: 7, length_penalty: 0.5, no_repeat_ngram: 3, early_stopping: never, max_new_tokens: 9,
  inputs: 5, batch_size: 2}
""")
# Set together.
PROCESSES = flat('distributed: {coordinator: "host:1234", processes: 4, process_id: 3}')
OTHER_PROCESSES = flat('distributed: {coordinator: "host:1", processes: 8, process_id: 0}')
# These replace data.path.
FILES = flat("data: {train: a.csv, validation: b.csv, test: c.csv}")
# Every field: a value away from its default, and the settings without which this value is rejected.
FIELDS = {
    **{name: (given, {}) for name, given in OTHER.items()},
    **{name: (given, {"task": "instruction"}) for name, given in LANGUAGE.items()},
    **{name: (given, {"task": "generation"}) for name, given in GENERATION.items()},
    **{name: (given, OTHER_PROCESSES) for name, given in PROCESSES.items()},
    **{name: (given, {"data.path": None, "data.train": "d.csv"}) for name, given in FILES.items()},
    "model.quantize_exclude": (["head"], {"model.quantize": "nf4"}),
    "data.metrics": (["f1"], {}),
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
