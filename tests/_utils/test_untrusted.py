"""Files from others: bounded time and memory, one line, nothing read that was not named."""

import contextlib
import json
import os
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from loraplus_jax import LoRAPlusConfig, load_adapter, save_adapter
from loraplus_jax._utils import json_files
from loraplus_jax._utils.json_files import read_json
from loraplus_jax._utils.yaml_files import read_yaml
from loraplus_jax.adapter.spec import AdapterSpec
from loraplus_jax.adapter.target_rules import try_rules
from loraplus_jax.data.chat_template import load_template
from loraplus_jax.data.conversations import read_chats
from loraplus_jax.data.fetch import resolve
from loraplus_jax.data.readers import read_rows
from loraplus_jax.interop.factor_trees import read_tree
from loraplus_jax.interop.peft_adapter_config import read_options
from loraplus_jax.interop.peft_files import peft_config, peft_notes, read_peft
from loraplus_jax.models.bert.config import BertConfig
from loraplus_jax.models.checkpoints.name_table import NameTable
from loraplus_jax.models.checkpoints.params import load_params
from loraplus_jax.models.files import open_files
from loraplus_jax.models.llama.config import LlamaConfig
from loraplus_jax.models.llama.model import Llama, name_table
from loraplus_jax.settings.parsing import parse_settings
from loraplus_jax.tasks.causal_lm import LanguageTask, tokenizer_and_template
from loraplus_jax.tasks.interface import BaseModel
from loraplus_jax.training.metrics_log import RunLog
from loraplus_jax.training.place import look
from loraplus_jax.training.saved_adapter import saved_config
from loraplus_jax.training.setup import add_adapters

from .. import tiny
from ..integration.language_world import write_model
from ..marks import slow
from ..messages import mentions
from ..models.checkpoints.gguf.files import metadata
from ..models.checkpoints.gguf.files import write as write_gguf

ROOT = Path(__file__).parents[2]
NAME = "a" * 40  # long enough for EVIL to take years
EVIL = "(([a-z]+)*)*!"
CLASSES = "(?i)" + "[\0-\uffff]" * 9000


def test_minimum_versions_exclude_known_holes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lowest = dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", line).groups() for line in project["train"])
    versions = {name: tuple(map(int, version.split("."))) for name, version in lowest.items()}
    assert versions["jinja2"] >= (3, 1, 6)
    assert versions["filelock"] >= (4, 2, 1)


def peft(**options):
    """Reads the config of an adapter of PEFT."""

    def call(directory):
        names = {f"base_model.model.{NAME}.lora_{x}.weight" for x in "AB"}
        save_file({n: np.ones((2, 2), np.float32) for n in names}, directory / "adapter_model.safetensors")
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | options
        (directory / "adapter_config.json").write_text(json.dumps(content))
        peft_config(directory, [("{name}", "{name}")])
        read_options(directory / "adapter_config.json").left_out({f"{NAME}.c": False})

    return call


def ours(section="config", read=load_adapter, **changes):
    """Reads an adapter directory of ours with changes to its JSON."""

    def call(directory):
        spec = AdapterSpec(
            leaf=f"params/{NAME}/kernel", kind="dense", axes="io", shape=(4, 3), rank=2, scale=8.0
        )
        factors = {NAME: {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 3))}}
        config = LoRAPlusConfig(target_modules=[NAME], rank=2)
        save_adapter(directory / "a", factors, {NAME: spec}, config, settings={"lora": {}})
        path = directory / "a/adapter.json"
        notes = json.loads(path.read_text())
        del notes["digest"]
        (notes["settings"]["lora"] if section == "settings" else notes[section]).update(changes)
        path.write_text(json.dumps(notes))
        read(directory / "a")

    return call


def sizes(kind="bert", **changes):
    """A config of sizes beyond all bounds; the config of two is read."""

    def call(_):
        two = dict.fromkeys(tiny.SIZES, 2) | {"head_dim": 2}
        for content in (tiny.config(kind, **two), tiny.config(kind, **two | changes)):
            (BertConfig if kind == "bert" else LlamaConfig).from_hf(content)

    return call


def gguf(key, value):
    def call(directory):
        shapes = {"token_embd.weight": (8, 32), "blk.0.ffn_up.weight": (96, 32)}
        content = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        path = write_gguf(directory / "m.gguf", content, metadata() | {f"llama.{key}": value})
        LlamaConfig.from_hf(open_files(path).config)

    return call


def rotary(**changes):
    content = tiny.config(**{"hidden_size": 4, "head_dim": 4, "num_attention_heads": 1} | changes)
    return lambda _: LlamaConfig.from_hf(content)


YARN = {"type": "yarn", "factor": 1e300}
TOO_FAR = {"type": "linear", "factor": 10**400}
RULE, PEFT_RULE = ("adapter.json", "rule", "1 s"), "adapter_config.json"
ENCODER_SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "type_vocab_size", "pad_token_id")
ROWS = (
    (peft(rank_pattern={EVIL: 2}), PEFT_RULE, "rank_pattern"),
    (peft(rank_pattern={"(" * 10_000: 2}), PEFT_RULE, "rank_pattern"),
    (peft(target_modules=EVIL), PEFT_RULE, "target_modules"),
    slow((peft(exclude_modules=EVIL, target_modules=["b"]), PEFT_RULE, "exclude_modules")),
    slow((peft(target_modules=CLASSES), PEFT_RULE, "target_modules")),
    (peft(r=10**9), PEFT_RULE, 10**9, 2),
    (ours(rank_pattern={EVIL: 2}), *RULE),
    slow((ours("settings", target_modules=EVIL), *RULE)),
    slow((ours(target_parameters=[EVIL]), *RULE)),
    *(
        (ours(rank=10**9, rank_pattern={NAME: 2}, alpha=16.0, read=read), "adapter.json", 10**9, 4)
        for read in (load_adapter, lambda directory: saved_config(look(directory)))
    ),
    (sizes(num_hidden_layers=1001), "num_hidden_layers", 1001, 1000),
    *(
        (sizes(**{field: 10**12}), field, 10**12, 2**24)
        for field in (*ENCODER_SIZES, "max_position_embeddings")
    ),
    (sizes("llama", hidden_size=10**30), "hidden_size", 10**30),
    (sizes("llama", head_dim=10**9), "head_dim", 10**9, 2**14),
    (sizes("llama", max_position_embeddings=10**9), "max_position_embeddings", 10**9, 2**27),
    (
        sizes("llama", num_attention_heads=2**13, head_dim=2**13),
        *("num_attention_heads x head_dim", 2**26, 2**24),
    ),
    (gguf("block_count", 2**31 - 4), "num_hidden_layers", 2**31 - 4),
    (gguf("embedding_length", 2**31 - 4), "hidden_size", 2**31 - 4),
    (rotary(rope_scaling=YARN), "config.json", "factor"),
    (rotary(rope_scaling=TOO_FAR), "config.json", "factor"),
    (rotary(rope_theta=1.0), "config.json", "rope_theta"),
)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_what_would_hang_or_fill_the_memory_is_rejected(reject, tmp_path, row):
    read, *words = row
    reject(lambda: read(tmp_path), *words)


def test_rules_are_tried_on_the_model_that_they_are_for(reject):
    config = LoRAPlusConfig(target_modules=EVIL)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name=NAME)(x)

    base = BaseModel(Model(), NameTable(rules=()), (), (jax.ShapeDtypeStruct((1, 2), jnp.float32),), (), {})
    reject(lambda: add_adapters(base, config), "lora", EVIL, "1 s")
    try_rules("lora", LoRAPlusConfig(target_modules=["b"]).to_json(), [NAME])


def test_sizes_that_the_weights_lack_are_rejected_before_factors_are_made(tmp_path):
    config = LlamaConfig.from_hf(tiny.config(hidden_size=2**20, num_hidden_layers=1000))
    shape = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    base = BaseModel(Llama(config), name_table(config), (), (shape,), (), {})
    lora = LoRAPlusConfig(target_modules=["q_proj"])
    directory = tiny.write(tmp_path / "base")
    with pytest.raises(ValueError, match=mentions("do not match the model", 2**20)):
        add_adapters(base, lora, open_files(directory))


READERS = {
    "config.json": lambda p: read_json(p),
    "run.yaml": lambda p: read_yaml(p),
    "train.yaml": lambda p: parse_settings(p),
    "data.csv": lambda p: read_rows(p, ["text"]),
    "data.parquet": lambda p: read_rows(p, ["text"]),
    "data.tsv": lambda p: resolve(str(p), "data"),
    "data.jsonl": lambda p: read_chats(p),
    "own.jinja": lambda p: load_template(str(p), open_files(p.parent)),
    "chat_template.jinja": lambda p: open_files(p.parent).chat_template,
    "tokenizer.json": lambda p: open_files(p.parent).tokenizer,
    "tokenizer_config.json": lambda p: open_files(p.parent).special_tokens,
    "generation_config.json": lambda p: open_files(p.parent).stop_ids,
    "model.safetensors": lambda p: load_params(open_files(p.parent), NameTable(rules=()), {}),
    "m.gguf": lambda p: open_files(p).config,
    "metrics.jsonl": lambda p: RunLog(p.parent, keep=1, writes=False),
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_not_read(reject, tmp_path, name):
    for kind, make in {
        "FIFO": os.mkfifo,
        "directory": os.mkdir,
        "device": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        path = tmp_path / kind / name
        path.parent.mkdir()
        make(path)
        words = (path, kind) if name != "m.gguf" else (path,)
        with contextlib.suppress(FileNotFoundError):
            reject(lambda path=path: READERS[name](path), *words)


NAMED = ("train.yaml", "data.csv", "data.parquet", "data.tsv", "data.jsonl", "own.jinja")
"""Files whose path the user gives, who may keep them elsewhere."""
DIRECTORIES = {
    **{name: read for name, read in READERS.items() if name not in (*NAMED, "m.gguf")},
    "only.gguf": lambda p: open_files(p.parent),
    "vocab.txt": lambda p: open_files(p.parent).copy_tokenizer(p.parents[1]),
    "adapter.json": lambda p: load_adapter(p.parent),
    "adapter.safetensors": lambda p: load_adapter(p.parent),
    "adapter_config.json": lambda p: read_peft(p.parent),
    "adapter_model.safetensors": lambda p: read_peft(p.parent),
    "loraplus.json": lambda p: peft_notes(p.parent),
    "arrays.npz": lambda p: read_tree(p.parent),
    "adapter": lambda p: look(p.parent),
}
"""A file of a directory that is named as a whole, and a reader of the directory."""


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_link_out_of_an_untrusted_directory_is_not_followed(reject, tmp_path, name):
    (path := tmp_path / "a" / name).parent.mkdir()
    if name.startswith("adapter_"):
        peft()(path.parent)
    elif name.startswith("adapter."):
        ours(read=lambda _: None)(tmp_path)
    path.unlink(missing_ok=True)
    secret = tmp_path / "secret"
    secret.mkdir() if name == "adapter" else secret.write_text("{}")
    path.symlink_to("../secret")
    reject(lambda: DIRECTORIES[name](path), path, "symbolic link", "../secret")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", NAMED)
def test_a_link_that_the_user_names_is_followed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_files, "check_link", None)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "mine").write_text("")
    (path := tmp_path / "theirs" / name).symlink_to("../mine")
    with contextlib.suppress(ValueError):  # of an empty file
        READERS[name](path)


def test_a_template_path_of_an_adapter_is_not_opened(reject, tmp_path):
    write_model(tmp_path)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    options: Any = SimpleNamespace(data=SimpleNamespace(max_length=8, template=str(secret)))
    saved = LanguageTask(kind="instruction", template="{{ bos_token }}!")
    assert tokenizer_and_template(options, open_files(tmp_path), saved)[1].source == saved.template
    without = LanguageTask(kind="instruction")
    words = ("data.template", "task.template", "plain")
    reject(lambda: tokenizer_and_template(options, open_files(tmp_path), without), *words)
