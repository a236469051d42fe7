"""Files from others: bounded time and memory, one line, nothing read that was not named."""

import contextlib
import json
import os
import re
import signal
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplus_jax import LoRAPlusConfig, load_adapter, save_adapter
from loraplus_jax._utils import untrusted
from loraplus_jax._utils.json_files import read_json
from loraplus_jax.adapter.rules import try_rules
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.data.chat_template import PLAIN, ChatTemplate, load_template
from loraplus_jax.data.conversations import Turn, read_chats
from loraplus_jax.data.fetch import resolve
from loraplus_jax.data.readers import read_rows
from loraplus_jax.interop.peft_adapter_config import read_options
from loraplus_jax.interop.peft_files import peft_config
from loraplus_jax.models import tokenizer as tokenizers
from loraplus_jax.models.checkpoints.hf import load_config, load_params
from loraplus_jax.models.checkpoints.name_table import NameTable
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.settings.yaml_files import read_yaml
from loraplus_jax.tasks.causal_lm import LanguageTask, tokenizer_and_template
from loraplus_jax.tasks.interface import BaseModel
from loraplus_jax.training.metrics_log import RunLog
from loraplus_jax.training.saved_adapter import saved_config
from loraplus_jax.training.setup import add_adapters

from ..fuzz.damage import MIB, peak_limit
from ..integration.language_world import write_model
from ..marks import long, slow
from ..messages import assert_mentions
from ..models.checkpoints.gguf.files import metadata
from ..models.checkpoints.gguf.files import write as write_gguf

ROOT = Path(__file__).parents[2]
TURNS = [Turn("user", "hi"), Turn("assistant", "yes")]
NAME = "a" * 40  # long enough for EVIL to take years
EVIL = "(([a-z]+)*)*!"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(untrusted, "SECONDS", 1)


def reject(act, *words):
    """The one line that `act` ends in, within ten seconds and with little memory, and its words."""

    def stop(*_):
        raise AssertionError("it takes more than ten seconds")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    try:
        with peak_limit(0), pytest.raises(ValueError, match=r"^[^\n]{1,500}$") as caught:
            act()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert type(caught.value) is ValueError
    assert_mentions(str(caught.value), *words)


def test_minimum_versions_exclude_known_holes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lowest = dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", line).groups() for line in project["train"])
    versions = {name: tuple(map(int, version.split("."))) for name, version in lowest.items()}
    assert versions["jinja2"] >= (3, 1, 6)
    assert versions["filelock"] >= (4, 2, 1)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "1 s"),
        long("{% set r = range(9999) %}{% for x in r %}{% for y in r %}{% endfor %}{% endfor %}", "1 s"),
        long("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}", "1 s"),
        long("{{ 10 ** (10 ** 8) }}", "1 s"),
        ("{{ range(99999)|map('string')|map('center', 99999)|list|length }}", "64 MiB"),
        ("{{ '%1000000000d'|format(1) }}", "64 MiB"),
        ("{{ 'x'|center(10**9) }}", "64 MiB"),
        ("{{ 'x' * 10**9 }}", "64 MiB"),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "64 MiB",
        ),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "64 MiB",
        ),
        (
            "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "64 MiB",
        ),
        ("{% for x in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "64 MiB"),
        ("{{ range(99999)|map('string')|join('x' * 9999) }}", "64 MiB"),
        ("{{ range(10**9) }}", "100000"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ ' x' * 5000000 }}", "10,000,000"),
        ("{{ ' x' * 3000 }}", "6,000"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{{ raise_exception('a\n\x07' * 500) }}", "a"),
    ],
)
def test_a_template_that_escaped_is_stopped(source, word):
    reject(lambda: ChatTemplate(source, "toy.json").render(TURNS, place="f.jsonl:7"), "toy.json", word)
    # A new child process answers the next one.
    assert ChatTemplate(PLAIN, "plain", eos_token="</s>").render(TURNS[1:]) == "### Response:\nyes</s>"


@pytest.mark.parametrize("pause", [0, slow(2.5)])
def test_a_child_that_waited_or_was_killed_answers_the_next_job(monkeypatch, pause):
    """The limits of a job end with it: after 2 s by the clock its alarm would have killed the child."""
    untrusted.run_job("x", "match", patterns=[], names=[])
    child = untrusted._child
    time.sleep(pause)
    if not pause:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        answers = iter([None])  # as if it died just after it was looked at
        monkeypatch.setattr(child, "poll", lambda: next(answers, -9))
    assert untrusted.run_job("x", "match", patterns=["a"], names=["a", "b"]) == [[0], []]
    assert (untrusted._child is child) == bool(pause)


def test_the_child_has_no_environment():
    untrusted.run_job("x", "match", patterns=[], names=[])
    content = Path(f"/proc/{untrusted._child.pid}/environ").read_bytes()
    names = {line.partition(b"=")[0].decode() for line in content.split(b"\0") if line}
    assert names <= {"SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "RAYON_NUM_THREADS"}


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def sequence(kind, parts):
    return {"type": "Sequence", kind: parts}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"normalizer": sequence("normalizers", [replace("a", "a" * 100)] * 5)}, "64 MiB"),
        ({"normalizer": sequence("normalizers", [replace("a", "a" * 100)] * 2)}, "MiB"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 200_000}}, 32),
        ({"decoder": sequence("decoders", [replace("a", "a" * 100)] * 5)}, "MiB"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}}, "index"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "crashes"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "zero"),
        ({"model": {"continuing_subword_prefix": "##"}}, "slice"),
        ({"model": {"vocab": {"a": "x"}}}, "line 1"),
    ],
    ids=["five", "two", "prepend", "decoder", "panic", "abort", "zero", "slice", "json"],
)
def test_a_tokenizer_that_fails_is_stopped(tmp_path, changes, word):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    content = {"version": "1.0", "added_tokens": [], "model": model | changes.pop("model", {})} | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    reject(lambda: tokenizers.tokenizer(tmp_path), tmp_path / "tokenizer.json", word)


def test_a_piece_of_a_gguf_file_that_is_too_long_to_split_is_rejected(tmp_path):
    pieces = {"tokenizer.ggml.tokens": ["<s>", "a" * 10**6], "tokenizer.ggml.scores": [0.0, 0.0]}
    content = metadata() | {"tokenizer.ggml.model": "llama"} | pieces
    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.ones((2, 32), np.float32)}, content)
    reject(lambda: tokenizers.tokenizer(path), path, 10**6)


def write_peft(directory, **options):
    directory.mkdir(exist_ok=True)
    names = {f"base_model.model.{NAME}.lora_{x}.weight" for x in "AB"}
    save_file({name: np.ones((2, 2), np.float32) for name in names}, directory / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | options
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank_pattern": {EVIL: 2}}, "rank_pattern"),
        long({"alpha_pattern": {"q": 3, EVIL: 2}}, "alpha_pattern"),
        ({"rank_pattern": {"(" * 10_000: 2}}, "rank_pattern"),
        long({"target_modules": "(?i)" + "[\0-\uffff]" * 9000}, "target_modules"),
    ],
    ids=["rank", "alpha", "nested", "classes"],
)
def test_a_regular_expression_of_a_peft_adapter_cannot_hang(tmp_path, options, word):
    directory = write_peft(tmp_path / "a", **options)
    reject(lambda: peft_config(directory, [("{name}", "{name}")]), directory / "adapter_config.json", word)


@pytest.mark.parametrize(
    "options", [{"target_modules": EVIL}, long({"exclude_modules": EVIL, "target_modules": ["b"]})]
)
def test_a_rule_of_a_peft_adapter_cannot_hang(tmp_path, options):
    found = read_options(write_peft(tmp_path / "a", **options) / "adapter_config.json")
    reject(
        lambda: found.missing_targets([f"{NAME}.c"]), tmp_path / "a/adapter_config.json", next(iter(options))
    )


@pytest.fixture
def adapter(tmp_path):
    """An adapter directory of ours; a function that changes its JSON."""
    spec = AdapterSpec(leaf=f"params/{NAME}/kernel", kind="dense", axes="io", shape=(4, 3), rank=2, scale=8.0)
    factors = {NAME: {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 3))}}
    save_adapter(
        tmp_path / "a",
        factors,
        {NAME: spec},
        LoRAPlusConfig(target_modules=[NAME], rank=2),
        settings={"lora": {}},
    )

    def change(section, **values):
        path = tmp_path / "a/adapter.json"
        notes = json.loads(path.read_text())
        del notes["digest"]
        where = notes["settings"]["lora"] if section == "settings" else notes[section]
        where.update(values)
        path.write_text(json.dumps(notes))
        return tmp_path / "a"

    return change


RULES = {
    "rank": {"rank_pattern": {EVIL: 2}},
    "target": {"target_modules": EVIL},
    "alpha": {"alpha_pattern": {EVIL: 2}},
    "exclude": {"exclude_modules": EVIL},
    "parameter": {"target_parameters": [EVIL]},
    "classes": {"target_modules": "(?i)" + "[\0-\uffff]" * 9000},
}


@pytest.mark.parametrize(
    ("section", "rule"),
    [
        ("config", "rank"),
        slow("settings", "target"),
        *(long(s, r) for r in list(RULES)[2:] for s in ("config", "settings")),
        *(long(*pair) for pair in (("settings", "rank"), ("config", "target"))),
    ],
)
def test_a_rule_of_an_adapter_of_ours_cannot_hang(adapter, section, rule):
    directory = adapter(section, **RULES[rule])
    reject(lambda: load_adapter(directory), directory / "adapter.json", "rule", "1 s")


def test_rules_are_tried_on_the_model_that_they_are_for():
    config = LoRAPlusConfig(target_modules=EVIL)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name=NAME)(x)

    base = BaseModel(Model(), NameTable(rules=()), (), (jax.ShapeDtypeStruct((1, 2), jnp.float32),), (), {})
    reject(lambda: add_adapters(SimpleNamespace(seed=0), base, config, None), "lora", EVIL, "1 s")
    try_rules("lora", LoRAPlusConfig(target_modules=["b"]).to_json(), [NAME])


@pytest.mark.parametrize("read", [load_adapter, saved_config])
def test_a_rank_above_the_tensors_is_rejected(adapter, read):
    directory = adapter("config", rank=10**9, rank_pattern={NAME: 2}, alpha=16.0)
    reject(lambda: read(directory), directory / "adapter.json", 10**9, 4)


def test_a_rank_above_the_tensors_of_peft_is_rejected(tmp_path):
    directory = write_peft(tmp_path / "a", r=10**9)
    reject(lambda: peft_config(directory, [("{name}", "{name}")]), "adapter_config.json", 10**9, 2)


BERT = {
    "model_type": "bert",
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "max_position_embeddings", "type_vocab_size", "pad_token_id"), 2),
}


def write_bert(directory, **changes):
    tensors = {
        "embeddings.word_embeddings.weight": (30, 4),
        "embeddings.position_embeddings.weight": (8, 4),
        **{f"encoder.layer.{n}.output.dense.weight": (4, 4) for n in range(2)},
    }
    save_file({n: np.ones(s, np.float32) for n, s in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(BERT | changes))


def write_far_layer(directory, **changes):
    """One tensor whose name claims a billion layers."""
    name = "encoder.layer.999999999.output.dense.weight"
    save_file({name: np.ones((4, 4), np.float32)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(BERT | {"num_hidden_layers": 1} | changes))


def write_empty_tensor(directory, **changes):
    """A tensor that claims a width and has no values."""
    tensors = {"a.0.weight": np.ones((4, 4), np.float32), "b.1.weight": np.ones((10**12, 0), np.float32)}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(BERT | changes))


def write_alone(directory, **changes):
    (directory / "config.json").write_text(json.dumps(BERT | changes))


@pytest.mark.parametrize(
    ("write", "field", "value", "held"),
    [
        (write_bert, "num_hidden_layers", 10**9, 2),
        (write_bert, "num_hidden_layers", 3, 2),
        (write_far_layer, "num_hidden_layers", 10**9, 1),
        (write_empty_tensor, "vocab_size", 10**12, 4),
        *[
            (write_bert, field, 31, 30)
            for field in ("hidden_size", "intermediate_size", "num_attention_heads")
        ],
        *[(write_bert, f, 10**12, 30) for f in ("vocab_size", "type_vocab_size", "pad_token_id")],
        (write_bert, "max_position_embeddings", 10**9, 30),
        (write_model, "num_hidden_layers", 10**9, 2),
        (write_model, "hidden_size", 10**30, None),
        (write_model, "head_dim", 10**9, None),
        (write_model, "max_position_embeddings", 10**9, 2**27),
        (write_alone, "num_hidden_layers", 10**9, 1000),
        *[(write_alone, field, 10**12, 2**24) for field in ("vocab_size", "hidden_size")],
    ],
)
def test_sizes_are_checked_against_the_files(tmp_path, write, field, value, held):
    write(tmp_path)
    load_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reject(lambda: load_config(tmp_path), "config.json", field, value, *([held] if held else []))


LLAMA = {
    "model_type": "llama",
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "head_dim", "max_position_embeddings"), 4),
}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 1e300}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "head_dim"),
    ],
    ids=["yarn", "linear", "theta", "dynamic"],
)
def test_rotary_numbers_that_cannot_be_computed_with_are_rejected(changes, word):
    reject(lambda: LlamaConfig.from_hf(LLAMA | changes), "config.json", word)


def test_heads_times_their_size_are_checked_too(tmp_path):
    write_alone(tmp_path, num_attention_heads=2**13, head_dim=2**13)
    reject(lambda: load_config(tmp_path), "config.json", "num_attention_heads x head_dim", 2**26, 2**24)


@pytest.mark.parametrize(
    ("key", "named"), [("block_count", "num_hidden_layers"), ("embedding_length", "hidden_size")]
)
def test_sizes_of_a_gguf_file_are_checked(tmp_path, key, named):
    tensors = {
        "token_embd.weight": np.ones((8, 32), np.float32),
        "blk.0.ffn_up.weight": np.ones((96, 32), np.float32),
    }
    content = metadata()
    name = next(n for n in content if n.endswith(key))
    path = write_gguf(tmp_path / "m.gguf", tensors, content | {name: 2**31 - 4})
    reject(lambda: load_config(path), path, named, 2**31 - 4)


READERS = {
    "config.json": lambda p: read_json(p),
    "run.yaml": lambda p: read_yaml(p),
    "train.yaml": lambda p: parse_settings(p),
    "data.csv": lambda p: read_rows(p, ["text"]),
    "data.parquet": lambda p: read_rows(p, ["text"]),
    "data.tsv": lambda p: resolve(str(p), "data"),
    "data.jsonl": lambda p: read_chats(p),
    "own.jinja": lambda p: load_template(str(p), p.parent),
    "chat_template.jinja": lambda p: tokenizers.read_chat_template(p.parent),
    "tokenizer.json": lambda p: tokenizers.read_tokenizer_json(p.parent),
    "tokenizer_config.json": lambda p: tokenizers.special_tokens(p.parent),
    "generation_config.json": lambda p: tokenizers.stop_ids(p.parent),
    "model.safetensors": lambda p: load_params(p.parent, NameTable(rules=()), {}),
    "m.gguf": lambda p: load_config(p),
    "metrics.jsonl": lambda p: RunLog(p.parent, keep=1, writes=False),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["FIFO", "directory", "device"])
def test_what_is_no_file_is_not_read(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    words = (path, kind) if name != "m.gguf" else (path,)
    with contextlib.suppress(FileNotFoundError):
        reject(lambda: READERS[name](path), *words)


def test_a_template_path_of_an_adapter_is_not_opened(tmp_path):
    write_model(tmp_path)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    settings = SimpleNamespace(data=SimpleNamespace(max_length=8, template=str(secret)))
    saved = LanguageTask(kind="instruction", template="{{ bos_token }}!")
    assert tokenizer_and_template(settings, tmp_path, saved)[1].source == saved.template
    without = LanguageTask(kind="instruction")
    reject(
        lambda: tokenizer_and_template(settings, tmp_path, without), "data.template", "task.template", "plain"
    )


def test_memory_of_a_large_conversation_is_enough():
    text = "é😀 words " * (MIB // 8)
    assert text in ChatTemplate(PLAIN, "plain", eos_token="</s>").render([Turn("user", text), TURNS[1]])
