"""Ranges of settings, and which go together."""

import dataclasses
import math

import pytest

from loraplus_jax.data.options import DataOptions
from loraplus_jax.settings.parsing import parse_settings, setting_fields, settings_from_json
from loraplus_jax.settings.schema import PATH_FIELDS, MeshSettings
from loraplus_jax.sweep.settings import SweepRun

from ..refusals import refusals
from .values import FIELDS, LEAST, PROCESSES, nested, parsed, parsing


def rejected(values):
    return lambda: settings_from_json(nested(values))


def idle(name, others, *words):
    """A row: a field next to others with which it has no effect. With which it has one is proved by `FIELDS`."""
    return (rejected(others | {name: FIELDS[name][0]}), name, *words)


TASKS = ("task", "instruction", "multiple_choice", "classification")
OF_ENCODERS = ("model.pooling", "model.dropout", "model.head_dropout", "data.text_pair")
OF_ENCODERS += ("data.metrics", "data.delimiter", "data.quoting", "data.header")
OF_GLUE = ("text", "text_pair", "label", "metrics", "delimiter", "quoting", "header", "test_fraction")
SPLIT = {"data.path": None, "data.train": "a.csv", "data.validation": "b.csv"}
TEXTS = {"task": "generation"}
SCHEDULES = ("linear", "cosine", "wsd", "constant")
test_a_field_without_effect_is_rejected = refusals(
    *(
        idle(name, {"task": "instruction"}, "task", "classification", "regression", "instruction")
        for name in OF_ENCODERS
    ),
    *(idle(f"data.{name}", {"data.path": "glue/rte"}, "data.path glue/rte") for name in OF_GLUE),
    idle("data.root", {}, "data.path", "glue/sst2", "d"),
    idle("model.remat", {}, *TASKS),
    idle("train.prompt", {}, *TASKS),
    idle("train.prompt_tokens", {"task": "instruction"}, "train.prompt", "null"),
    idle("data.answers", {"task": "multiple_choice"}, "task", "multiple_choice"),
    idle("generation.no_repeat_in", TEXTS, "generation.no_repeat_ngram", 0),
    idle("generation.length_penalty", TEXTS | {"generation.beams": 1}, "generation.beams", 1),
    idle("generation.early_stopping", TEXTS | {"generation.beams": 1}, "generation.beams", 1),
    idle("data.validation", {}, "data.train", "null"),
    idle("data.test", {}, "data.train", "null"),
    idle("data.test_fraction", SPLIT, "data.path", "null"),
    idle("data.validation_fraction", SPLIT, "data.validation", "null", "b.csv"),
    idle("data.split_seed", SPLIT, "data.validation", "null", "b.csv"),
    idle("optimizer.decay_steps", {}, "optimizer.schedule", "wsd"),
    idle("optimizer.final_fraction", {"optimizer.schedule": "constant"}, "optimizer.schedule", *SCHEDULES),
    idle("optimizer.decay", {}, "optimizer.weight_decay"),
    idle("optimizer.magnitude_learning_rate", {}, "lora.variant", "dora", "lora"),
    idle("train.theory_every", {"method": "full"}, "method", "lora_plus", "lora", "full"),
    idle("train.theory_every", {"lora.variant": "dora"}, "lora.variant", "lora", "dora"),
    *(
        idle(f"distributed.{name}", {}, "distributed.coordinator", "null")
        for name in ("start_timeout", "lost_timeout", "processes", "process_id")
    ),
    idle("init_adapter_rates", {}, "init_adapter", "null"),
)


def test_separate_files_are_split_where_no_validation_file_is_given(tmp_path):
    flags = ("--data.path=null", "--data.train=a.csv", "--data.split_seed=3")
    assert parsed(tmp_path, *flags, "--data.validation_fraction=0.3").data.validation_fraction == 0.3
    # A limit draws by the seed too.
    assert parsed(tmp_path, *flags, "--data.validation=b.csv", "--data.limit=5").data.split_seed == 3
    assert DataOptions(path="glue/rte", validation_fraction=0.8).test_fraction == 0.2  # which GLUE ignores


def test_processes_are_set_together(tmp_path):
    words = {name: (f"--{name}", str(given)) for name, given in PROCESSES.items()}
    found = parsed(tmp_path, *(w for pair in words.values() for w in pair)).distributed
    assert (found.coordinator, found.processes, found.process_id) == ("host:1234", 4, 3)
    for name in PROCESSES:
        rest = [w for other, pair in words.items() if other != name for w in pair]
        with pytest.raises(ValueError, match=r"distributed\.\w+.* distributed\.\w+"):
            parsed(tmp_path, *rest)
    assert parsed(tmp_path, "--distributed.coordinator", "auto").distributed.coordinator == "auto"


def process(name, given):
    wanted = PROCESSES | {f"distributed.{name}": given}
    return parsing(*(f"--{n}={v}" for n, v in wanted.items()))


test_invalid_processes_are_rejected = refusals(
    (process("coordinator", "host"), "distributed.coordinator", "HOST:PORT", 1, 65535, "auto", "'host'"),
    (process("coordinator", "host:0"), "distributed.coordinator", "HOST:PORT", "'host:0'"),
    (process("coordinator", "host:65536"), "distributed.coordinator", "HOST:PORT", "'host:65536'"),
    (process("process_id", 4), "distributed.process_id", 0, 3, 4),
    (process("processes", 0), "distributed.processes", 1, 0),
    (process("lost_timeout", 0), "distributed.lost_timeout", 1, 0),
)


RATES = ("learning_rate", "head_learning_rate", "eps", "max_grad_norm")
COUNTS = ["steps", "early_stopping", "batch_size", "accumulate", "eval_batch_size", "eval_every", "log_every"]
COUNTS += ["keep", "max_skipped"]
test_ranges = refusals(
    *(
        (rejected({name: value}), name, value)
        for names, values in [
            (("model.dropout", "model.head_dropout"), (-0.1, 1.0, math.nan)),
            ([f"optimizer.{name}" for name in RATES], (0.0, -1.0, math.inf, math.nan, True)),
            (("optimizer.b1", "optimizer.b2", "optimizer.final_fraction"), (-0.1, 1.0)),
            (["optimizer.weight_decay"], (-0.1, math.inf)),
            (["optimizer.warmup_steps"], (-1, 1.0)),
            (["optimizer.decay_steps"], [0]),
            ([f"train.{name}" for name in COUNTS], (0, -1, 1.0, True)),
            (["train.epochs"], (0.0, math.inf)),
            (["generation.length_penalty"], (-5.5, 7.0)),
        ]
        for name in names
        for value in values
    ),
    (rejected({"seed": -1}), "seed", 0, -1),
    *((parsing(f"--{name}", "  "), name, "empty") for name in ("output_dir", "init_adapter")),
)


test_fields_that_do_not_go_together = refusals(
    (lambda tmp_path: parse_settings(tmp_path / "absent"), "absent"),
    (rejected({"train.steps": 3, "train.epochs": 2}), "--train.steps null", "--train.epochs null", 3, 2.0),
    (rejected({"train.batch_size": 8, "train.accumulate": 3}), "train.accumulate", "train.batch_size", 3, 8),
)


def data(**fields):
    return lambda: settings_from_json(LEAST | {"data": fields})


test_data_settings_that_are_rejected = refusals(
    (data(path="a", train="b"), "path", "'a'", "train", "'b'"),
    (data(path="a", test="b"), "test", "train"),
    (data(path="a", validation="b"), "validation", "train"),
    (data(path=" "), "path", "' '"),
    (data(path=3), "path", 3),
    (data(path="a", text=None), "text", None),
    (data(path="a", label=""), "label", "''"),
    (data(path="a", label="text"), "text", "label", "different"),
    (data(path="a", text_pair="label"), "text_pair", "label", "different"),
    (data(path="a", max_length=1), "max_length", 2, 1),
    (data(path="a", max_length=8.0), "max_length", 8.0),
    (data(path="a", split_seed=-1), "split_seed", 0, -1),
    (data(path="a", split_seed=True), "split_seed", True),
    (data(path="a", validation_fraction=0.0), "validation_fraction", 0.0),
    (data(path="a", validation_fraction=1), "validation_fraction", 1),
    (data(path="a", test_fraction=-0.1), "test_fraction", -0.1),
    (data(path="a", test_fraction=math.nan), "test_fraction", "nan"),
    (data(path="a", test_fraction=0.5, validation_fraction=0.5), "validation_fraction", "test_fraction", 0.5),
    (data(path="a.csv", header=("stars", "text")), "data.header", "text, label", "stars, text"),
)


def test_the_method_decides_what_is_applied(tmp_path):
    plus = parsed(tmp_path, "--lora.modules_to_save", "[pooler]").applied
    assert plus is not None
    assert (plus.lr_ratio, plus.modules_to_save) == (4.0, ("pooler", "head"))
    lora = parsed(tmp_path, "--method", "lora").applied
    assert lora is not None
    assert (lora.lr_ratio, lora.modules_to_save) == (1.0, ("head",))
    assert dataclasses.replace(lora, lr_ratio=4.0, modules_to_save=plus.modules_to_save) == plus
    full = parsed(tmp_path, "--method", "full")
    assert (full.applied, full.lr_ratio) == (None, 1.0)
    again = parsed(tmp_path, "--lora.modules_to_save", "[head]").applied
    assert again is not None
    assert again.modules_to_save == ("head",)


def test_what_a_task_is_made_from_is_that_of_the_settings(tmp_path):
    sizes = {"batch_size": 12, "accumulate": 3, "eval_batch_size": 5, "label_smoothing": 0.25}
    words = [word for name, value in sizes.items() for word in (f"--train.{name}", str(value))]
    settings = parsed(tmp_path, "--task", "instruction", *words)
    options = settings.task_options
    assert {name: getattr(options, name) for name in sizes} == sizes
    assert (options.kind, options.model, options.data) == ("instruction", settings.model, settings.data)
    assert options.generation is settings.generation


def test_settings_are_frozen_and_need_names():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MeshSettings().data = 3  # pyright: ignore
    with pytest.raises(ValueError, match="positional"):
        MeshSettings(3)  # pyright: ignore


def test_data_settings_with_separate_files_may_leave_out_validation_and_test():
    assert DataOptions(train="a", text_pair="b").columns == ("text", "b", "label")


def test_settings_of_a_model_alone_have_no_data():
    """As an adapter has that was trained elsewhere; those of a config must have data."""
    assert settings_from_json(LEAST | {"data": {}}).data.sources == ()


def test_the_settings_that_are_paths_exist():
    assert {*PATH_FIELDS} <= {field.name for field in setting_fields(SweepRun)}
    assert len({*PATH_FIELDS}) == len(PATH_FIELDS)
