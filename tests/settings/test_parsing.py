"""Every field is read from files, JSON and the command line; unknown keys and wrong types."""

import dataclasses
import json

import pytest

from loraplus_jax.settings.parsing import format_settings, setting_fields, settings_from_json
from loraplus_jax.settings.schema import QUERIES_AND_VALUES, Settings

from ..messages import mentions
from .values import FILES, GENERATION, LANGUAGE, LEAST, OTHER, PROCESSES, nested, parsed, value


def dotted():
    return [field.name for field in setting_fields()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """All defaults."""
    return parsed(tmp_path_factory.mktemp("base"))


def test_the_tables_here_name_every_field():
    alone = {"optimizer.decay_steps", "optimizer.decay", "train.prompt_tokens", "init_adapter_rates"}
    alone |= {"generation.no_repeat_in"}
    alone |= {"model.quantize_exclude", "lora.init_iterations", "data.root"}
    alone |= {"optimizer.reg", "optimizer.magnitude_learning_rate", "optimizer.target_rank"}
    alone |= {"distributed.start_timeout", "distributed.lost_timeout", *PROCESSES}
    assert OTHER.keys() | LANGUAGE.keys() | GENERATION.keys() | FILES.keys() | alone == set(dotted())


@pytest.mark.parametrize("name", OTHER)
def test_every_field_is_read_from_the_file_and_from_the_command_line(tmp_path, base, name):
    given = OTHER[name]
    assert value(base, name) != given
    from_file = parsed(tmp_path, content=nested(name, given))
    word = json.dumps(given) if isinstance(given, list | bool | dict) else str(given)
    from_line = parsed(tmp_path, f"--{name}", word)
    assert value(from_file, name) == value(from_line, name) == given
    assert isinstance(value(from_file, name), type(given))
    assert from_file == from_line != base
    changed = [n for n in OTHER if value(from_file, n) != value(base, n)]
    # The default of lr_ratio follows the init.
    assert changed == (["lora.lr_ratio", "lora.init"] if name == "lora.init" else [name])


@pytest.mark.parametrize("name", [*LANGUAGE, *GENERATION])
def test_every_field_of_language_models_is_read_and_rejected_for_encoders(tmp_path, name):
    task, table = ("instruction", LANGUAGE) if name in LANGUAGE else ("generation", GENERATION)
    given = table[name]
    language = parsed(tmp_path, content=LEAST | {"task": task})
    from_file = parsed(tmp_path, content=nested(name, given) | {"task": task})
    word = json.dumps(given) if isinstance(given, bool | dict) else str(given)
    from_line = parsed(tmp_path, f"--{name}", word, "--task", task)
    assert value(language, name) != value(from_file, name) == value(from_line, name) == given
    assert [n for n in table if value(from_file, n) != value(language, n)] == [name]
    with pytest.raises(ValueError, match=mentions(name, task)):
        parsed(tmp_path, f"--{name}", word)


def test_separate_files(tmp_path):
    settings = parsed(tmp_path, "--data.path", "null", *(w for n, v in FILES.items() for w in (f"--{n}", v)))
    assert (settings.data.path, settings.data.train, settings.data.test) == (None, "a.csv", "c.csv")
    settings = parsed(
        tmp_path, "--data.path", "null", "--data.train", "[a.csv, b.csv]", "--data.test", "c.csv"
    )
    assert settings.data.files == {"train": ("a.csv", "b.csv"), "test": ("c.csv",)}
    assert settings_from_json(settings.to_json()) == settings
    for bad in ("[]", "[3]", " "):
        with pytest.raises(ValueError, match=mentions("data.train", "list")):
            parsed(tmp_path, "--data.path", "null", "--data.train", bad)


@pytest.mark.parametrize(
    ("name", "words", "found"),
    [
        ("lora.rank", ("--lora.rank", "3", "--lora.rank=4"), 4),  # the last one, and both before the file
        ("lora.target_modules", (), QUERIES_AND_VALUES),
        ("lora.target_modules", ("--lora.target_modules", ".*/query"), ".*/query"),
        ("lora.target_modules", ("--lora.target_modules", "[query, up]"), ["query", "up"]),
        ("optimizer.max_grad_norm", ("--optimizer.max_grad_norm", "null"), None),
        ("mesh.data", ("--mesh.data", "-1"), -1),
    ],
)
def test_what_words_of_the_command_line_mean(tmp_path, name, words, found):
    content = LEAST | {"lora": {"rank": 2}, "optimizer": {"max_grad_norm": 1.0}, "mesh": {"data": 1}}
    assert value(parsed(tmp_path, *words, content=content), name) == found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**LEAST, "optimiser": {}}, ["'optimiser'", "'optimizer'"]),
        (nested("lora.rnk", 1), ["lora", "'rnk'", "'rank'"]),
        (nested("train.epoch", 1), ["train", "'epoch'", "'epochs'"]),
        (nested("mesh.date", 1), ["mesh", "'date'", "'data'"]),
        ({**LEAST, "mesh": [1]}, ["mesh", "mapping", "[1]"]),
        ({**LEAST, "seed": "one"}, ["seed", "one"]),
        ({**LEAST, "seed": 1.5}, ["seed", "1.5"]),
        ({**LEAST, "method": "dora"}, ["method", "lora_plus", "dora"]),
        ({**LEAST, "task": "ranking"}, ["task", "regression", "ranking"]),
        (nested("model.dtype", "float16"), ["model.dtype", "bfloat16", "float16"]),
        (nested("model.unroll", "yes please"), ["model.unroll", "yes please"]),
        (nested("train.steps", 2.5), ["train.steps", "2.5"]),
        (nested("lora.rank", True), ["lora.rank", "True"]),
        (nested("lora.lr_ratio", 10**400), ["lora.lr_ratio"]),
        (nested("data.column_names", {"question": 1}), ["data.column_names[question]", "text", 1]),
        ({**LEAST, 1: 2}, ["config", 1]),
        ({**LEAST, True: "x"}, ["config", True]),
        ({**LEAST, "data": {3: 4}}, ["data", 3]),
        ({**LEAST, "lora": {1: 2}}, ["lora", 1]),
        (nested("lora.target_modules", [1]), ["lora.target_modules", "1"]),
        ({"data": {"path": "d"}, "output_dir": "o"}, ["model.path"]),
        ({"model": {"path": "m"}, "data": {"path": "d"}}, ["output_dir"]),
        ("- a list\n", ["mapping", "a list"]),
        (nested("train.steps", "many"), ["train.steps", "null", "'many'"]),
        (nested("data.delimiter", ";;"), ["data.delimiter", "one character", "';;'"]),
    ],
)
def test_keys_and_values_that_are_rejected(tmp_path, content, words):
    with pytest.raises(ValueError, match=mentions(*words)) as caught:
        parsed(tmp_path, content=content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("--lora.rnk", "3"), ["--lora.rnk", "'lora.rank'"]),
        (("--rank=3",), ["--rank", "'lora.rank'"]),
        (("--lora.ran", "3"), ["--lora.ran", "'lora.rank'"]),
        (("--lora", "{rank: 3}"), ["--lora"]),
        (("--config", "other.yaml"), ["--config"]),
        (("--seed",), ["--seed"]),
        (("--seed", "x"), ["seed", "x"]),
        (("stray",), ["stray"]),
    ],
)
def test_overrides_that_are_rejected(tmp_path, overrides, words):
    with pytest.raises(ValueError, match=mentions(*words)):
        parsed(tmp_path, *overrides)


@pytest.mark.parametrize("target", ["[query, up]", ".*/(query|up)"])
def test_json_and_yaml_round_trips(tmp_path, target):
    apart = ("train.epochs", "lora.target_modules", "train.theory_every")
    changes = {n: v for n, v in OTHER.items() if n not in apart}
    words = [
        w for n, v in changes.items() for w in (f"--{n}", json.dumps(v) if not isinstance(v, str) else v)
    ]
    settings = parsed(tmp_path, *words, "--lora.target_modules", target)
    plain = settings.to_json()
    assert settings_from_json(json.loads(json.dumps(plain))) == settings
    assert parsed(tmp_path, content=plain) == settings
    assert list(plain) == [field.name for field in dataclasses.fields(Settings)]


def test_json_with_an_unknown_key_names_the_nearest(tmp_path):
    plain = parsed(tmp_path).to_json()
    plain["train"]["step"] = 3
    with pytest.raises(ValueError, match=mentions("train", "'step'", "'steps'")):
        settings_from_json(plain)


def test_help_says_what_every_field_means():
    text = " ".join(format_settings().split())
    for name in dotted():
        assert f"--{name}" in text
    assert "eta_A" in text
    assert "lambda" in text


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--lr", "optimizer.learning_rate"),
        ("--learning_rate", "optimizer.learning_rate"),
        ("--lora.r", "lora.rank"),
        ("--loraplus_lr_ratio", "lora.lr_ratio"),
        ("--batch_size", "train.batch_size"),
    ],
)
def test_names_of_other_libraries_are_recognized(tmp_path, option, name):
    with pytest.raises(ValueError, match=mentions(option, f"'{name}'")):
        parsed(tmp_path, option, "1")
