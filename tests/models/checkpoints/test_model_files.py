"""A directory's tokenizer, chat template and special tokens; and how often the files of a model are opened."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from loraplus_jax.models.checkpoints import hub_directory
from loraplus_jax.models.files import open_files

from ...messages import mentions
from ...refusals import refusals


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    own = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[PAD]": 2}, unk_token="[PAD]"))
    own.enable_padding(pad_id=2, pad_token="[PAD]", length=9)
    own.enable_truncation(1)
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": {"content": "a"},
        "eos_token": "b",
        "pad_token": None,
        "chat_template": "{{ one }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_directory_gives_the_same_three_things(directory):
    assert open_files(directory).tokenizer.encode("a b a b").tokens == ["a", "b", "a", "b"]
    assert open_files(directory).special_tokens == {"bos_token": "a", "eos_token": "b"}
    assert open_files(directory).chat_template == "{{ one }}"
    (directory / "chat_template.jinja").write_text("{{ two }}")
    assert open_files(directory).chat_template == "{{ two }}"


COPIED = {
    "vocab.txt": "[PAD]\na\n",
    "vocab.json": '{"a": 0}',
    "merges.txt": "#version: 0.2\n",
    "special_tokens_map.json": "{}",
    "generation_config.json": "{}",
    "spiece.model": "\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
    "tokenizer.model": "IQ== 0\nIg== 1\n",
}


def test_a_snapshot_of_the_hub_s_cache_is_copied(directory, tmp_path):
    snapshot, target = tmp_path / "hub/snapshots/0123", tmp_path / "out"
    for path in (snapshot, tmp_path / "hub/blobs", target):
        path.mkdir(parents=True)
    for name, content in COPIED.items():
        (tmp_path / "hub/blobs" / name).write_text(content)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    open_files(snapshot).copy_tokenizer(target)
    assert {p.name: p.read_text() for p in target.iterdir()} == COPIED | {"generation_config.json": "{}\n"}
    assert not any(p.is_symlink() for p in target.iterdir())


@pytest.mark.parametrize("name", ["tokenizer.json", *COPIED])
def test_what_is_not_what_its_name_says_is_not_copied(directory, tmp_path, name):
    (directory / name).write_bytes(b"-----BEGIN\xff")
    with pytest.raises(ValueError, match=mentions(directory / name)):
        open_files(directory).copy_tokenizer(tmp_path)


def test_of_several_templates_the_default_one_is_taken(directory):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_files(directory).chat_template == "d"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    assert open_files(directory).chat_template is None
    (directory / "tokenizer_config.json").unlink()
    assert open_files(directory).chat_template is None
    assert open_files(directory).special_tokens == {}


def test_gemma_3_s_token_for_an_image_is_left_out_of_a_model_of_text(directory):
    file, config = directory / "tokenizer.json", directory / "config.json"
    own = Tokenizer.from_file(str(file))
    own.add_special_tokens(["<image_soft_token>"])
    own.save(str(file))
    config.write_text('{"vocab_size": 3}')
    assert open_files(directory).tokenizer.token_to_id("<image_soft_token>") is None
    config.write_text('{"vocab_size": 4}')
    assert open_files(directory).tokenizer.token_to_id("<image_soft_token>") == 3
    own.add_special_tokens(["<more>"])
    own.save(str(file))
    with pytest.raises(ValueError, match=mentions("<more>", "embedding", "4 rows")):
        assert open_files(directory).tokenizer


def test_a_valid_tokenizer_is_tried_once(directory, monkeypatch):
    ours = open_files(directory).tokenizer.to_str()
    monkeypatch.setattr(hub_directory, "run_job", None)
    assert open_files(directory).tokenizer.to_str() == ours


def test_a_file_that_is_replaced_is_read_as_it_was_opened(tmp_path):
    old, new = (tmp_path / name for name in ("model.safetensors", "new"))
    save_file({"x": np.arange(4.0)}, old)
    view = open_files(tmp_path).tensors["x"]
    save_file({"x": np.ones(4)}, new)
    new.rename(old)
    assert view[:].tolist() == [0, 1, 2, 3]


def with_file(name, content, read="tokenizer"):
    """Reads the directory after a file of it was replaced, or with None removed."""

    def call(directory):
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content)
        return getattr(open_files(directory), read)

    return call


test_what_is_wrong_with_a_directory_is_named = refusals(
    (with_file("config.json", b'{"vocab_size": 2}'), "embedding", "2 rows"),
    (with_file("chat_template.jinja", b"\xff", "chat_template"), "chat_template.jinja", "UTF-8"),
    (with_file("tokenizer.json", b"{}"), "tokenizer.json"),
    (with_file("tokenizer.json", None), "hf", "tokenizer.json"),
    (
        with_file("config.json", b'{"eos_token_id": "</s>"}', "stop_ids"),
        "config.json",
        "eos_token_id",
        "'</s>'",
    ),
    (lambda directory: open_files(directory / "nowhere"), "nowhere", "directory", "GGUF"),
)


def test_special_tokens_that_only_the_config_names(tmp_path):
    Tokenizer(models.BPE({"a": 0, "<end>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    assert open_files(tmp_path).special_tokens == {"bos_token": "<end>", "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "a"}))
    assert open_files(tmp_path).special_tokens == {"eos_token": "a"}


def test_the_tokens_that_end_a_text_come_from_both_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert open_files(tmp_path).stop_ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert open_files(tmp_path).stop_ids == (9, 7)


def test_a_template_of_its_own_file_needs_no_tokenizer_config(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert open_files(tmp_path).chat_template == "{{ messages }}"
