"""Files from others: bounded time and memory, one line, nothing read that was not named."""

import contextlib
import json
import os
import re
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
from loraplus_jax._utils.json_files import read_json
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.target_rules import try_rules
from loraplus_jax.data.chat_template import load_template
from loraplus_jax.data.conversations import read_chats
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

from ..integration.language_world import write_model
from ..marks import long, slow
from ..models.checkpoints.gguf.files import metadata
from ..models.checkpoints.gguf.files import write as write_gguf

ROOT = Path(__file__).parents[2]
NAME = "a" * 40  # long enough for EVIL to take years
EVIL = "(([a-z]+)*)*!"


def test_minimum_versions_exclude_known_holes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lowest = dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", line).groups() for line in project["train"])
    versions = {name: tuple(map(int, version.split("."))) for name, version in lowest.items()}
    assert versions["jinja2"] >= (3, 1, 6)
    assert versions["filelock"] >= (4, 2, 1)


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
def test_a_regular_expression_of_a_peft_adapter_cannot_hang(reject, tmp_path, options, word):
    directory = write_peft(tmp_path / "a", **options)
    reject(lambda: peft_config(directory, [("{name}", "{name}")]), directory / "adapter_config.json", word)


@pytest.mark.parametrize(
    "options", [{"target_modules": EVIL}, long({"exclude_modules": EVIL, "target_modules": ["b"]})]
)
def test_a_rule_of_a_peft_adapter_cannot_hang(reject, tmp_path, options):
    found = read_options(write_peft(tmp_path / "a", **options) / "adapter_config.json")
    reject(
        lambda: found.left_out({f"{NAME}.c": False}), tmp_path / "a/adapter_config.json", next(iter(options))
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
def test_a_rule_of_an_adapter_of_ours_cannot_hang(reject, adapter, section, rule):
    directory = adapter(section, **RULES[rule])
    reject(lambda: load_adapter(directory), directory / "adapter.json", "rule", "1 s")


def test_rules_are_tried_on_the_model_that_they_are_for(reject):
    config = LoRAPlusConfig(target_modules=EVIL)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name=NAME)(x)

    base = BaseModel(Model(), NameTable(rules=()), (), (jax.ShapeDtypeStruct((1, 2), jnp.float32),), (), {})
    reject(lambda: add_adapters(SimpleNamespace(seed=0), base, config, None), "lora", EVIL, "1 s")
    try_rules("lora", LoRAPlusConfig(target_modules=["b"]).to_json(), [NAME])


@pytest.mark.parametrize("read", [load_adapter, saved_config])
def test_a_rank_above_the_tensors_is_rejected(reject, adapter, read):
    directory = adapter("config", rank=10**9, rank_pattern={NAME: 2}, alpha=16.0)
    reject(lambda: read(directory), directory / "adapter.json", 10**9, 4)


def test_a_rank_above_the_tensors_of_peft_is_rejected(reject, tmp_path):
    directory = write_peft(tmp_path / "a", r=10**9)
    reject(lambda: peft_config(directory, [("{name}", "{name}")]), "adapter_config.json", 10**9, 2)


BERT = {
    "model_type": "bert",
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "max_position_embeddings", "type_vocab_size", "pad_token_id"), 2),
}


TENSORS = {
    "bert": {
        "embeddings.word_embeddings.weight": (30, 4),
        "embeddings.position_embeddings.weight": (8, 4),
        **{f"encoder.layer.{n}.output.dense.weight": (4, 4) for n in range(2)},
    },
    "a billion layers": {"encoder.layer.999999999.output.dense.weight": (4, 4)},
    "a width without values": {"a.0.weight": (4, 4), "b.1.weight": (10**12, 0)},
    "none": {},
}


def write_base(directory, name, **changes):
    if tensors := {n: np.ones(shape, np.float32) for n, shape in TENSORS[name].items()}:
        save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(BERT | changes))


@pytest.mark.parametrize(
    ("name", "field", "value", "held"),
    [
        ("bert", "num_hidden_layers", 10**9, 2),
        ("bert", "num_hidden_layers", 3, 2),
        ("a billion layers", "num_hidden_layers", 10**9, 1),
        ("a width without values", "vocab_size", 10**12, 4),
        *[("bert", field, 31, 30) for field in ("hidden_size", "intermediate_size", "num_attention_heads")],
        *[("bert", f, 10**12, 30) for f in ("vocab_size", "type_vocab_size", "pad_token_id")],
        ("bert", "max_position_embeddings", 10**9, 30),
        ("llama", "num_hidden_layers", 10**9, 2),
        ("llama", "hidden_size", 10**30, None),
        ("llama", "head_dim", 10**9, None),
        ("llama", "max_position_embeddings", 10**9, 2**27),
        ("none", "num_hidden_layers", 10**9, 1000),
        *[("none", field, 10**12, 2**24) for field in ("vocab_size", "hidden_size")],
    ],
)
def test_sizes_are_checked_against_the_files(reject, tmp_path, name, field, value, held):
    if name == "llama":
        write_model(tmp_path)
    else:
        write_base(tmp_path, name, **({"num_hidden_layers": 1} if name == "a billion layers" else {}))
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
def test_rotary_numbers_that_cannot_be_computed_with_are_rejected(reject, changes, word):
    reject(lambda: LlamaConfig.from_hf(LLAMA | changes), "config.json", word)


def test_heads_times_their_size_are_checked_too(reject, tmp_path):
    write_base(tmp_path, "none", num_attention_heads=2**13, head_dim=2**13)
    reject(lambda: load_config(tmp_path), "config.json", "num_attention_heads x head_dim", 2**26, 2**24)


@pytest.mark.parametrize(
    ("key", "named"), [("block_count", "num_hidden_layers"), ("embedding_length", "hidden_size")]
)
def test_sizes_of_a_gguf_file_are_checked(reject, tmp_path, key, named):
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
def test_what_is_no_file_is_not_read(reject, tmp_path, name, kind):
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


def test_a_template_path_of_an_adapter_is_not_opened(reject, tmp_path):
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
