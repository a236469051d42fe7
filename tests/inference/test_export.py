"""Exports of an adapter that was never trained; those of runs are in `tests/integration`."""

import errno

import numpy as np
import pytest
from safetensors.numpy import load_file

from loraplus_jax.interop import peft_files

from ..integration.runs import evaluated, printed, rejected
from ..messages import assert_mentions

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.slow
def test_a_run_exported_for_peft_and_merged_evaluates_the_same(untrained, tmp_path, capsys):
    to = tmp_path / "peft"
    assert "README.md" in printed(capsys, "export", untrained.out, "--to", to)
    assert {p.name for p in to.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *("loraplus.json", "loraplus.safetensors"),
    }
    run = evaluated(capsys, untrained.out)
    assert evaluated(capsys, to) == run
    names = set(load_file(to / "adapter_model.safetensors"))
    assert "base_model.model.encoder.layer.1.attention.self.query.lora_A.weight" in names
    assert len(names) == 3 * 2 * 2  # three kinds of layers, two of each, two factors
    readme = (to / "README.md").read_text()
    assert "BertModel.from_pretrained" in readme
    assert_mentions(readme, "'mean'", "no, yes")
    to = tmp_path / "merged"
    printed(capsys, "export", untrained.out, "--to", to, "--merged")
    merged = evaluated(capsys, to)
    assert merged["accuracy"] == run["accuracy"]
    assert merged["loss"] == pytest.approx(run["loss"], abs=1e-5)
    old, new = (load_file(d / "model.safetensors") for d in (untrained.model, to))
    adapted = {n for n in old if n.endswith(("query.weight", "value.weight", "intermediate.dense.weight"))}
    assert {n for n in old if not np.array_equal(old[n], new[n])} == adapted
    assert new.keys() == old.keys()


@pytest.mark.slow
def test_a_gguf_adapter_that_cannot_be_written_names_its_directory(untrained, tmp_path, capsys, monkeypatch):
    def limited(*_):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(peft_files, "record_text", limited)  # of the adapter that it is made from
    to = tmp_path / "to"
    error = rejected(capsys, "export", untrained.out, "--format", "gguf", "--to", to)
    assert error.endswith(f"'{to}'\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_bad_exports_are_one_line_and_leave_nothing(untrained, tmp_path, capsys):
    to = tmp_path / "to"
    to.mkdir()
    assert_mentions(rejected(capsys, "export", untrained.out, "--to", to), to)
    to.rmdir()
    for flags, words in (
        (("--format", "gguf"), ["model_type", "llama", "gpt2", "bert"]),
        (("--base_model", ""), ["--base_model", "''"]),
        (("--merged", "--dequantized"), ["--dequantized", "model.quantize", "nf4"]),
        (("--merged", "--format", "gguf"), ["GGUF"]),
        (("--merged", "--dtype", "q8_0"), ["--dtype", "hf", "float32", "bfloat16", "float16", "q8_0"]),
    ):
        assert_mentions(rejected(capsys, "export", untrained.out, "--to", to, *flags), *words)
    assert_mentions(rejected(capsys, "export", tmp_path, "--to", to), "run", tmp_path)
    inside = untrained.out / "adapter/peft"
    assert_mentions(rejected(capsys, "export", untrained.out, "--to", inside), inside, "outside")
    words = ("export", untrained.out, "--merged", "--to", tmp_path / "x.gguf")
    assert_mentions(rejected(capsys, *words), tmp_path / "x.gguf", "directory")
    words = ("export", untrained.out, "--to", to, "--allow_different", "data.train")
    assert_mentions(rejected(capsys, *words), "--allow_different", "'data.train'", "base.weights")
    assert list(tmp_path.iterdir()) == []
