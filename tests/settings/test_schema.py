"""Ranges of settings, and which go together."""

import dataclasses

import pytest

from loraplus_jax.settings.parsing import parse_settings, setting_fields
from loraplus_jax.settings.schema import (
    DataSettings,
    MeshSettings,
    ModelSettings,
    OptimizerSettings,
    TrainSettings,
)

from ..messages import mentions
from .values import PROCESSES, parsed, value

TALK = ("--task", "instruction")
TEXTS = ("--task", "generation")
NGRAM, ONE_BEAM = ("--generation.no_repeat_ngram", "3"), ("--generation.beams", "1")
WORLD = tuple(f"--{name}={given}" for name, given in PROCESSES.items())
FILES = ("--data.path", "null", "--data.train", "a.csv")
FILES_OF_EACH = (*FILES, "--data.validation", "b.csv")


# Fields that a GLUE task brings itself.
GLUE_FIELDS = {
    "text": "sentence",
    "text_pair": "second",
    "label": "class",
    "delimiter": ";",
    "quoting": "none",
    "header": "[text, label]",
    "test_fraction": "0.3",
}


OF_ENCODERS = {
    "model.pooling": "cls",
    "model.dropout": "0.3",
    "model.head_dropout": "0.3",
    "data.text_pair": "second",
    "data.delimiter": ";",
    "data.quoting": "none",
    "data.header": "[text, label]",
}


# A field and a value, with what it has no effect, with what it has one, and what the message names of it.
@pytest.mark.parametrize(
    ("name", "given", "without", "needed", "words"),
    [
        *(
            (name, given, TALK, (), ("task", "classification", "regression", "instruction"))
            for name, given in OF_ENCODERS.items()
        ),
        ("data.root", "glue", (), ("--data.path", "glue/rte"), ("data.path", "glue/sst2", "d")),
        *(
            (f"data.{name}", given, ("--data.path", "glue/rte"), (), ("data.path glue/rte",))
            for name, given in GLUE_FIELDS.items()
        ),
        ("model.remat", "dots", (), TALK, ("task", "instruction", "multiple_choice", "classification")),
        ("train.prompt", "Why?", (), TALK, ("task", "instruction", "multiple_choice", "classification")),
        ("train.prompt_tokens", "9", TALK, (*TALK, "--train.prompt", "Why?"), ("train.prompt", "null")),
        ("data.answers", "last", ("--task", "multiple_choice"), TALK, ("task", "multiple_choice")),
        ("generation.no_repeat_in", "all", TEXTS, (*TEXTS, *NGRAM), ("generation.no_repeat_ngram", 0)),
        ("generation.length_penalty", "2", (*TEXTS, *ONE_BEAM), TEXTS, ("generation.beams", 1)),
        ("generation.early_stopping", "never", (*TEXTS, *ONE_BEAM), TEXTS, ("generation.beams", 1)),
        ("data.validation", "b.csv", (), FILES, ("data.train", "null")),
        ("data.test", "b.csv", (), FILES, ("data.train", "null")),
        ("data.test_fraction", "0.3", FILES, (), ("data.path", "null")),
        ("data.validation_fraction", "0.3", FILES_OF_EACH, FILES, ("data.validation", "null", "b.csv")),
        ("data.split_seed", "3", FILES_OF_EACH, FILES, ("data.validation", "null", "b.csv")),
        ("optimizer.decay_steps", "5", (), ("--optimizer.schedule", "wsd"), ("optimizer.schedule", "wsd")),
        (
            *("optimizer.final_fraction", "0.1", ("--optimizer.schedule", "constant"), ()),
            ("optimizer.schedule", "linear", "cosine", "wsd", "constant"),
        ),
        ("optimizer.decay", "equal", (), ("--optimizer.weight_decay", "0.1"), ("optimizer.weight_decay",)),
        ("train.theory_every", "5", ("--method", "full"), (), ("method", "lora_plus", "lora", "full")),
        (
            *("train.theory_every", "5", ("--lora.variant", "dora"), ()),
            ("lora.variant", "lora", "dora"),
        ),
        (
            *("optimizer.magnitude_learning_rate", "1e-3", (), ("--lora.variant", "dora")),
            ("lora.variant", "dora", "lora"),
        ),
        ("distributed.start_timeout", "20", (), WORLD, ("distributed.coordinator", "null")),
        ("distributed.lost_timeout", "20", (), WORLD, ("distributed.coordinator", "null")),
        ("distributed.processes", "4", (), WORLD[::2], ("distributed.coordinator", "null")),
        ("distributed.process_id", "1", (), WORLD[:2], ("distributed.coordinator", "null")),
        ("init_adapter_rates", "new", (), ("--init_adapter", "old"), ("init_adapter", "null")),
    ],
)
def test_a_field_without_effect_is_rejected(tmp_path, name, given, without, needed, words):
    default = next(field.default for field in setting_fields() if field.name == name)
    assert value(parsed(tmp_path, f"--{name}", given, *needed), name) != default
    with pytest.raises(ValueError, match=mentions(name, *words)) as caught:
        parsed(tmp_path, f"--{name}", given, *without)
    assert "\n" not in str(caught.value)


def test_a_limit_draws_by_the_split_seed_too(tmp_path):
    flags = ("--data.split_seed", "3", "--data.limit", "5", *FILES_OF_EACH)
    assert parsed(tmp_path, *flags).data.split_seed == 3


def test_processes_are_set_together(tmp_path):
    words = {name: (f"--{name}", str(given)) for name, given in PROCESSES.items()}
    found = parsed(tmp_path, *(w for pair in words.values() for w in pair)).distributed
    assert (found.coordinator, found.processes, found.process_id) == ("host:1234", 4, 3)
    for name in PROCESSES:
        rest = [w for other, pair in words.items() if other != name for w in pair]
        with pytest.raises(ValueError, match=r"distributed\.\w+.* distributed\.\w+"):
            parsed(tmp_path, *rest)
    assert parsed(tmp_path, "--distributed.coordinator", "auto").distributed.coordinator == "auto"


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("coordinator", "host", ["HOST:PORT", 1, 65535, "auto", "'host'"]),
        ("coordinator", "host:0", ["HOST:PORT", "'host:0'"]),
        ("coordinator", "host:65536", ["HOST:PORT", "'host:65536'"]),
        ("process_id", "4", [0, 3, 4]),
        ("processes", "0", [1, 0]),
        ("lost_timeout", "0", [1, 0]),
    ],
)
def test_invalid_processes_are_rejected(tmp_path, name, given, words):
    wanted = PROCESSES | {f"distributed.{name}": given}
    with pytest.raises(ValueError, match=mentions(f"distributed.{name}", *words)):
        parsed(tmp_path, *(w for n, v in wanted.items() for w in (f"--{n}", str(v))))


@pytest.mark.parametrize(
    ("section", "field", "bad"),
    [
        *(
            (ModelSettings, name, bad)
            for name in ("dropout", "head_dropout")
            for bad in (-0.1, 1.0, float("nan"))
        ),
        *(
            (OptimizerSettings, name, bad)
            for name in ("learning_rate", "head_learning_rate", "eps", "max_grad_norm")
            for bad in (0.0, -1.0, float("inf"), float("nan"), True)
        ),
        *((OptimizerSettings, name, bad) for name in ("b1", "b2") for bad in (-0.1, 1.0)),
        (OptimizerSettings, "weight_decay", -0.1),
        (OptimizerSettings, "weight_decay", float("inf")),
        (OptimizerSettings, "final_fraction", 1.0),
        (OptimizerSettings, "final_fraction", -0.1),
        (OptimizerSettings, "warmup_steps", -1),
        (OptimizerSettings, "warmup_steps", 1.0),
        (OptimizerSettings, "decay_steps", 0),
        *(
            (TrainSettings, name, bad)
            for name in (
                *("steps", "early_stopping", "batch_size", "accumulate"),
                *("eval_batch_size", "eval_every", "log_every", "keep", "max_skipped"),
            )
            for bad in (0, -1, 1.0, True)
        ),
        (TrainSettings, "epochs", 0.0),
        (TrainSettings, "epochs", float("inf")),
    ],
)
def test_ranges(section, field, bad):
    needed = {"path": "m"} if section is ModelSettings else {}
    with pytest.raises((TypeError, ValueError), match=mentions(field, bad)):
        section(**needed, **{field: bad})


def test_fields_that_do_not_go_together():
    with pytest.raises(ValueError, match=mentions("--train.steps null", "--train.epochs null", 3, 2)):
        TrainSettings(steps=3, epochs=2)
    with pytest.raises(ValueError, match=mentions("train.accumulate", "train.batch_size", 3, 8)):
        TrainSettings(batch_size=8, accumulate=3)
    with pytest.raises(ValueError, match=mentions("optimizer.final_fraction", "linear", "cosine", "wsd")):
        OptimizerSettings(schedule="constant", final_fraction=0.1)


def test_the_top_level_is_checked(tmp_path):
    with pytest.raises(ValueError, match=mentions("seed", 0, -1)):
        parsed(tmp_path, "--seed", "-1")
    for name in ("output_dir", "init_adapter"):
        with pytest.raises(ValueError, match=mentions(name, "empty")):
            parsed(tmp_path, f"--{name}", "  ")
    with pytest.raises(ValueError, match=mentions(tmp_path / "absent")):
        parse_settings(tmp_path / "absent")


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


def test_settings_are_frozen_and_need_names():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MeshSettings().data = 3  # pyright: ignore
    with pytest.raises(ValueError, match="positional"):
        MeshSettings(3)  # pyright: ignore


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, ["path", "train", None]),
        ({"path": "a", "train": "b"}, ["path", "'a'", "train", "'b'"]),
        ({"path": "a", "test": "b"}, ["test", "train"]),
        ({"path": "a", "validation": "b"}, ["validation", "train"]),
        ({"path": " "}, ["path", "' '"]),
        ({"path": 3}, ["path", 3]),
        ({"path": "a", "text": None}, ["text", None]),
        ({"path": "a", "label": ""}, ["label", "''"]),
        ({"path": "a", "label": "text"}, ["text", "label", "different"]),
        ({"path": "a", "text_pair": "label"}, ["text_pair", "label", "different"]),
        ({"path": "a", "max_length": 1}, ["max_length", 2, 1]),
        ({"path": "a", "max_length": 8.0}, ["max_length", 8.0]),
        ({"path": "a", "split_seed": -1}, ["split_seed", 0, -1]),
        ({"path": "a", "split_seed": True}, ["split_seed", True]),
        ({"path": "a", "validation_fraction": 0.0}, ["validation_fraction", 0.0]),
        ({"path": "a", "validation_fraction": 1}, ["validation_fraction", 1]),
        ({"path": "a", "test_fraction": -0.1}, ["test_fraction", -0.1]),
        ({"path": "a", "test_fraction": float("nan")}, ["test_fraction", "nan"]),
        (
            {"path": "a", "test_fraction": 0.5, "validation_fraction": 0.5},
            ["validation_fraction", "test_fraction", 0.5],
        ),
    ],
)
def test_data_settings_that_are_rejected(fields, named):
    with pytest.raises((TypeError, ValueError), match=mentions(*named)):
        DataSettings(**fields)


def test_data_settings_with_separate_files_may_leave_out_validation_and_test():
    assert DataSettings(train="a", text_pair="b").columns == ("text", "b", "label")
    with pytest.raises(ValueError, match=mentions("data.header", "text, label", "stars, text")):
        DataSettings(path="a.csv", header=("stars", "text"))
