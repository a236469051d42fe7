"""Which directory is an adapter's, in which format, and what `loraplus inspect` shows of it without a model."""

import json

import numpy as np
import pytest

from loraplus_jax import save_adapter
from loraplus_jax.cli.commands import main
from loraplus_jax.inference.inspect_adapter import read_summary

from ..inference.conversions import write_library, write_peft
from ..interop.library_trees import RANK
from ..interop.models import spec_of
from ..interop.test_combination import adapter as random_adapter
from ..messages import assert_mentions

MODULES = {f"layers.{n}.{name}": (8, 6) for n in range(2) for name in ("q_proj", "v_proj")}


def shown(capsys, place):
    assert main(["inspect", str(place)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    return head, {row[:15].strip(): row[15:].strip() for row in rows}


def damage(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_an_adapter_of_ours(tmp_path, capsys):
    stack = spec_of("dense", "io", (3, 6, 8), leaf="params/n/kernel", stacked=(0,), layers=(0, 2))
    specs = {"m": spec_of("dense", "io", (6, 8)), "n": stack}
    made = random_adapter(specs)
    settings = {"settings": {"model": {"path": "org/base\x1b[2J"}}}
    save_adapter(tmp_path / "a", made.lora, specs, made.config, **settings)
    head, rows = shown(capsys, tmp_path / "a")
    assert_mentions(head, tmp_path / "a", "loraplus_jax")
    assert (rows["rank"], rows["alpha"], rows["targets"]) == ("2", f"{made.config.alpha:g}", "n (2), m (1)")
    assert (rows["base"], rows["dtype"], rows["digests"]) == (r"org/base\u001b[2J", "float32", "as saved")
    assert rows["parameters"] == f"{2 * 14 + 3 * 2 * 14} in 4 tensors"
    file = tmp_path / "a/adapter.safetensors"
    assert rows["bytes"] == f"{file.stat().st_size:,}"
    damage(file)
    assert main(["inspect", str(tmp_path / "a")]) == 2
    assert_mentions(capsys.readouterr().err, file, "changed")


def test_an_adapter_of_peft(tmp_path, capsys):
    place = write_peft(tmp_path / "a", MODULES, "org/base", rank_pattern={"v_proj": 3}, dora=True)
    for named in (place, place / "adapter_model.safetensors"):
        head, rows = shown(capsys, named)
        assert_mentions(head, "PEFT", "DoRA")
        assert (rows["rank"], rows["alpha"]) == ("2 (2), 3 (2)", "3")
        assert (rows["targets"], rows["base"]) == ("q_proj (2), v_proj (2)", "org/base")
        assert "unsupported" not in rows


def test_fields_of_peft_that_are_unsupported_are_named_next_to_the_rest(tmp_path, capsys):
    options = {"lora_bias": True, "new_field": 7, "lora_alpha": [1], "base_model_name_or_path": "a\nrank 9"}
    place = write_peft(tmp_path / "a", MODULES, "-", **options)
    _, rows = shown(capsys, place)
    assert (rows["rank"], rows["alpha"], rows["base"]) == ("2", "[1]", r"a\nrank 9")
    assert_mentions(rows["unsupported"], "lora_bias=True", "new_field=7")
    (place / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert main(["inspect", str(place)]) == 2
    assert_mentions(capsys.readouterr().err, place / "adapter_model.safetensors", "damaged")


@pytest.mark.parametrize("library", ["qwix", "gemma", "openpi"])
def test_factors_of_a_library(library, tmp_path, capsys):
    write_library(library, tmp_path / "a.safetensors")
    head, rows = shown(capsys, tmp_path / "a.safetensors")
    assert_mentions(head, library)
    assert rows["rank"] == f"{RANK}"
    assert (rows["alpha"], rows["base"], rows["digests"]) == ("not in the files", "not in the files", "none")


def test_a_gguf_adapter(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 5.0)
    for side, shape in (("a", (2, 6)), ("b", (8, 2))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{side}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    summary = read_summary(tmp_path)
    assert (dict(summary.ranks), [*summary.alphas]) == ({"blk.0.attn_q": 2}, [5.0])
    assert summary.base.endswith("llama")
    assert not summary.is_recorded


def test_what_is_no_adapter_is_an_error(tmp_path, capsys):
    for name in ("model", "empty", "pickle"):
        (tmp_path / name).mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (tmp_path / "pickle/adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "pickle/adapter_model.bin").touch()
    for words, told in (
        ([tmp_path / "model"], ["model", "adapter"]),
        ([tmp_path / "empty"], ["empty"]),
        ([tmp_path / "none.safetensors"], ["none.safetensors", "exist"]),
        ([tmp_path / "pickle"], ["adapter_model.bin", "pickle"]),
        ([tmp_path / "model", "--seed", "3"], ["--seed", "settings"]),
    ):
        assert main(["inspect", *map(str, words)]) == 2
        assert_mentions(capsys.readouterr().err, *told)
