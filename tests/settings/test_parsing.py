"""Every field is read from files, JSON and the command line; unknown keys and wrong types."""

import dataclasses
import json

import pytest

from loraplus_jax.settings.parsing import (
    _format_problem,
    format_settings,
    parse_settings,
    setting_fields,
    settings_from_json,
)
from loraplus_jax.settings.schema import QUERIES_AND_VALUES, DeviceSettings, Settings

from ..messages import assert_mentions, mentions
from ..refusals import refusals
from .values import FIELDS, FILES, LEAST, OTHER, nested, parsed, parsing, value, write


def dotted():
    return [field.name for field in setting_fields()]


def test_the_table_names_every_field():
    assert FIELDS.keys() == set(dotted())


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_read_from_the_file_and_from_the_command_line(tmp_path, name):
    given, needed = FIELDS[name]
    base = parsed(tmp_path, content=nested(needed))
    assert value(base, name) != given
    from_file = parsed(tmp_path, content=nested(needed | {name: given}))
    word = json.dumps(given) if isinstance(given, list | bool | dict) else str(given)
    from_line = parsed(tmp_path, f"--{name}", word, content=nested(needed))
    assert value(from_file, name) == value(from_line, name) == given
    assert isinstance(value(from_file, name), type(given))
    assert from_file == from_line != base
    changed = [n for n in FIELDS if value(from_file, n) != value(base, n)]
    # The default of lr_ratio follows the init.
    assert changed == (["lora.lr_ratio", "lora.init"] if name == "lora.init" else [name])
    if needed:
        with pytest.raises(ValueError, match=mentions(name.removeprefix("data."), needed.get("task", ""))):
            parsed(tmp_path, f"--{name}", word)


def test_separate_files(tmp_path):
    settings = parsed(tmp_path, "--data.path", "null", *(w for n, v in FILES.items() for w in (f"--{n}", v)))
    assert (settings.data.path, settings.data.train, settings.data.test) == (None, "a.csv", "c.csv")
    settings = parsed(tmp_path, "--data.path=null", "--data.train=[a.csv, b.csv]", "--data.test=c.csv")
    assert settings.data.files == {"train": ("a.csv", "b.csv"), "test": ("c.csv",)}
    assert settings_from_json(settings.to_json()) == settings


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


def test_a_setting_that_is_passed_twice_is_logged(tmp_path, capsys):
    config, messages = write(tmp_path, LEAST), []
    again = ("--seed", "1", "--lora.rank=3", "--lora.rank", "3", "--seed=2")
    assert parse_settings(config, again[:-1], log=messages.append).seed == 1
    assert not messages
    assert parse_settings(config, again, log=messages.append).seed == 2
    (message,) = messages
    assert_mentions(message, "--seed", "twice", 1, 2)
    parse_settings(config, again)
    assert capsys.readouterr() == ("", "")


def setting(name, given):
    return parsing(content=nested({name: given}))


test_keys_and_values_that_are_rejected = refusals(
    (setting("optimiser", {}), "'optimiser'", "'optimizer'"),
    (setting("lora.rnk", 1), "lora", "'rnk'", "'rank'"),
    (lambda: settings_from_json(nested({"train.step": 3})), "train", "'step'", "'steps'"),
    (setting("mesh", [1]), "mesh", "mapping", "[1]"),
    (setting("seed", "one"), "seed", "one"),
    (setting("method", "dora"), "method", "lora_plus", "dora"),
    (setting("task", "ranking"), "task", "regression", "ranking"),
    (setting("model.dtype", "float16"), "model.dtype", "bfloat16", "float16"),
    (setting("model.unroll", "yes please"), "model.unroll", "yes please"),
    (setting("train.steps", 2.5), "train.steps", "2.5"),
    (setting("train.steps", "many"), "train.steps", "null", "'many'"),
    (setting("lora.rank", True), "lora.rank", "True"),
    (setting("lora.lr_ratio", 10**400), "lora.lr_ratio"),
    (setting("lora.target_modules", [1]), "lora.target_modules", "1"),
    (setting("data.column_names", {"question": 1}), "data.column_names[question]", "text", 1),
    (setting("data.delimiter", ";;"), "data.delimiter", "one character", "';;'"),
    (parsing("--data.path=null"), "data", "path", "train", "neither"),
    *((parsing("--data.path=null", f"--data.train={x}"), "data.train", "list") for x in ("[]", "[3]", " ")),
    (parsing(content={**LEAST, 1: 2}), "config", 1),
    (setting("data", {3: 4}), "data", 3),
    (parsing(content={"data": {"path": "d"}, "output_dir": "o"}), "model.path"),
    (parsing(content={"model": {"path": "m"}, "data": {"path": "d"}}), "output_dir"),
    (parsing(content="- a list\n"), "mapping", "a list"),
)


test_overrides_that_are_rejected = refusals(
    (parsing("--lora.rnk", "3"), "--lora.rnk", "'lora.rank'"),
    (parsing("--rank=3"), "--rank", "'lora.rank'"),
    (parsing("--lora.ran", "3"), "--lora.ran", "'lora.rank'"),
    (parsing("--lora", "{rank: 3}"), "--lora"),
    (parsing("--config", "other.yaml"), "--config"),
    (parsing("--seed"), "--seed"),
    (parsing("--seed", "x"), "seed", "x"),
    (parsing("stray"), "stray"),
)


test_names_of_other_libraries_are_recognized = refusals(
    (parsing("--lr", "1"), "--lr", "'optimizer.learning_rate'"),
    (parsing("--learning_rate", "1"), "--learning_rate", "'optimizer.learning_rate'"),
    (parsing("--lora.r", "1"), "--lora.r", "'lora.rank'"),
    (parsing("--loraplus_lr_ratio", "1"), "--loraplus_lr_ratio", "'lora.lr_ratio'"),
    (parsing("--batch_size", "1"), "--batch_size", "'train.batch_size'"),
)


def test_what_a_command_lacks_is_not_suggested_and_any_cause_has_a_message():
    with pytest.raises(ValueError, match=r"^unknown option --lora\.r$"):
        parse_settings(None, ["--lora.r", "4"], DeviceSettings)
    problem = {"type": "odd", "loc": ("new", 1), "msg": "is odd", "input": 3}
    assert _format_problem({}, "new", problem) == "new.1: is odd, got 3"


@pytest.mark.parametrize("target", ["[query, up]", ".*/(query|up)"])
def test_json_and_yaml_round_trips(tmp_path, target):
    apart = ("train.epochs", "lora.target_modules", "train.theory_every")
    changes = {n: v for n, v in OTHER.items() if n not in apart}
    words = [f"--{n}={v if isinstance(v, str) else json.dumps(v)}" for n, v in changes.items()]
    settings = parsed(tmp_path, *words, "--lora.target_modules", target)
    plain = settings.to_json()
    assert settings_from_json(json.loads(json.dumps(plain))) == settings
    assert parsed(tmp_path, content=plain) == settings
    assert list(plain) == [field.name for field in dataclasses.fields(Settings)]


def test_help_says_what_every_field_means():
    text = " ".join(format_settings().split())
    for name in dotted():
        assert f"--{name}" in text
    assert "eta_A" in text
    assert "lambda" in text
