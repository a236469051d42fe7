import dataclasses
import json
import re

import pytest
import yaml

from loraplus_jax.settings.parsing import parse_settings, settings_from_json, settings_parser
from loraplus_jax.settings.schema import (
    QUERIES_AND_VALUES,
    DataSettings,
    MeshSettings,
    ModelSettings,
    OptimizerSettings,
    Settings,
    TrainSettings,
)

LEAST = {"model": {"path": "m"}, "data": {"path": "d"}, "output_dir": "o"}


# Every field of the sections, away from its default, as it stands in YAML.
OTHER = {
    "model.path": "elsewhere",
    "model.pooling": "cls",
    "model.dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.dropout": 0.2,
    "model.head_dropout": 0.3,
    "model.unroll": True,
    "data.path": "other.csv",
    "data.text": "sentence",
    "data.text_pair": "second",
    "data.label": "class",
    "data.max_length": 32,
    "data.validation_fraction": 0.2,
    "data.test_fraction": 0.1,
    "data.split_seed": 3,
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
    "lora.bias": "all",
    "optimizer.embedding_learning_rate": 1e-3,
    "optimizer.policy": "peft",
    "optimizer.learning_rate": 2e-3,
    "optimizer.head_learning_rate": 1e-2,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 4,
    "optimizer.final_fraction": 0.1,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.99,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.decay": "equal",
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
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 4,
    "distributed.start_timeout": 20,
    "distributed.lost_timeout": 20,
    "task": "regression",
    "method": "lora",
    "init_adapter": "old_run",
    "seed": 9,
    "output_dir": "there",
}


# Fields of language models, with task instruction.
LANGUAGE = {
    "model.remat": "dots",
    "model.attention": "xla",
    "model.loss_chunk": 64,
    "data.template": "plain",
    "data.answers": "last",
    "data.packing": True,
    "data.column_names": {"prompt": "question"},
    "train.prompt": "Why?",
}


# Alone they are refused: they go together.
PROCESSES = {
    "distributed.coordinator": "host:1234",
    "distributed.processes": 4,
    "distributed.process_id": 3,
}


# Alone they are refused: they go with data.train in place of data.path.
FILES = {"data.train": "a.csv", "data.validation": "b.csv", "data.test": "c.csv"}


def write(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def parsed(tmp_path, *overrides, content=None):
    return parse_settings(write(tmp_path, LEAST if content is None else content), overrides)


def value(settings, name):
    for part in name.split("."):
        settings = getattr(settings, part)
    return list(settings) if isinstance(settings, tuple) else settings


def nested(name, given):
    section, _, field = name.rpartition(".")
    least = json.loads(json.dumps(LEAST))
    place = least.setdefault(section, {}) if section else least
    place[field] = given
    return least


def dotted():
    for field in dataclasses.fields(Settings):
        if dataclasses.is_dataclass(field.type):
            yield from (f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.type))
        else:
            yield field.name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """All defaults."""
    return parsed(tmp_path_factory.mktemp("base"))


def test_the_tables_here_name_every_field():
    alone = {"optimizer.decay_steps", "train.prompt_tokens", "init_adapter_rates"} | PROCESSES.keys()
    assert OTHER.keys() | LANGUAGE.keys() | FILES.keys() | alone == set(dotted())


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
    assert changed == [name]


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_field_of_language_models_is_read_and_refused_for_encoders(tmp_path, name):
    given = LANGUAGE[name]
    language = parsed(tmp_path, content=LEAST | {"task": "instruction"})
    from_file = parsed(tmp_path, content=nested(name, given) | {"task": "instruction"})
    word = json.dumps(given) if isinstance(given, bool | dict) else str(given)
    from_line = parsed(tmp_path, f"--{name}", word, "--task", "instruction")
    assert value(language, name) != value(from_file, name) == value(from_line, name) == given
    assert [n for n in LANGUAGE if value(from_file, n) != value(language, n)] == [name]
    with pytest.raises(ValueError, match=f"{name} goes with the tasks? instruction"):
        parsed(tmp_path, f"--{name}", word)


@pytest.mark.parametrize("name", ["model.pooling", "model.dropout", "model.head_dropout", "data.text_pair"])
def test_fields_of_encoders_are_refused_for_language_models(tmp_path, name):
    content = nested(name, OTHER[name]) | {"task": "multiple_choice"}
    with pytest.raises(ValueError, match=f"{name} goes with the tasks classification and regression"):
        parsed(tmp_path, content=content)


def test_answers_and_their_length_go_with_what_they_need(tmp_path):
    with pytest.raises(ValueError, match=r"answers goes with the task instruction, .* is multiple_choice"):
        parsed(tmp_path, "--data.answers", "last", "--task", "multiple_choice")
    with pytest.raises(ValueError, match=r"prompt_tokens goes with train\.prompt, which is not set"):
        parsed(tmp_path, "--train.prompt_tokens", "9", "--task", "instruction")
    settings = parsed(
        tmp_path, "--train.prompt", "Why?", "--train.prompt_tokens", "9", "--task", "instruction"
    )
    assert settings.train.prompt_tokens == 9
    with pytest.raises(ValueError, match=r"train\.prompt is empty"):
        parsed(tmp_path, "--train.prompt", " ", "--task", "instruction")


def test_steps_of_decay_go_with_their_schedule(tmp_path):
    wsd = ("--optimizer.schedule", "wsd", "--optimizer.decay_steps")
    assert parsed(tmp_path, *wsd, "5").optimizer.decay_steps == 5
    with pytest.raises(ValueError, match="decay_steps goes with wsd, and the schedule is linear"):
        parsed(tmp_path, "--optimizer.decay_steps", "5")
    with pytest.raises(ValueError, match="decay_steps must be a whole number of at least 1, got 0"):
        parsed(tmp_path, *wsd, "0")


def test_separate_files(tmp_path):
    settings = parsed(tmp_path, "--data.path", "null", *(w for n, v in FILES.items() for w in (f"--{n}", v)))
    assert (settings.data.path, settings.data.train, settings.data.test) == (None, "a.csv", "c.csv")


def test_processes_are_told_together(tmp_path):
    words = {name: (f"--{name}", str(given)) for name, given in PROCESSES.items()}
    found = parsed(tmp_path, *(w for pair in words.values() for w in pair)).distributed
    assert (found.coordinator, found.processes, found.process_id) == ("host:1234", 4, 3)
    for name in PROCESSES:
        rest = [w for other, pair in words.items() if other != name for w in pair]
        with pytest.raises(ValueError, match=r"distributed\.\w+ (goes with|is set, and)"):
            parsed(tmp_path, *rest)
    assert parsed(tmp_path, "--distributed.coordinator", "auto").distributed.coordinator == "auto"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("coordinator", "host", "must be HOST:PORT, of a port from 1 to 65535, or auto, got 'host'"),
        ("coordinator", "host:0", "must be HOST:PORT, .* got 'host:0'"),
        ("coordinator", "host:65536", "must be HOST:PORT, .* got 'host:65536'"),
        ("process_id", "4", "process_id must be from 0 to 3, got 4"),
        ("processes", "0", "processes must be a whole number of at least 1, got 0"),
        ("lost_timeout", "0", "lost_timeout must be a whole number of at least 1, got 0"),
    ],
)
def test_processes_that_cannot_be_are_refused(tmp_path, name, given, message):
    wanted = PROCESSES | {f"distributed.{name}": given}
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, *(w for n, v in wanted.items() for w in (f"--{n}", str(v))))


def test_the_command_line_wins_and_the_last_word_on_it(tmp_path):
    content = nested("lora.rank", 2)
    settings = parsed(tmp_path, "--lora.rank", "3", "--lora.rank=4", content=content)
    assert settings.lora.rank == 4
    assert settings.lora.target_modules == QUERIES_AND_VALUES


def test_one_regular_expression_and_a_list_are_told_apart(tmp_path):
    assert parsed(tmp_path, "--lora.target_modules", ".*/query").lora.target_modules == ".*/query"
    assert parsed(tmp_path, "--lora.target_modules", "[query, up]").lora.target_modules == ("query", "up")


def test_null_takes_an_optional_value_away(tmp_path):
    content = nested("optimizer.max_grad_norm", 1.0)
    assert (
        parsed(tmp_path, "--optimizer.max_grad_norm", "null", content=content).optimizer.max_grad_norm is None
    )


def test_negative_numbers_are_values(tmp_path):
    assert parsed(tmp_path, "--mesh.data", "-1").mesh.data == -1


def test_exponents_without_a_point_are_numbers(tmp_path):
    content = "model: {path: m}\ndata: {path: d}\noutput_dir: o\noptimizer: {learning_rate: 5e-4}\n"
    assert parsed(tmp_path, content=content).optimizer.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**LEAST, "optimiser": {}}, ["no key 'optimiser'", "did you mean 'optimizer'"]),
        (nested("lora.rnk", 1), ["lora: there is no key 'rnk'", "did you mean 'rank'"]),
        (nested("train.epoch", 1), ["train: there is no key 'epoch'", "did you mean 'epochs'"]),
        (nested("mesh.date", 1), ["mesh: there is no key 'date'", "did you mean 'data'"]),
        ({**LEAST, "mesh": [1]}, ["mesh must hold a mapping", "[1]"]),
        ({**LEAST, "seed": "one"}, ["seed", "one"]),
        ({**LEAST, "seed": 1.5}, ["seed", "1.5"]),
        ({**LEAST, "method": "dora"}, ["method", "lora_plus", "dora"]),
        ({**LEAST, "task": "ranking"}, ["task", "regression", "ranking"]),
        (nested("model.dtype", "float16"), ["model.dtype", "bfloat16", "float16"]),
        (nested("model.unroll", "yes please"), ["model.unroll", "yes please"]),
        (nested("train.steps", 2.5), ["train.steps", "2.5"]),
        (nested("lora.rank", True), ["lora.rank", "True"]),
        (nested("lora.lr_ratio", 10**400), ["too large"]),
        (nested("lora.target_modules", [1]), ["lora.target_modules", "1"]),
        ({"data": {"path": "d"}, "output_dir": "o"}, ["model.path"]),
        ({"model": {"path": "m"}, "data": {"path": "d"}}, ["output_dir"]),
        ("- a list\n", ["must hold a mapping", "a list"]),
        ("a: [\n", ["config.yaml is not YAML"]),
        ("a: !!python/name:os.system\n", ["config.yaml is not YAML"]),
        ("a: !!bool x\n", ["config.yaml is not YAML"]),
        ("a: !!timestamp x\n", ["config.yaml is not YAML"]),
        ("a: !!int ''\n", ["config.yaml is not YAML"]),
        ("a: !!set [x]\n", ["config.yaml is not YAML"]),
        ("a: 2001-99-99\n", ["config.yaml is not YAML", "month"]),
        (f"a: {'9' * 5000}\n", ["config.yaml is not YAML", "digits"]),
        ("a: " + "[" * 3000 + "]" * 3000, ["config.yaml is not YAML", "recursion"]),
        ("a: " + "[" * 150 + "]" * 150, ["config.yaml is nested more than 100 deep"]),
        ('a: "\\ud800"\n', ["config.yaml holds half a surrogate pair"]),
        ("a: &x [1, 1]\nb: [*x, *x]\n", ["config.yaml is not YAML", "aliases are not read", "line 2"]),
        ("a: 1" + " " * 2**16, ["config.yaml has 65540 bytes, at most 65536 are read"]),
        (nested("train.steps", "many"), ["train.steps must be a whole number or null, got 'many'"]),
    ],
)
def test_files_that_are_refused(tmp_path, content, words):
    with pytest.raises(ValueError, match=r"\w") as caught:
        parsed(tmp_path, content=content)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("--lora.rnk", "3"), ["no option --lora.rnk", "'lora.rank'"]),
        (("--rank=3",), ["no option --rank", "'lora.rank'"]),
        (("--lora.ran", "3"), ["no option --lora.ran", "'lora.rank'"]),
        (("--lora", "{rank: 3}"), ["no option --lora"]),
        (("--config", "other.yaml"), ["no option --config"]),
        (("--seed",), ["--seed"]),
        (("--seed", "x"), ["seed", "x"]),
        (("stray",), ["stray"]),
    ],
)
def test_overrides_that_are_refused(tmp_path, overrides, words):
    with pytest.raises(ValueError, match=r"\w") as caught:
        parsed(tmp_path, *overrides)
    for word in words:
        assert word in str(caught.value)


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
    with pytest.raises(ValueError, match=rf"\.{field} must be .*, got {bad}"):
        section(**needed, **{field: bad})


def test_fields_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"train\.steps or train\.epochs, not both: 3 and 2"):
        TrainSettings(steps=3, epochs=2)
    with pytest.raises(ValueError, match=r"accumulate must divide train\.batch_size, got 3 and 8"):
        TrainSettings(batch_size=8, accumulate=3)
    with pytest.raises(ValueError, match="final_fraction goes with linear, cosine or wsd"):
        OptimizerSettings(schedule="constant", final_fraction=0.1)


def test_the_top_level_is_checked(tmp_path):
    with pytest.raises(ValueError, match="seed must be a whole number of at least 0, got -1"):
        parsed(tmp_path, "--seed", "-1")
    with pytest.raises(ValueError, match="output_dir is empty"):
        parsed(tmp_path, "--output_dir", "  ")
    with pytest.raises(ValueError, match=r"there is no config file .*absent"):
        parse_settings(tmp_path / "absent")


def test_the_method_decides_what_is_applied(tmp_path):
    plus = parsed(tmp_path, "--lora.modules_to_save", "[pooler]").applied
    assert plus is not None
    assert (plus.lr_ratio, plus.modules_to_save) == (16.0, ("pooler", "head"))
    lora = parsed(tmp_path, "--method", "lora").applied
    assert lora is not None
    assert (lora.lr_ratio, lora.modules_to_save) == (1.0, ("head",))
    assert dataclasses.replace(lora, lr_ratio=16.0, modules_to_save=plus.modules_to_save) == plus
    assert parsed(tmp_path, "--method", "full").applied is None
    again = parsed(tmp_path, "--lora.modules_to_save", "[head]").applied
    assert again is not None
    assert again.modules_to_save == ("head",)


def test_rates_of_an_adapter_go_with_one(tmp_path):
    rates = ("--init_adapter_rates", "new")
    assert parsed(tmp_path, *rates, "--init_adapter", "old_run").init_adapter_rates == "new"
    with pytest.raises(ValueError, match="init_adapter_rates goes with init_adapter"):
        parsed(tmp_path, *rates)
    with pytest.raises(ValueError, match="init_adapter is empty"):
        parsed(tmp_path, "--init_adapter", " ")


@pytest.mark.parametrize("target", ["[query, up]", ".*/(query|up)"])
def test_json_and_yaml_round_trips(tmp_path, target):
    changes = {n: v for n, v in OTHER.items() if n not in ("train.epochs", "lora.target_modules")}
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
    with pytest.raises(ValueError, match="train: there is no key 'step'; did you mean 'steps'"):
        settings_from_json(plain)


def test_settings_are_frozen_and_need_names():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MeshSettings().data = 3  # pyright: ignore
    with pytest.raises(TypeError, match="positional"):
        MeshSettings(3)  # pyright: ignore


def test_help_says_what_every_field_means():
    text = " ".join(settings_parser().format_help().split())
    for name in dotted():
        assert f"--{name}" in text
    assert "eta_A, the peak rate of A and of everything but B" in text
    assert "lambda, the ratio of B's learning rate to A's" in text


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "path=None and train=None"),
        ({"path": "a", "train": "b"}, "path='a' and train='b'"),
        ({"path": "a", "test": "b"}, "test goes with train"),
        ({"path": "a", "validation": "b"}, "validation goes with train"),
        ({"path": " "}, "path must"),
        ({"path": 3}, "path must"),
        ({"path": "a", "text": None}, "text must"),
        ({"path": "a", "label": ""}, "label must"),
        ({"path": "a", "label": "text"}, "different columns"),
        ({"path": "a", "text_pair": "label"}, "different columns"),
        ({"path": "a", "max_length": 1}, "max_length must"),
        ({"path": "a", "max_length": 8.0}, "max_length must"),
        ({"path": "a", "split_seed": -1}, "split_seed must"),
        ({"path": "a", "split_seed": True}, "split_seed must"),
        ({"path": "a", "validation_fraction": 0.0}, "validation_fraction must"),
        ({"path": "a", "validation_fraction": 1}, "validation_fraction must"),
        ({"path": "a", "test_fraction": -0.1}, "test_fraction must"),
        ({"path": "a", "test_fraction": float("nan")}, "test_fraction must"),
        ({"path": "a", "test_fraction": 0.5, "validation_fraction": 0.5}, "leave something for training"),
    ],
)
def test_data_settings_that_are_rejected(fields, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        DataSettings(**fields)


def test_data_settings_with_separate_files_may_leave_out_validation_and_test():
    assert DataSettings(train="a", text_pair="b").columns == ("text", "b", "label")
